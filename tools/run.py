"""Run the chapters from their text and keep what they put out.

    python tools/run.py                 run every chapter that has changed
    python tools/run.py 6 07_relative_position     run these chapters
    python tools/run.py --store         also store text outputs, for tests
    python tools/run.py --jobs 1        one chapter at a time

A chapter runs again only if its code, an earlier module, a file beside it
or a pinned package changed. The site shows the outputs that are kept here.

Chapters run side by side, one a core, and start in their order. So the last
one, which trains for minutes with several threads, has the machine to
itself for most of its time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from jupyter_core.utils import run_sync
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
    run_key,
    store_outputs,
)
from source import CHAPTERS, BookError, Chapter, read_chapters

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOST_JOBS = 4  # by default; a chapter may need half a gigabyte


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    options = parse_arguments(arguments)
    # With several threads in each of several chapters, all become slow.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    try:
        chapters = read_chapters(options.folder)
        drop_orphans(chapters)
        chosen = choose(chapters, options.chapters)
        progress = Progress(chapters[-1].number)
        failures = run_sync(run_all)(chosen, progress, options)
    except BookError as error:
        failures = [str(error)]
    except KeyboardInterrupt:
        failures = ["stopped; the runs that had ended are kept"]
    for text in failures:
        print(f"run: {text}", file=sys.stderr)
    if not failures:
        seconds = time.perf_counter() - started
        print(f"All chapters ran ({seconds:.0f} s).")
    return int(bool(failures))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Run the chapters and keep what they put out."
    )
    jobs = min(usable_cores(), MOST_JOBS)
    add = parser.add_argument
    add("chapters", nargs="*", help="number or name; default: all")
    add("--store", action="store_true", help="store text outputs for tests")
    add("--again", action="store_true", help="run unchanged chapters, too")
    side = f"chapters side by side; default: one a core, here {jobs}"
    add("--jobs", type=int, default=jobs, metavar="N", help=side)
    add("--folder", type=Path, default=CHAPTERS, help="default: chapters/")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; pass 1 or more")
    return options


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


class Progress:
    """Show how far the chapters are.

    A line for each that ends and, on a terminal, one below them for those
    that run.
    """

    def __init__(self, last: int):
        self.last = last
        self.running: dict[str, str] = {}

    def show(self, name: str, done: str) -> None:
        """Say how much of a running chapter is done."""
        self.running[name] = done
        if sys.stdout.isatty():
            texts = [
                f"{name} {done}" for name, done in self.running.items()
            ]
            print(f"\r\x1b[K{', '.join(texts)}", end="", flush=True)

    def end(self, chapter: Chapter, result: str) -> None:
        """Say how a chapter ended."""
        self.running.pop(chapter.path.stem, None)
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        line = f"[{chapter.number:2}/{self.last}] {chapter.path.stem:22}"
        print(f"{clear}{line} {result}", flush=True)


async def run_all(
    chapters: list[Chapter], progress: Progress, options: argparse.Namespace
) -> list[str]:
    """Run chapters side by side.

    Everything but the kernels is in this one thread, so that two chapters
    never write to the cache at once. A failure stops no other chapter.

    Returns:
        What went wrong, a text for each chapter that failed.
    """
    free = asyncio.Semaphore(options.jobs)
    results = await asyncio.gather(
        *(run(chapter, free, progress, options) for chapter in chapters)
    )
    return [text for text in results if text]


async def run(
    chapter: Chapter,
    free: asyncio.Semaphore,
    progress: Progress,
    options: argparse.Namespace,
) -> str:
    """Run a chapter unless its last run counts; return what went wrong."""
    notebook = None if options.again else find_run(chapter)
    result = "unchanged"
    if notebook is None:
        async with free:
            started, key = time.perf_counter(), run_key(chapter)
            try:
                notebook = await execute(chapter, progress)
            except BookError as error:
                progress.end(chapter, "failed")
                return str(error)
            seconds = time.perf_counter() - started
        keep_run(chapter, notebook, key, seconds)
        result = f"{seconds:6.1f} s"
    if options.store and store_outputs(chapter.path, notebook):
        result += ", new outputs stored"
    progress.end(chapter, result)
    return ""


async def execute(chapter: Chapter, progress: Progress) -> NotebookNode:
    """Run a chapter in a fresh kernel, in its own folder."""
    notebook = read_notebook(chapter.path)
    count = len(code_of(notebook))
    cells = iter(range(1, count + 1))

    def report(cell, **_):
        if cell.cell_type == "code":
            progress.show(chapter.path.stem, f"{next(cells)}/{count}")

    client = NotebookClient(
        notebook,
        timeout=None,
        # nbclient waits a minute for a kernel, and 4 s for its outputs, and
        # then goes on without them: too short where the machine is busy.
        startup_timeout=600,
        iopub_timeout=600,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(chapter.path.parent)}},
        on_notebook_start=let_control_c_stop_all,
        on_cell_start=report,
    )
    try:
        return await client.async_execute()
    except (CellExecutionError, DeadKernelError) as error:
        raise BookError(failure(chapter, notebook, error)) from None


def let_control_c_stop_all(notebook: NotebookNode) -> None:
    """Undo nbclient's way with signals, which stops one kernel only."""
    loop = asyncio.get_running_loop()
    with suppress(RuntimeError):  # there is none on Windows
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)


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
