"""The table in docs/architecture.md is the law: a module imports only from layers below its own."""

import ast
import re
from pathlib import Path

import pytest
from builders import ROOT

PACKAGE = ROOT / "grokjax"
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def read_table(text: str) -> dict[str, int]:
    """Module -> layer, of the rows `| layer | module | holds |`."""
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \| .+ \|$", text, re.MULTILINE)
    modules = [module for _, module in rows]
    assert len(modules) == len(set(modules)), "a module stands twice in the table"
    return {module: int(layer) for layer, module in rows}


def module_name(path: Path) -> str:
    """`config` for grokjax/config.py, `__init__` for the package itself, `kernels` for grokjax/kernels/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def read_imports(source: str, modules: set[str]) -> set[str]:
    """The modules of the package that a source imports, anywhere in it: inside functions and TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write grokjax in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("grokjax").lstrip(".") for name in names if name.split(".")[0] == "grokjax"}
    return {find_module(name, modules) for name in inside}


def find_module(name: str, modules: set[str]) -> str:
    """The module that `name` lies in: the longest prefix that is one, else the package's own `__init__`."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or "__init__"


LAYERS = read_table((ROOT / "docs" / "architecture.md").read_text())
SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_table_lists_exactly_the_modules() -> None:
    assert sorted(LAYERS) == sorted(SOURCES), "docs/architecture.md and grokjax/ disagree on which modules there are"


@pytest.mark.parametrize("module", SOURCES)
def test_module_imports_only_from_lower_layers(module: str) -> None:
    own = LAYERS[module]
    imports = read_imports(SOURCES[module].read_text(), set(SOURCES))
    upward = {name: LAYERS[name] for name in imports if LAYERS[name] >= own}
    assert not upward, f"{module} is layer {own} and imports from the same or a higher layer: {upward}"


@pytest.mark.parametrize("module", SOURCES)
def test_module_is_named_for_what_it_holds(module: str) -> None:
    assert not EMPTY_NAMES & set(module.split("."))


def test_every_form_of_import_is_seen() -> None:
    modules = {"__init__", "config", "model", "kernels", "kernels.attention"}
    source = """
import jax
from grokjax import config, load
def f():
    from grokjax.model import Grok
    import grokjax.kernels.attention as a
"""
    assert read_imports(source, modules) == {"config", "__init__", "model", "kernels.attention"}
    assert read_imports("from grokjax.kernels import attention, other", modules) == {"kernels.attention", "kernels"}
    assert read_imports("import grokjax", modules) == {"__init__"}
    with pytest.raises(AssertionError, match="relative import"):
        read_imports("from .config import GrokConfig", modules)


def test_table_is_read_row_by_row() -> None:
    assert read_table("| layer | module | holds |\n|---|---|---|\n| 0 | `a` | x |\n| 12 | `b.c` | y \\| z |\n") == {
        "a": 0,
        "b.c": 12,
    }
    with pytest.raises(AssertionError, match="twice"):
        read_table("| 0 | `a` | x |\n| 1 | `a` | y |\n")
