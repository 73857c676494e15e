"""Draws the pictures of docs/experiments.md: `python docs/draw_pictures.py`. It needs the extra `plot`.

The page's own Python blocks are run, in an empty folder, and the pictures that they save there are the page's.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

PAGE = Path(__file__).parent / "experiments.md"
PICTURES = PAGE.parent / "pictures"


def main() -> None:
    """Runs the page, and takes its pictures."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, PICTURES)
        os.chdir(PAGE.parent)


if __name__ == "__main__":
    main()
