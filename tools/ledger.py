"""Collect the tables "Paper and code" of all chapters on one page.

    python tools/ledger.py      write chapters/paper_and_code.md

A row of such a table says what some source does, what this book does, and
links to a label, ``[assert](#attention-no-scaling)``. The label stands in the
same chapter, as ``(attention-no-scaling)=`` on the line above the paragraph
before the code cell that proves our side. All of this is checked here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from source import CHAPTERS, BookError, Chapter, read_chapters

HEADING = "## Paper and code"
HEADER = "| | what it does | this book | proof |"
LABEL = re.compile(r"^\(([^()\s]+)\)=$", re.MULTILINE)
PROOF = re.compile(r"\[[^\]]+\]\(#([^()\s]+)\)")
CELL = re.compile(r"^```\{code-cell\}.*?^```$", re.MULTILINE | re.DOTALL)
NEXT = re.compile(r"^(#+ .+|```\{code-cell\}.*)$", re.MULTILINE)

# Names by which the sources of a row are counted, as the page spells them.
SOURCES = {
    "paper": "the paper: Raffel et al. 2020",
    "mesh-tensorflow": "the code in which T5 was trained, with `t5`",
    "t5": "the tasks, data and settings of those trainings",
    "t5x": "its successor in JAX, with flaxformer",
    "flaxformer": "the layers of some later models, for t5x",
    "seqio": "the data pipeline and vocabularies of t5 and t5x",
    "transformers": "version 5.23 where no other is named",
    "superseded repository": "the T5 that this book grew out of",
}
OTHERS = r"\S.* \d{4}|T5|mT5|UMT5|ByT5|UL2|PyTorch|`torch|nanoT5|torchtune"
NAMES = "|".join(sorted(SOURCES, key=len, reverse=True))
SOURCE = re.compile(rf"`?(?P<known>{NAMES})\b(?!-)`?|{OTHERS}")


@dataclass(frozen=True)
class Row:
    """A row of a chapter's table, and the label that its proof stands at."""

    chapter: Chapter
    source: str
    what: str
    ours: str
    label: str

    def write(self) -> str:
        """The row as it stands on the page."""
        link = f"[assert]({self.chapter.path.name}#{self.label})"
        source = re.sub(rf"`({NAMES})`", r"\1", self.source)
        return f"| {source} | {self.what} | {self.ours} | {link} |"


def read_rows(chapter: Chapter) -> list[Row]:
    """The rows of a chapter's table.

    Raises:
        BookError: if it has none, or one that is not as it should be.
    """
    text = chapter.path.read_text("utf-8")
    section = text.partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    table = re.search(r"^\|.*(?:\n\|.*)*", section, re.MULTILINE)
    lines = table[0].splitlines() if table else []
    if lines[:1] != [HEADER] or len(lines) < 3:
        raise BookError(
            f"{chapter.path.name} has no table under {HEADING!r} that "
            f"begins with {HEADER!r}"
        )
    return [read_row(chapter, line) for line in lines[2:]]


def read_row(chapter: Chapter, line: str) -> Row:
    """Take a line of a table apart."""
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    where = f"{chapter.path.name}, row {line!r}"
    if len(cells) != 4:
        raise BookError(f"{where} has {len(cells)} columns and not 4")
    proof = PROOF.fullmatch(cells[3])
    if not proof:
        raise BookError(
            f"{where}: the last column is no link such as [assert](#label)"
        )
    if not SOURCE.match(cells[0]):
        raise BookError(
            f"{where} does not begin with a known source: {NAMES}, or a "
            "name with a year; more can be added in tools/ledger.py"
        )
    return Row(chapter, *cells[:3], proof[1])


def find_labels(chapters: list[Chapter]) -> dict[str, Chapter]:
    """All labels of the book, each with the chapter where it stands.

    Raises:
        BookError: if a label stands twice.
    """
    found = {}
    for chapter in chapters:
        for label in LABEL.findall(chapter.path.read_text("utf-8")):
            if label in found:
                names = found[label].path.name, chapter.path.name
                places = " and ".join(dict.fromkeys(names))
                raise BookError(
                    f"the label ({label})= is twice in {places}"
                )
            found[label] = chapter
    return found


def check_proof(row: Row, labels: dict[str, Chapter]) -> None:
    """Make sure that the label of a row is followed by an assert.

    Raises:
        BookError: if the label is not in the row's chapter, or if the next
            code cell, before any heading, asserts nothing.
    """
    name = row.chapter.path.name
    if labels.get(row.label) != row.chapter:
        raise BookError(
            f"{name} links to #{row.label}, but has no such label"
        )
    text = row.chapter.path.read_text("utf-8")
    after = text.partition(f"\n({row.label})=\n")[2]
    following = NEXT.search(after)
    cell = CELL.match(after, following.start()) if following else None
    if not cell:
        raise BookError(f"{name}: no code cell follows ({row.label})=")
    if not re.search(r"^\s*assert\b|AssertionError", cell[0], re.MULTILINE):
        raise BookError(
            f"{name}: the cell that follows ({row.label})= asserts nothing"
        )


def write_page(chapters: list[Chapter]) -> str:
    """The text of the page.

    Raises:
        BookError: if rows, labels or proofs are not as they should be, in
            whichever chapters.
    """
    labels = find_labels(chapters)
    rows, parts, wrong = [], [], []
    for chapter in chapters:
        try:
            found = read_rows(chapter)
            for row in found:
                check_proof(row, labels)
        except BookError as error:
            wrong.append(str(error))
        else:
            rows += found
            parts.append(write_part(chapter, found))
    if wrong:
        raise BookError("\n".join(wrong))
    intro = PAGE.format(count=len(rows), sources=count_sources(rows))
    return intro + "".join(parts)


def write_part(chapter: Chapter, rows: list[Row]) -> str:
    """The part of the page that belongs to a chapter."""
    title = f"Chapter {chapter.number}: {chapter.title}"
    heading = f"## [{title}]({chapter.path.name})"
    lines = [HEADER, "|---|---|---|---|", *(row.write() for row in rows)]
    return "\n".join(["", heading, "", *lines, ""])


def count_sources(rows: list[Row]) -> str:
    """A table of the sources and how many rows each has."""
    names = [SOURCE.match(row.source)["known"] for row in rows]
    counts = Counter(names)
    lines = [
        f"| {name} | {what} | {counts[name]} |"
        for name, what in SOURCES.items()
        if counts[name]
    ]
    if counts[None]:
        lines.append(f"| others | named in the row | {counts[None]} |")
    return "\n".join(lines)


PAGE = """\
# Paper and code

The paper describes T5, and leaves much to the code. The code has several versions, and
they differ: from the paper, from each other, and here and there from this book. This page
has every such place that the chapters speak of, **{count} rows**, collected from the
tables that stand at the end of each.

Read a row from left to right: who, what they do, and what this book does instead, or
does as well. The last column leads to the paragraph in the chapter whose code cell
**asserts our side**. If that were false, the cell would fail, and with it `make test`.

| first column | who that is | rows |
|---|---|---|
{sources}

A row counts for the first source that it names. "The same" means that a reader of the source
could have expected something else.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    parser = argparse.ArgumentParser(
        description="Write the page of all that differs: paper and code."
    )
    parser.add_argument("--folder", type=Path, default=CHAPTERS)
    folder = parser.parse_args(arguments).folder
    path = folder / "paper_and_code.md"
    try:
        path.write_text(write_page(read_chapters(folder)), encoding="utf-8")
    except BookError as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
