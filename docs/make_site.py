"""Builds the docs site into build/site: `python docs/make_site.py`. It needs the extra `docs`.

The pages are the files of the repository as they are, at the places where their links expect each other, and one page
for each module named in the navigation, made from its docstrings. A broken link or any other warning fails the build.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
CONFIG = ROOT / "docs" / "zensical.toml"


def read_nav(entries: Iterable[Any]) -> Iterator[str]:
    """The pages of a navigation, section by section, as paths from the repository's root."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from read_nav([value] if isinstance(value, str) else value)


def read_pages() -> list[str]:
    """The pages of the site in the order of its navigation."""
    return list(read_nav(tomllib.loads(CONFIG.read_text())["project"]["nav"]))


def make_page(name: str) -> str:
    """The text of a page: a file of the repository, or what makes mkdocstrings write the page of a module."""
    found = re.fullmatch(r"reference/([\w.]+)\.md", name)
    if found:
        return f"# {found[1]}\n\n::: {found[1]}\n"
    # The mark is for the tests of the documents; the site's Markdown knows no such fence.
    return re.sub(r"^```(\w+) no-run$", r"```\1", (ROOT / name).read_text(), flags=re.MULTILINE)


def find_linked(name: str) -> Iterator[Path]:
    """The files of the repository that a page links to, other pages apart."""
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", make_page(name)):
        target = (ROOT / name).parent / link
        if "://" not in link and target.suffix != ".md" and target.is_file():
            yield target.resolve().relative_to(ROOT)


def gather(pages: Iterable[str], folder: Path) -> None:
    """Writes pages, and copies the files that they link to, into a folder where both lie as in the repository."""
    for name in pages:
        for path in find_linked(name):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(make_page(name))


def main() -> None:
    """Gathers the pages and builds the site.

    Raises:
      SystemExit: A package of the extra `docs` is not installed; or, with status 0 or 1, the build is over.
    """
    for package in ("mkdocstrings", "zensical"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"The site needs a package that is not installed ({package}): pip install -e '.[docs]'")
    shutil.rmtree(BUILD / "pages", ignore_errors=True)
    gather(read_pages(), BUILD / "pages")
    config = shutil.copy(CONFIG, BUILD / "zensical.toml")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
