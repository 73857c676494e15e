"""docs/architecture.md is the law: the order of packages, their front doors, and the order of the files inside them."""

import ast
import importlib
import re
import sys
from pathlib import Path

import draw
import pytest
from builders import ROOT
from draw import NOUNS, PACKAGE, find_module, module_name, read_imports, read_names

EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
# Who imports an inner module of a department from outside, and why: they replace something where it is looked up, or
# count its calls, and serve tests of several departments.
INSIDE = {
    "tests/cli/test_cli_kept_pass.py": {"checkpoint.layer_reader"},  # counts layers read; a disk fails at one
    "tests/fuzz_release.py": {"checkpoint.formats.release"},  # its tests replace the reader by mistaken ones
    "tests/member.py": {"checkpoint.formats.payload", "cli.batch"},  # counts bytes read; dies at a certain call
    "tests/test_distributed_alone.py": {"cli.options"},  # replaces what the processes call as they join and step
}


def read_table(text: str) -> dict[str, int]:
    """Package or module -> order, of the rows `| order | package or module | holds |`, as they follow each other."""
    names = [name for _, name, _ in draw.read_rows(text)]
    assert len(names) == len(set(names)), "a name stands twice in the table"
    return {name: order for order, name, _ in draw.read_rows(text)}


def read_lists(text: str) -> dict[str, list[str]]:
    """Package -> its files in the order of its list, of the lines "* `file`: what it holds" under "### `package`"."""
    parts = re.split(r"^### `(\w+)`$", text, flags=re.MULTILINE)[1:]
    return {
        package: re.findall(r"^\* `([\w.]+)`: ", re.split(r"^#", part, maxsplit=1, flags=re.MULTILINE)[0], re.MULTILINE)
        for package, part in zip(parts[::2], parts[1::2], strict=True)
    }


def find_trespasses(source: str, own: str | None, doors: dict[str, set[str]]) -> set[str]:
    """What a source imports of departments that are not its own, other than the names of their front doors."""
    found = set()
    for name in read_names(source):
        department, _, rest = name.partition(".")
        if department in doors and department != own and rest and rest not in doors[department]:
            found.add(name)
    return found


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """Some modules of which each imports the next and the last the first; none if there is no cycle."""
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        cycle = next((found for other in sorted(imports[module]) if (found := follow(other, [*way, module]))), [])
        done.add(module)
        return cycle

    return next((cycle for module in sorted(imports) if (cycle := follow(module, []))), [])


def department_of(path: Path) -> str | None:
    """The department whose inner modules a file may import: its own, or that of the folder of tests."""
    folder = path.relative_to(ROOT).parts[1]
    return folder if folder in DOORS else None


