"""Run the chapters from their text and keep what they put out.

    python tools/run.py                 run every chapter that has changed
    python tools/run.py 6 07_relative_position     run these chapters
    python tools/run.py --store         also store text outputs, for tests

A chapter runs again only if its code, an earlier module, a file beside it
or a pinned package changed. The site shows the outputs that are kept here.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from runs import (
    code_of,
    drop_runs,
    find_run,
    keep_run,
    open_cache,
    read_notebook,
    store_outputs,
)
from source import CHAPTERS, BookError, Chapter, read_chapters

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    options = parse_arguments(arguments)
    started = time.perf_counter()
    try:
        chapters = read_chapters(options.folder)
        drop_orphans(chapters)
        for chapter in choose(chapters, options.chapters):
            notebook = run_or_find(chapter, chapters[-1].number, options.again)
            if options.store and store_outputs(chapter.path, notebook):
                print(f"        stored the outputs of {chapter.path.stem}")
    except BookError as error:
        print(f"run: {error}", file=sys.stderr)
        return 1
    print(f"All chapters ran ({time.perf_counter() - started:.0f} s).")
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Run the chapters and keep what they put out."
    )
    add = parser.add_argument
    add("chapters", nargs="*", help="number or name; default: all")
    add("--store", action="store_true", help="store text outputs for tests")
    add("--again", action="store_true", help="run unchanged chapters, too")
    add("--folder", type=Path, default=CHAPTERS, help="default: chapters/")
    return parser.parse_args(arguments)


def choose(chapters: list[Chapter], wanted: list[str]) -> list[Chapter]:
    """The chapters that were asked for by number, name or path."""
    if not wanted:
        return chapters
    found = {}
    for chapter in chapters:
        names = (
            str(chapter.number),
            f"{chapter.number:02}",
            chapter.module,
        )
        found |= dict.fromkeys((*names, chapter.path.stem), chapter)
    unknown = [name for name in wanted if Path(name).stem not in found]
    if unknown:
        raise BookError(f"no chapter is called {', '.join(unknown)}")
    return [found[Path(name).stem] for name in wanted]


def drop_orphans(chapters: list[Chapter]) -> None:
    """Forget the runs of chapters that are gone."""
    known = {f"{c.path.parent.name}/{c.path.name}" for c in chapters}
    cache = open_cache(chapters[0].path.parent.parent)
    drop_runs(cache, lambda uri: uri not in known)


def run_or_find(chapter: Chapter, last: int, again: bool) -> NotebookNode:
    """The chapter with its outputs, from its last run where that counts."""
    line = f"[{chapter.number:2}/{last}] {chapter.path.stem:22}"
    print(line, end=" ", flush=True)
    notebook = None if again else find_run(chapter)
    if notebook is not None:
        print("unchanged")
        return notebook
    started = time.perf_counter()
    notebook = execute(chapter, line)
    seconds = time.perf_counter() - started
    keep_run(chapter, notebook, seconds)
    print(f"{seconds:6.1f} s")
    return notebook


def execute(chapter: Chapter, line: str) -> NotebookNode:
    """Run a chapter in a fresh kernel, in its own folder."""
    notebook = read_notebook(chapter.path)
    count = len(code_of(notebook))
    done = 0

    def report(cell, cell_index, **_):
        nonlocal done
        done += cell.cell_type == "code"
        if sys.stdout.isatty():
            print(f"\r{line} cell {done}/{count}", end="\r", flush=True)
            print(line, end=" ", flush=True)

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(chapter.path.parent)}},
        on_cell_start=report,
    )
    try:
        return client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        print("failed")
        raise BookError(failure(chapter, notebook, error)) from None


def failure(chapter: Chapter, notebook: NotebookNode, error) -> str:
    """Say which cell failed, where, and how."""
    for cell, code in zip(chapter.cells, code_of(notebook), strict=True):
        for output in code.get("outputs", ()):
            if output.output_type == "error":
                trace = "\n".join(output.traceback)
                if not sys.stderr.isatty():
                    trace = COLOUR.sub("", trace)
                return f"{cell.where()}: cell {cell.index + 1}\n{trace}"
    return f"{chapter.path.name}: {error}"


if __name__ == "__main__":
    sys.exit(main())
