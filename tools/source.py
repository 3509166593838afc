"""Read the chapters of the book: their number, title, cells and lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jupytext.myst import myst_to_notebook

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "chapters"
PACKAGE = ROOT / "t5_book"
NAME = re.compile(r"(?P<number>\d\d)_(?P<module>[a-z][a-z0-9_]*)\.md")


class BookError(Exception):
    """Something in a chapter is wrong; the message says where."""


@dataclass(frozen=True)
class Cell:
    """A code cell and where it stands in its chapter.

    ``line`` is the number of the line before the first line of code, so
    that ``line + node.lineno`` is the line of a syntax node in the file.
    """

    chapter: str
    index: int
    line: int
    source: str
    tags: frozenset[str]

    def where(self, lineno: int = 1) -> str:
        """Say ``06_attention.md:41`` for a line of this cell."""
        return f"{self.chapter}:{self.line + lineno}"


@dataclass(frozen=True)
class Chapter:
    """One chapter: ``chapters/NN_module.md``."""

    path: Path
    number: int
    module: str
    title: str
    cells: tuple[Cell, ...]

    @property
    def export_cells(self) -> list[Cell]:
        """The cells tagged ``export``."""
        return [cell for cell in self.cells if "export" in cell.tags]


def read_chapters(folder: Path = CHAPTERS) -> list[Chapter]:
    """Read every chapter of a folder, in the order of their numbers.

    Raises:
        BookError: if there is none, or if two bear the same number.
    """
    paths = sorted(p for p in folder.glob("*.md") if NAME.fullmatch(p.name))
    if not paths:
        raise BookError(f"no chapters (NN_name.md) in {folder}")
    chapters = [read_chapter(path) for path in paths]
    for key in ("number", "module"):
        seen = {}
        for chapter in chapters:
            other = seen.setdefault(getattr(chapter, key), chapter)
            if other is not chapter:
                names = f"{other.path.name} and {chapter.path.name}"
                raise BookError(f"{names} have the same {key}")
    return chapters


def read_chapter(path: Path) -> Chapter:
    """Read one chapter.

    Raises:
        BookError: if its name or its first heading is missing.
    """
    name = NAME.fullmatch(path.name)
    if not name:
        raise BookError(f"{path.name} is not named NN_name.md")
    text = path.read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if not title:
        raise BookError(f"{path.name} has no heading: start it with '# '")
    plain = title[1].strip().replace("`", "").replace("*", "")
    cells = code_cells(path.name, text)
    return Chapter(path, int(name["number"]), name["module"], plain, cells)


@cache
def code_cells(name: str, text: str) -> tuple[Cell, ...]:
    """Find the code cells of a chapter's text, with their lines."""
    notebook = myst_to_notebook(text, add_source_map=True)
    lines, cells = text.splitlines(), []
    starts = notebook.metadata["source_map"]
    for start, cell in zip(starts, notebook.cells, strict=True):
        if cell.cell_type != "code":
            continue
        code = cell.source.splitlines()
        last = len(lines) - len(code)
        while start < last and lines[start : start + len(code)] != code:
            start += 1  # skip the cell's options
        tags = frozenset(cell.metadata.get("tags", ()))
        cells.append(Cell(name, len(cells), start, cell.source, tags))
    return tuple(cells)
