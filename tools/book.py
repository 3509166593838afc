"""Read the chapters of the book: their order, titles and code cells.

``_toc.yml`` is the one place that says in which order the chapters come. A
chapter's number is its place there; its file is ``chapters/NAME.md``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from jupytext.myst import myst_to_notebook

ROOT = Path(__file__).resolve().parent.parent


class BookError(Exception):
    """Something in the book is wrong; the message says where."""


@dataclass(frozen=True)
class Cell:
    """A code cell and where it stands in its chapter.

    ``line`` is the number of the line before the first line of code, so
    that ``line + node.lineno`` is the line of a syntax node in the file.
    """

    chapter: str
    line: int
    source: str
    tags: frozenset[str]

    def where(self, lineno: int = 1) -> str:
        """Say ``attention.md:41`` for a line of this cell."""
        return f"{self.chapter}:{self.line + lineno}"


@dataclass(frozen=True)
class Chapter:
    """A chapter: ``chapters/NAME.md``, and its place in the book."""

    path: Path
    number: int
    title: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """The file's name without its ending, such as ``attention``."""
        return self.path.stem


def read_chapters(root: Path = ROOT) -> list[Chapter]:
    """Read the numbered chapters of ``_toc.yml``, in their order.

    Raises:
        BookError: if a chapter is missing or has no heading.
    """
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))
    numbered = [part for part in toc["parts"] if part.get("numbered")]
    files = [entry["file"] for part in numbered for entry in part["chapters"]]
    return [
        read_chapter(root / f"{file}.md", number)
        for number, file in enumerate(files, start=1)
    ]


def read_chapter(path: Path, number: int) -> Chapter:
    """Read one chapter."""
    if not path.is_file():
        raise BookError(f"_toc.yml names {path.name}, which does not exist")
    text = path.read_text("utf-8")
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    if not heading:
        raise BookError(f"{path.name} has no heading: start it with '# '")
    title = heading[1].strip().replace("`", "").replace("*", "")
    return Chapter(path, number, title, tuple(code_cells(path.name, text)))


def code_cells(name: str, text: str) -> list[Cell]:
    """Find the code cells of a chapter's text, with their lines."""
    notebook = myst_to_notebook(text, add_source_map=True)
    lines, cells = text.splitlines(), []
    starts = notebook.metadata["source_map"]
    for start, cell in zip(starts, notebook.cells, strict=True):
        if cell.cell_type != "code":
            continue
        code = cell.source.splitlines()
        last = len(lines) - len(code)
        # The map points at the fence; the cell's options come before its code.
        while start < last and lines[start : start + len(code)] != code:
            start += 1
        tags = frozenset(cell.metadata.get("tags", ()))
        cells.append(Cell(name, start, cell.source, tags))
    return cells
