"""Collect the tables "Paper and code" of all chapters on one page.

    python tools/ledger.py      write chapters/paper_and_code.md

A row of such a table says what some source does, what this book does, and
links to a label, ``[assert](#attention-no-scaling)``. The label stands in the
same chapter, as ``(attention-no-scaling)=`` above the paragraph before the
code cell that proves our side. That the cell asserts is checked here; that
each label is there once, when the site is built.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from book import ASSERT, ROOT, BookError, Chapter, read_chapters

HEADING = "## Paper and code"
HEADER = "| | what it does | this book | proof |"
PROOF = re.compile(r"\[[^\]]+\]\(#([^()\s]+)\)")
# What follows a label: the next code cell, if no heading comes before it.
NEXT = re.compile(r"^(#+ .+|```\{code-cell\}.*?^```)$", re.MULTILINE | re.DOTALL)
PAGE = """\
# Paper and code

The paper describes T5 and leaves many details to the code. That code exists in several
versions, which differ from the paper, from one another, and here and there from this book.
This page collects every such difference that the chapters mention: **{count} rows**, from
the tables at their ends.

Each row says who, what they do, and what this book does. The link in the last column leads
to the paragraph whose code cell **asserts our side**: if it were false, the cell would fail,
and `make test` with it.

| who | that is |
|---|---|
| paper | Raffel et al. 2020 |
| mesh-tensorflow | the code that trained T5, with `t5` |
| t5 | the tasks, data and settings of that training |
| t5x | its successor in JAX |
| seqio | the data pipeline and vocabularies of `t5` and `t5x` |
| transformers | version 5.23, unless the row names another |
| superseded repository | the T5 that this book replaces |

"The same" means that this book does the same, where a reader might expect otherwise.
"""


def read_rows(chapter: Chapter) -> list[str]:
    """The rows of a chapter's table, with links that work on the page.

    Raises:
        BookError: if it has none, or if a row or its proof is not as it should be.
    """
    text = chapter.path.read_text("utf-8")
    section = text.partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    if lines[:1] != [HEADER] or len(lines) < 3:
        raise BookError(f"{chapter.path.name}: no table {HEADER!r} below {HEADING!r}")
    rows = []
    for line in lines[2:]:
        columns = [column.strip() for column in re.split(r"(?<!\\)\|", line)[1:-1]]
        proof = PROOF.fullmatch(columns[-1])
        if len(columns) != 4 or not proof:
            form = "four columns, the last a link such as [assert](#label)"
            raise BookError(f"{chapter.path.name}: a row has {form}; this is {line!r}")
        check_proof(chapter, text, proof[1])
        columns[3] = columns[3].replace("(#", f"({chapter.path.name}#")
        rows.append(f"| {' | '.join(columns)} |")
    return rows


def check_proof(chapter: Chapter, text: str, label: str) -> None:
    """Make sure that the code cell after a label asserts something."""
    _, found, after = text.partition(f"\n({label})=\n")
    if not found:
        raise BookError(f"{chapter.path.name} links to #{label} and has no such label")
    cell = NEXT.search(after)
    if not cell or cell[0].startswith("#"):
        raise BookError(f"{chapter.path.name}: no code cell follows ({label})=")
    if not ASSERT.search(cell[0]):
        raise BookError(f"{chapter.path.name}: the cell after ({label})= asserts nothing")


def write_page(chapters: list[Chapter]) -> str:
    """The text of the page.

    Raises:
        BookError: if anything is wrong, in whichever chapters.
    """
    count, parts, wrong = 0, [], []
    for chapter in chapters:
        if HEADING not in chapter.path.read_text("utf-8").splitlines():
            continue
        try:
            rows = read_rows(chapter)
        except BookError as error:
            wrong.append(str(error))
            continue
        count += len(rows)
        heading = f"\n## [{chapter.title}]({chapter.path.name})\n"
        parts += [heading, HEADER, "|---|---|---|---|", *rows]
    if wrong:
        raise BookError("\n".join(wrong))
    return "\n".join([PAGE.format(count=count).rstrip("\n"), *parts, ""])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    parser = argparse.ArgumentParser(description="Write the page of all that differs.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of the book")
    root = parser.parse_args(arguments).root
    path = root / "chapters" / "paper_and_code.md"
    try:
        path.write_text(write_page(read_chapters(root)), "utf-8")
    except BookError as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
