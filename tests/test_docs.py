"""What the documents show is run: Python blocks, commands, the examples in docstrings; links lead somewhere.

`docs/contributing.md` describes the convention. `docs/make_site.py` makes a site of the documents.
"""

import dataclasses
import doctest
import importlib.util
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import draw
import make_notebooks
import make_site
import pytest
from builders import ROOT

from grokjax import cli

PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks" / "notebook").glob("*.md"))]
DOCUMENTS = [ROOT / "README.md", *PAGES]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "grokjax").rglob("*.py")
    if ">>>" in path.read_text()  # the others are not imported: one may need an extra
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, whether it is run, its text, and the document's line on which the text begins."""

    language: str
    runs: bool
    text: str
    line: int


def read_blocks(text: str) -> list[Block]:
    blocks = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, *words = match[1].split() or [""]
        assert words in ([], ["no-run"]), f"a fence says {match[1]!r}; after the language only no-run may stand"
        blocks.append(Block(language, not words, match[2], text.count("\n", 0, match.start(2)) + 1))
    return blocks


def read_commands(text: str) -> list[list[str]]:
    """The commands of the shell blocks that begin with `python` or `grokjax`."""
    commands = []
    for block in read_blocks(text):
        if block.language not in ("bash", "console") or not block.runs:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            command = shlex.split(line.removeprefix("$ "), comments=True)
            if command and command[0] in ("python", "grokjax"):
                commands.append(command)
    return commands


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def python_blocks(document: Path) -> list[Block]:
    return [block for block in read_blocks(document.read_text()) if block.language == "python"]


def compile_block(block: Block, document: Path) -> types.CodeType:
    """Its code; the empty lines in front make a traceback point at the line of the document."""
    return compile("\n" * (block.line - 1) + block.text, str(document), "exec")


# Where notebooks can be made, test_notebooks.py runs the blocks of these pages.
AS_NOTEBOOKS = [ROOT / "docs" / page for page in make_notebooks.PAGES]
RUN_HERE = [page for page in DOCUMENTS if page not in AS_NOTEBOOKS or make_notebooks.missing_package()]
# Only what has something to run: a case that runs nothing could not fail. An empty list fails at collection, as
# pyproject.toml says.
WITH_PYTHON = [document for document in RUN_HERE if any(block.runs for block in python_blocks(document))]
WITH_COMMANDS = [document for document in DOCUMENTS if read_commands(document.read_text())]
# They take longer than all others, and tests show all that they do.
LONGEST = AS_NOTEBOOKS + [ROOT / "docs" / f"{page}.md" for page in ("model", "engine", "hardware", "checkpoints")]


def marks_of(document: Path) -> list[pytest.MarkDecorator]:
    """When its blocks are run: by everybody, or by the thorough tests."""
    return [pytest.mark.thorough] if document in LONGEST else []


def test_python_blocks_are_python_even_where_they_are_not_run() -> None:
    compiled = [compile_block(block, document) for document in DOCUMENTS for block in python_blocks(document)]
    assert compiled


@pytest.mark.parametrize("document", [pytest.param(page, marks=marks_of(page), id=name(page)) for page in WITH_PYTHON])
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(document):
        if block.runs:
            exec(compile_block(block, document), namespace)