TEXT = (ROOT / "docs" / "architecture.md").read_text()
ORDERS, LISTS = read_table(TEXT), read_lists(TEXT)
SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = draw.read_package()
DEPARTMENTS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
DOORS = {name: set(importlib.import_module(f"grokjax.{name}").__all__) for name in DEPARTMENTS}
FRONT_DOORS = sorted(path.parent for path in PACKAGE.glob("*/**/__init__.py"))
FILES = [path for folder in ("grokjax", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
INNER = [module for module in SOURCES if "." in module]


def test_table_lists_exactly_the_packages_and_modules() -> None:
    there = {module.split(".")[0] for module in SOURCES}
    assert sorted(ORDERS) == sorted(there), "docs/architecture.md and grokjax/ disagree on what there is"


def test_lists_name_exactly_the_files() -> None:
    there = {name: [] for name in DEPARTMENTS}
    for module in INNER:
        department, _, file = module.partition(".")
        if SOURCES[module].name != "__init__.py":
            there[department].append(file)
    assert {name: sorted(files) for name, files in LISTS.items()} == {n: sorted(files) for n, files in there.items()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_come_from_lower_orders(module: str) -> None:
    own, places = module.split(".")[0], list(ORDERS)
    upward = {
        name
        for name in {imported.split(".")[0] for imported in IMPORTS[module]} - {own}
        if ORDERS[name] > ORDERS[own]
        or (ORDERS[name] == ORDERS[own] and (ORDERS[own] != NOUNS or places.index(name) > places.index(own)))
    }
    assert not upward, (
        f"{module}, of order {ORDERS[own]}, imports from the same order or a higher one: {sorted(upward)}"
    )


@pytest.mark.parametrize("module", INNER)
def test_a_file_imports_from_files_above_it(module: str) -> None:
    """So that the front door, which imports them, is the last; a folder inside a department imports nothing itself."""
    department, _, file = module.partition(".")
    files = LISTS[department]
    inside = {name for name in IMPORTS[module] if name.split(".")[0] == department}
    above = {f"{department}.{name}" for name in files[: files.index(file)]} if file in files else set()
    assert inside <= above, f"{module} imports {sorted(inside - above)}, which its list does not have above it"


def test_no_module_imports_itself_through_others() -> None:
    assert find_cycle(IMPORTS) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_from_outside_only_front_doors_are_imported(path: Path) -> None:
    names = find_trespasses(path.read_text(), department_of(path), DOORS)
    found = {find_module(name, set(SOURCES)) for name in names}
    assert found == INSIDE.get(path.relative_to(ROOT).as_posix(), set())


@pytest.mark.parametrize("department", DEPARTMENTS)
def test_a_front_door_says_what_is_behind_it(department: str) -> None:
    """A docstring, imports, and the sorted names of all that is imported: nothing is defined there."""
    docstring, *imports, names = ast.parse(SOURCES[department].read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert len(ast.literal_eval(docstring.value).splitlines()) > 2
    assert all(isinstance(statement, ast.ImportFrom) for statement in imports)
    assert isinstance(names, ast.Assign)
    exported = ast.literal_eval(names.value)
    assert len(exported) == len(set(exported)) == len(DOORS[department])
    assert DOORS[department] == {alias.asname or alias.name for found in imports for alias in found.names}


@pytest.mark.parametrize("folder", FRONT_DOORS, ids=lambda folder: folder.relative_to(PACKAGE).as_posix())
def test_a_front_door_names_every_file_and_says_which_to_read_first(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring is not None
    there = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").is_file()}
    assert there - {"__init__"} <= set(re.findall(r"`(\w+)`", docstring))
    assert re.search(r"^Read `\w+`", docstring, re.MULTILINE)


@pytest.mark.parametrize("module", SOURCES)
def test_module_is_named_for_what_it_holds(module: str) -> None:
    assert not EMPTY_NAMES & set(module.split("."))


def test_the_picture_is_what_the_command_draws() -> None:
    assert draw.DRAWN.search(TEXT)
    assert draw.renew(TEXT) == TEXT, "run docs/draw.py --write"


def test_an_old_picture_is_told_and_drawn_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(draw.DRAWN.sub(r"\1old\n\2", TEXT))
    monkeypatch.setattr(draw, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["draw.py"])
    with pytest.raises(SystemExit, match=r"is not that of the imports: run docs/draw\.py --write"):
        draw.main()
    monkeypatch.setattr(sys, "argv", ["draw.py", "--write"])
    draw.main()
    assert page.read_text() == TEXT


def test_a_picture_shows_each_department_and_only_lines_that_do_not_follow_from_others() -> None:
    rows = "| 1 | `config` | sizes |\n| 1 | `cache` | keys |\n| 2 | `model` | `init` |\n| 8 | `__main__` | runs |\n"
    imports = {"config": set(), "cache": {"config"}, "model": {"cache", "model.x"}, "model.x": {"config"}}
    imports["__main__"] = {"model", "config"}
    assert (
        draw.draw(rows, imports)
        == """\
```mermaid
flowchart TD
  main["<b>__main__</b><br>runs"]
  model["<b>model</b><br>init"]
  nouns["<b>the nouns</b><br>config, cache"]
  main --> model
  model --> nouns
```
"""
    )


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


def test_every_trespass_is_seen() -> None:
    doors = {"kernels": {"matmul", "matmul_gpu"}, "engine": {"Engine"}}
    allowed = """
import grokjax.engine
from grokjax import config, engine, load
from grokjax.config import GrokConfig
from grokjax.engine import Engine
from grokjax.kernels import matmul, matmul_gpu
"""
    assert find_trespasses(allowed, None, doors) == set()
    for source, name in (
        ("from grokjax.engine.scheduler import Scheduler", "engine.scheduler.Scheduler"),
        ("from grokjax.engine import scheduler", "engine.scheduler"),
        ("def f():\n    import grokjax.engine.scheduler as s", "engine.scheduler"),
        ("from grokjax.kernels.matmul_gpu import fits", "kernels.matmul_gpu.fits"),
    ):
        assert find_trespasses(source, None, doors) == {name}
        assert find_trespasses(source, name.split(".")[0], doors) == set()


def test_cycles_are_found() -> None:
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert find_cycle({"a": {"a"}}) == ["a"]


def test_documents_are_read_row_by_row() -> None:
    table = "| order | package or module | holds |\n|---|---|---|\n| 1 | `a` | x |\n| 12 | `b` | y \\| z |\n"
    assert read_table(table) == {"a": 1, "b": 12}
    with pytest.raises(AssertionError, match="twice"):
        read_table("| 1 | `a` | x |\n| 2 | `a` | y |\n")
    lists = "### `b`\n\n* `c`: x\n  and `d`: y\n* `e.f`: z\n\n### `g`\n\n* `h`: x\n\n## Letters\n\n* `i`: x\n"
    assert read_lists(lists) == {"b": ["c", "e.f"], "g": ["h"]}
