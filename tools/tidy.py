"""Write the chapters the way JupyterLab saves them, so that it leaves no diff.

    python tools/tidy.py            rewrite what differs
    python tools/tidy.py --check    name what differs, exit 1

JupyterLab (by jupytext) lays out the options of a cell in its own way, such
as the lines of a figure's alt text. Prose and code stay as they are.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import jupytext

from source import CHAPTERS, read_chapters

VERSIONS = re.compile(r" +(format|jupytext)_version: .*\n")


def tidy(text: str) -> str:
    """The text of a chapter as JupyterLab saves it."""
    notebook = jupytext.reads(text, fmt="md:myst")
    header, fence, rest = jupytext.writes(notebook, "md:myst").partition(
        "kernelspec:"
    )
    return VERSIONS.sub("", header) + fence + rest


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    parser = argparse.ArgumentParser(
        description="Write the chapters the way JupyterLab saves them."
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing"
    )
    parser.add_argument("--folder", type=Path, default=CHAPTERS)
    options = parser.parse_args(arguments)
    different = 0
    for chapter in read_chapters(options.folder):
        text = chapter.path.read_text(encoding="utf-8")
        if tidy(text) != text:
            different += 1
            print(chapter.path.name)
            if not options.check:
                chapter.path.write_text(tidy(text), encoding="utf-8")
    return int(options.check and different > 0)


if __name__ == "__main__":
    sys.exit(main())