@pytest.mark.parametrize(
    "document", [pytest.param(page, marks=marks_of(page), id=name(page)) for page in WITH_COMMANDS]
)
def test_commands_run(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for program, *arguments in read_commands(document.read_text()):
        if program == "grokjax":
            status = cli.main(arguments)
        else:
            status = subprocess.run([sys.executable, *arguments], stdin=subprocess.DEVNULL, check=False).returncode
        assert status == 0, f"{shlex.join([program, *arguments])}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_docstring_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_relative_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing, f"{name(document)} links to files that are not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_prose_fits_in_a_line(document: Path) -> None:
    """120 characters, as in the code; tables and blocks are as wide as they must be."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("document", PAGES, ids=name)
def test_a_page_begins_with_what_its_reader_can_do_after_it(document: Path) -> None:
    assert re.match(r"# .+\n\nAfter reading this page you ", document.read_text())


def test_the_pictures_of_experiments_are_those_that_its_blocks_save() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text()
    shown = re.findall(r"\]\(pictures/(\w+\.png)\)", text)
    assert sorted(shown) == sorted(re.findall(r'savefig\("(\w+\.png)"\)', text))
    assert sorted(shown) == sorted(path.name for path in (ROOT / "docs" / "pictures").iterdir())


def test_the_readme_s_tree_has_every_department() -> None:
    tree = re.findall(r"^  (\w+)/ ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(tree) == sorted(path.parent.name for path in (ROOT / "grokjax").glob("*/__init__.py"))


def test_the_notebook_s_index_has_every_page() -> None:
    folder = ROOT / "benchmarks" / "notebook"
    listed = re.findall(r"^\| \[.+\]\((.+)\) \|", (folder / "README.md").read_text(), re.MULTILINE)
    assert sorted([*listed, "README.md"]) == sorted(path.name for path in folder.iterdir())


def test_the_site_has_every_document_and_every_department_s_public_names() -> None:
    rows = draw.read_rows(draw.PAGE.read_text())
    modules = ["grokjax", *(f"grokjax.{name}" for _, name, _ in rows if not name.startswith("__"))]
    pages = [*map(name, DOCUMENTS), "CHANGELOG.md", "tests/golden/README.md"]
    assert sorted(make_site.read_pages()) == sorted([*pages, *(f"reference/{module}.md" for module in modules)])


def test_the_site_has_the_files_that_its_pages_link_to(tmp_path: Path) -> None:
    make_site.gather(["README.md", "docs/fidelity.md", "reference/grokjax.engine.md"], tmp_path)
    for file in ("LICENSE", "grokjax/model/steps.py", "grokjax/reference.py"):
        assert (tmp_path / file).read_bytes() == (ROOT / file).read_bytes()
    for page in ("README.md", "docs/fidelity.md"):  # the site's Markdown takes nothing behind a block's language
        assert (tmp_path / page).read_text() == (ROOT / page).read_text().replace("```bash no-run", "```bash")
    assert not (tmp_path / "tests" / "golden").exists()  # a page, which comes by its own name
    assert "\n::: grokjax.engine\n" in (tmp_path / "reference" / "grokjax.engine.md").read_text()


def test_a_site_without_its_extra_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", {"mkdocstrings": object()}.get)
    with pytest.raises(SystemExit, match=r"not installed \(zensical\): pip install -e '\.\[docs\]'"):
        make_site.main()


def test_notebooks_link_to_the_same_files_and_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[a](b.md#c) ![d](e/f.png) [g](../h.md) [i](#j) [k](https://l.m/n)"
    linked = "[a](o/b.md#c) ![d](o/e/f.png) [g](o/../h.md) [i](#j) [k](https://l.m/n)"
    assert make_notebooks.with_links_from("o", text) == linked
    monkeypatch.setattr(importlib.util, "find_spec", {"jupytext": object()}.get)
    with pytest.raises(SystemExit, match=r"not installed \(nbclient\): pip install -e '\.\[notebooks\]'"):
        make_notebooks.main()


def test_blocks_know_their_line_and_whether_they_run() -> None:
    text = "# Title\n\n```python\na = 1\n```\n\n```bash no-run\nrm x\n```\n```\nplain\n```\n"
    assert read_blocks(text) == [
        Block("python", True, "a = 1\n", 4),
        Block("bash", False, "rm x\n", 8),
        Block("", True, "plain\n", 11),
    ]
    with pytest.raises(AssertionError, match="only no-run may stand"):
        read_blocks("```python norun\n```\n")


def test_commands_are_found_in_shell_blocks() -> None:
    text = '```bash\npip install x\npython -m a \\\n  "b c"  # why\n```\n```console\n$ grokjax d\nout\n```\n'
    assert read_commands(text) == [
        ["python", "-m", "a", "b c"],
        ["grokjax", "d"],
    ]
    assert read_commands("```bash no-run\npython -m a\n```\n```text\npython -m a\n```\n") == []


def rows_to_change() -> list[str]:
    """The rows of "To change this, open that" whose second column names something that stands in a file."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("## To change this, open that")[1].split("\n## ")[0]
    places = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")]
    return [place for place in places if "`" in place and "](" in place]


@pytest.mark.parametrize("place", rows_to_change())
def test_what_is_to_be_opened_has_what_is_to_be_changed(place: str) -> None:
    """Each name is defined in one of the files that its row links to."""
    sources = [(ROOT / "docs" / link).read_text() for link in re.findall(r"\]\(([^)]+)\)", place)]
    for name in re.findall(r"`([A-Za-z_.]+)`", place):
        last = re.escape(name.rpartition(".")[2])
        is_defined = re.compile(rf"^ *(class|def) {last}\b|^ *{last}(: .*)? = |^ +{last}: ", re.MULTILINE)
        assert any(is_defined.search(source) for source in sources), f"{name} is not defined there"
