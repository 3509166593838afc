"""Read the chapters of the book: their order, titles and code cells.

``_toc.yml`` is the one place that says in which order the chapters come. A
chapter's number is its place there; its file is ``chapters/NAME.md``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "t5_book"
HOME = re.compile(rf"# {PACKAGE}/(\w+)\.py\n")  # the first line of an export cell
ASSERT = re.compile(r"^\s*assert\b|AssertionError", re.MULTILINE)


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

    @property
    def module(self) -> str | None:
        """The module that the cell is exported to, if it is."""
        home = HOME.match(self.source)
        name = home[1] if home else self.chapter.removesuffix(".md")
        return name if "export" in self.tags else None

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


def chapter_paths(root: Path = ROOT) -> list[Path]:
    """The numbered chapters of ``_toc.yml``, in their order.

    Raises:
        BookError: if there is none, or if one does not exist.
    """
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))
    numbered = [part for part in toc["parts"] if part.get("numbered")]
    paths = [root / f"{entry['file']}.md" for part in numbered for entry in part["chapters"]]
    for path in paths:
        if not path.is_file():
            raise BookError(f"_toc.yml names {path.name}, which does not exist")
    if not paths:
        raise BookError("_toc.yml names no numbered chapter")
    return paths


def read_chapters(root: Path = ROOT) -> list[Chapter]:
    """Read the chapters in their order.

    Raises:
        BookError: if a chapter is missing or has no heading.
    """
    return [read_chapter(path, n) for n, path in enumerate(chapter_paths(root), start=1)]


def read_chapter(path: Path, number: int) -> Chapter:
    """Read one chapter."""
    heading = re.search(r"^# (.+)$", path.read_text("utf-8"), re.MULTILINE)
    if not heading:
        raise BookError(f"{path.name} has no heading: start it with '# '")
    title = heading[1].strip().replace("`", "").replace("*", "")
    return Chapter(path, number, title, tuple(code_cells(path)))


def code_cells(path: Path) -> list[Cell]:
    """Find the code cells of a chapter, with their lines."""
    notebook, lines = read_notebook(path), path.read_text("utf-8").splitlines()
    cells = []
    for start, cell in zip(notebook.metadata.source_map, notebook.cells, strict=True):
        if cell.cell_type != "code":
            continue
        code = cell.source.splitlines()
        last = len(lines) - len(code)
        # The map points at the fence; the cell's options come before its code.
        while start < last and lines[start : start + len(code)] != code:
            start += 1
        tags = frozenset(cell.metadata.get("tags", ()))
        cells.append(Cell(path.name, start, cell.source, tags))
    return cells


def read_notebook(path: Path) -> NotebookNode:
    """Read a chapter as Jupyter Book does, which so finds its kept run."""
    return read_myst_markdown_notebook(path.read_text("utf-8"), add_source_map=True)


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
