"""Draws the departments of the package and who imports whom, for docs/architecture.md.

`python docs/draw.py --write` renews the picture between `<!-- drawn -->` and `<!-- end -->`; without `--write` it only
says whether it is new. The picture is a Mermaid graph. The nouns, order 1 of the page's table, are one box, and a line
that follows from others is left out.
"""

import argparse
import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grokjax"
PAGE = ROOT / "docs" / "architecture.md"
DRAWN = re.compile(r"(<!-- drawn -->\n).*?(<!-- end -->)", re.DOTALL)
NOUNS = 1  # the order whose modules are drawn as one box


def read_rows(page: str) -> list[tuple[int, str, str]]:
    """The rows `| order | package or module | holds |` of a page, as they follow each other."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    return [(int(order), name, holds.replace("\\|", "|")) for order, name, holds in rows]


def module_name(path: Path) -> str:
    """`config` for grokjax/config.py, `__init__` for the package itself, `kernels` for grokjax/kernels/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def read_names(source: str) -> set[str]:
    """What a source imports of the package, without its name; anywhere: inside functions and TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write grokjax in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("grokjax").lstrip(".") for name in names if name.split(".")[0] == "grokjax"}


def find_module(name: str, modules: set[str]) -> str:
    """The module that `name` lies in: the longest prefix that is one, else the package's own `__init__`."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or "__init__"


def read_imports(source: str, modules: set[str]) -> set[str]:
    """The modules of the package that a source imports."""
    return {find_module(name, modules) for name in read_names(source)}


def read_package() -> dict[str, set[str]]:
    """Each module of the package, and the modules that it imports."""
    sources = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    return {module: read_imports(source, set(sources)) for module, source in sources.items()}


def join_boxes(imports: Mapping[str, set[str]], boxes: Mapping[str, str]) -> dict[str, set[str]]:
    """Box -> the other boxes that its modules import; `boxes` has the box of each department or root module."""
    joined: dict[str, set[str]] = {box: set() for box in boxes.values()}
    for module, imported in imports.items():
        joined[boxes[module.split(".")[0]]] |= {boxes[name.split(".")[0]] for name in imported}
    return {box: others - {box} for box, others in joined.items()}


def drop_implied(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The edges of a graph without cycles, less those that also lead there by way of another."""

    def reach(box: str) -> set[str]:
        return set().union(*({other} | reach(other) for other in edges[box]))

    return {box: others - set().union(*(reach(other) for other in others)) for box, others in edges.items()}


def draw(page: str, imports: Mapping[str, set[str]]) -> str:
    """A Mermaid graph of what imports what, with what the table of the page says of each box."""
    rows = read_rows(page)
    boxes = {name: "nouns" if order == NOUNS else name.strip("_") for order, name, _ in rows}
    nouns = ", ".join(name for order, name, _ in rows if order == NOUNS)
    labels = {boxes[name]: (name, holds.replace("`", "")) for _, name, holds in rows} | {"nouns": ("the nouns", nouns)}
    edges = drop_implied(join_boxes(imports, boxes))
    lines = [f'  {box}["<b>{name}</b><br>{holds}"]' for box, (name, holds) in reversed(labels.items())]
    lines += [f"  {box} --> {other}" for box in reversed(labels) for other in labels if other in edges[box]]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def renew(page: str) -> str:
    """The page with the picture drawn anew."""
    picture = draw(page, read_package())
    return DRAWN.sub(lambda found: found[1] + picture + found[2], page)


def main() -> None:
    """Writes the picture, or says that it is old."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="changes docs/architecture.md")
    page = PAGE.read_text()
    if parser.parse_args().write:
        PAGE.write_text(renew(page))
    elif renew(page) != page:
        sys.exit("The picture of docs/architecture.md is not that of the imports: run docs/draw.py --write.")


if __name__ == "__main__":
    main()
