"""Makes notebooks of the pages for research, run, in build/notebooks: `python docs/make_notebooks.py`.

It needs the extra `notebooks`. A page's Python blocks become cells, which share their names as they do in the tests of
the documents, and its prose stays prose. As in the tests, a CPU is 8 devices. An error in a cell ends the command.
"""

import concurrent.futures
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "notebooks"
PAGES = ("walkthrough.md", "research.md", "experiments.md")


def with_links_from(folder: str, text: str) -> str:
    """Markdown whose relative links lead to the same files from elsewhere; `folder` is the way back to the page's."""
    return re.sub(r"\]\((?![^)]*://|#)([^)]+)\)", rf"]({folder}/\1)", text)


def with_prose_kept(text: str) -> str:
    """Markdown whose blocks marked `no-run` are prose to jupytext, which would make cells of them."""
    block = re.compile(r"^```\w+ no-run$.*?^```$", re.MULTILINE | re.DOTALL)
    return block.sub(r"<!-- #region -->\n\g<0>\n<!-- #endregion -->", text)


def make_notebook(page: str) -> Any:
    """The notebook of a page of this folder, not yet run."""
    import jupytext

    notebook = jupytext.reads(with_prose_kept((ROOT / "docs" / page).read_text()), fmt="md")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links_from("../../docs", cell.source)
    return notebook


def run_notebook(page: str) -> None:
    """Makes, runs and writes the notebook of a page, in a process of its own."""
    import nbclient
    import nbformat

    notebook = make_notebook(page)
    with tempfile.TemporaryDirectory() as folder:  # where the cells write their files
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    nbformat.write(notebook, BUILD / f"{Path(page).stem}.ipynb")


def missing_package() -> str | None:
    """A package of the extra `notebooks` that is not installed; None if all are."""
    needed = ("jupytext", "nbclient", "ipykernel")
    return next((package for package in needed if importlib.util.find_spec(package) is None), None)


def main() -> None:
    """Makes, runs and writes the notebooks.

    Raises:
      SystemExit: A package of the extra `notebooks` is not installed.
    """
    if missing := missing_package():
        sys.exit(f"Notebooks need a package that is not installed ({missing}): pip install -e '.[notebooks]'")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    BUILD.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_notebook, PAGES))


if __name__ == "__main__":
    main()
