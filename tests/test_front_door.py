"""`import grokjax`: quick, and every public name is there when it is used."""

import json
import subprocess
import sys

import pytest

import grokjax

IN_A_NEW_PROCESS = """
import json, sys
import grokjax
at_first = sorted({module.partition(".")[0] for module in sys.modules})
departments = [name for name in ("checkpoint", "engine", "planning") if f"grokjax.{name}" in sys.modules]
missing = [name for name in grokjax.__all__ if name not in dir(grokjax) or getattr(grokjax, name).__name__ != name]
print(json.dumps([at_first, departments, missing, grokjax.checkpoint.__name__]))
"""


def test_an_import_waits_for_nothing_that_it_does_not_use() -> None:
    """Neither for libraries that take long, nor for departments; all public names are there all the same."""
    found = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, check=True)
    libraries, departments, missing, department = json.loads(found.stdout)
    assert not {"orbax", "tensorstore", "psutil", "sentencepiece", "prometheus_client"} & set(libraries)
    assert departments == missing == []
    assert department == "grokjax.checkpoint"


def test_a_name_that_is_not_there_is_told_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'grokjax' has no attribute 'Grok2'"):
        getattr(grokjax, "Grok2")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name 'Grok2' from 'grokjax'"):
        from grokjax import Grok2  # noqa: F401
