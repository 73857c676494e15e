"""The pages for research are run as notebooks, by the command that makes them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT


@pytest.mark.thorough
@pytest.mark.notebook
def test_every_block_of_the_pages_for_research_runs_in_a_notebook() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_notebooks.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("walkthrough.md", "research.md", "experiments.md"):
        notebook = json.loads((ROOT / "build" / "notebooks" / Path(page).with_suffix(".ipynb")).read_text())
        cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert len(cells) == (ROOT / "docs" / page).read_text().count("```python\n")
        assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
