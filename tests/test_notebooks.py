"""The pages for research are run as notebooks, by the command that makes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import make_notebooks
import pytest
from builders import ROOT


@pytest.mark.thorough
@pytest.mark.notebook
def test_every_block_of_the_pages_for_research_runs_in_a_notebook() -> None:
    """On all devices, as a user has it."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DEFAULT_DEVICE"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, make_notebooks.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in make_notebooks.PAGES:
        notebook = json.loads((make_notebooks.BUILD / Path(page).with_suffix(".ipynb")).read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert len(cells) == (ROOT / "docs" / page).read_text().count("```python\n")
        assert all(cell["execution_count"] for cell in cells)
