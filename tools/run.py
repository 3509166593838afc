"""Run the chapters and keep what they put out.

    python tools/run.py                 run every chapter that has changed
    python tools/run.py attention t5    of these, what has changed
    python tools/run.py --store         store printed text, for the tests
    python tools/run.py --jobs 1        one chapter at a time

A chapter runs again if its code, a module of an earlier chapter, a file beside
it, a pinned package or Python has changed. Runs are kept in
``_build/.jupyter_cache``, where Jupyter Book finds them and so runs nothing.

Chapters run side by side, one a core, and start in their order. So the last
one, which trains for minutes, has the machine to itself for most of its time.
"""

from __future__ import annotations

import signal
import sys

STOPPED = "run: stopped; the runs that had ended are kept"
if __name__ == "__main__":  # what is imported below takes seconds
    signal.signal(signal.SIGINT, lambda *_: sys.exit(STOPPED))

import argparse
import asyncio
import hashlib
import html
import os
import re
import shutil
import time
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from book import ROOT, BookError, Chapter, code_of, read_chapters, read_notebook
from outputs import store

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What tqdm writes beside its bar: 350/1000 [01:10<02:10, 5.00it/s, loss=1.2]
BAR = re.compile(r"(\d+/\d+) \[.*<(.+?), [^,]+?(, .+)?\]")
MOST_JOBS = 4  # by default; a chapter may need half a gigabyte
EVERY = 20  # seconds between two lines of progress, where there is no terminal


class Runs:
    """The runs of the chapters that are kept, each with a fingerprint.

    Where nothing can be written, they are kept until the command ends.
    """

    def __init__(self, chapters: list[Chapter]) -> None:
        self.chapters = {chapter.name: chapter for chapter in chapters}
        self.root = chapters[0].path.parent.parent
        folder = self.root / "_build" / ".jupyter_cache"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            pass  # said below
        if not os.access(folder, os.W_OK):
            print(f"run: {folder} can't be written, so no run is kept", file=sys.stderr)
            self.folder = TemporaryDirectory()
            folder = Path(self.folder.name, "cache")
        self.cache = get_cache(str(folder))
        self.pages = folder.parent / ".doctrees" / "chapters"

    def fingerprint(self, name: str) -> str:
        """A hash of all that a run depends on, but for the chapter's cells.

        These are the modules of earlier chapters (a chapter imports no others),
        the files beside it, the pinned packages and Python itself.
        """
        chapter = self.chapters[name]
        earlier = list(self.chapters.values())[: chapter.number - 1]
        modules = {cell.module for c in earlier for cell in c.cells if cell.module}
        files = [self.root / "t5_book" / f"{module}.py" for module in modules]
        files += [p for p in chapter.path.parent.iterdir() if p.suffix != ".md"]
        digest = hashlib.sha256(sys.version.encode())
        for path in sorted([*files, self.root / "requirements.txt"]):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def find(self, name: str) -> NotebookNode | None:
        """The last run of a chapter, if nothing has changed since."""
        notebook = read_notebook(self.chapters[name].path)
        try:
            record = self.cache.match_cache_notebook(notebook)
            if record.data.get("key") == self.fingerprint(name):
                return self.cache.merge_match_into_notebook(notebook)[1]
        except KeyError:
            pass  # no run with these cells, or its file is lost
        return None

    def keep(self, name: str, notebook: NotebookNode, key: str, seconds: float) -> None:
        """Keep a run; ``key`` is the fingerprint from before it began."""
        data = {"key": key, "execution_seconds": seconds}
        bundle = CacheBundleIn(notebook, f"chapters/{name}.md", data=data)
        self.cache.cache_notebook_bundle(bundle, overwrite=True)
        # Sphinx reads a page anew only if its text changed or this is missing.
        (self.pages / f"{name}.doctree").unlink(missing_ok=True)


class Client(NotebookClient):
    """Runs a notebook, reports how far it is, and leaves Ctrl-C alone."""

    place = -1  # of the code cell that runs, among the code cells

    @asynccontextmanager
    async def async_setup_kernel(self, **options):
        """Start a kernel and stop it (nbclient's own way catches Ctrl-C)."""
        self.create_kernel_manager()
        # Asked to stop while it starts, a kernel would print a traceback.
        self.shutdown_kernel = "immediate"
        try:
            await self.async_start_new_kernel(**options)
            await self.async_start_new_kernel_client()
            self.shutdown_kernel = "graceful"
            yield
        finally:
            if self.km is not None:
                await self._async_cleanup_kernel()

    async def async_execute_cell(self, cell, cell_index, **options):
        """Run a cell, and say which it is."""
        if cell.cell_type == "code":
            self.place += 1
            self.done = f"cell {self.place + 1}/{len(code_of(self.nb))}"
            self.report(self.done)
        return await super().async_execute_cell(cell, cell_index, **options)

    def process_message(self, msg, cell, cell_index):
        """Find the texts of progress bars in what a kernel sends."""
        state = msg["content"].get("data", {}).get("state", {})
        bar = BAR.match(" ".join(html.unescape(str(state.get("value"))).split()))
        if bar:
            self.report(f"{self.done}: step {bar[1]}{bar[3] or ''}, {bar[2]} left")
        return super().process_message(msg, cell, cell_index)


class Progress:
    """Says how far the chapters are.

    A line for each that ends. On a terminal there is one more below them for
    those that run; elsewhere such a line is written now and then.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.running: dict[str, str] = {}
        self.next_line = time.monotonic() + EVERY

    def show(self, name: str, done: str) -> None:
        """Say how much of a running chapter is done."""
        self.running[name] = done
        line = "   ".join(f"{name} {done}" for name, done in self.running.items())
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", flush=True)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + EVERY
            print(f"        {line}", flush=True)

    def end(self, chapter: Chapter, result: str) -> None:
        """Say how a chapter ended."""
        self.running.pop(chapter.name, None)
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        place = f"[{chapter.number:2}/{self.last}]"
        print(f"{clear}{place} {chapter.name:18} {result}", flush=True)


async def execute(chapter: Chapter, report) -> NotebookNode:
    """Run a chapter in a fresh kernel, in its own folder."""
    notebook = read_notebook(chapter.path)
    client = Client(
        notebook,
        timeout=None,
        # nbclient waits a minute for a kernel, and 4 s for its outputs, and
        # then goes on without them: too short where the machine is busy.
        startup_timeout=600,
        iopub_timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        resources={"metadata": {"path": str(chapter.path.parent)}},
    )
    client.report = report
    try:
        return await client.async_execute()
    except CellExecutionError as error:
        trace = error.traceback if sys.stderr.isatty() else COLOUR.sub("", error.traceback)
        raise BookError(f"{chapter.cells[client.place].where()}\n{trace}") from None
    except RuntimeError as error:
        if asyncio.current_task().cancelling():
            raise asyncio.CancelledError from None  # which nbclient takes for a death
        where = chapter.cells[max(client.place, 0)].where()
        raise BookError(f"{where}: {error}; is there enough memory?") from None


async def run_all(
    chapters: list[Chapter], chosen: list[Chapter], options: argparse.Namespace
) -> list[str]:
    """Run chapters side by side; a failure stops no other chapter.

    Returns:
        What went wrong, a text for each chapter that failed.
    """
    free, runs = asyncio.Semaphore(max(1, options.jobs)), Runs(chapters)
    progress, wrong = Progress(len(chapters)), []

    async def run(chapter: Chapter) -> None:
        async with free:
            notebook, result = runs.find(chapter.name), "unchanged"
            if notebook is None:
                # What changes while a chapter runs is too late for it.
                key, started = runs.fingerprint(chapter.name), time.perf_counter()
                try:
                    report = partial(progress.show, chapter.name)
                    notebook = await execute(chapter, report)
                except BookError as error:
                    wrong.append(str(error))
                    progress.end(chapter, "failed")
                    return
                seconds = time.perf_counter() - started
                runs.keep(chapter.name, notebook, key, seconds)
                result = f"{seconds:6.1f} s"
            if options.store:
                store(chapter.path, notebook)
            progress.end(chapter, result)

    await asyncio.gather(*(run(chapter) for chapter in chosen))
    return wrong


def choose(chapters: list[Chapter], names: list[str]) -> list[Chapter]:
    """The chapters of these names or paths; all, if there is none."""
    known = {chapter.name: chapter for chapter in chapters}
    unknown = [name for name in names if Path(name).stem not in known]
    if unknown:
        raise BookError(f"no chapter is called {', '.join(unknown)}")
    return [known[Path(name).stem] for name in names] or chapters


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description="Run the chapters and keep what they put out.")
    parser.add_argument("chapters", nargs="*", help="names, such as attention; default: all")
    parser.add_argument("--store", action="store_true", help="store printed text for tests")
    parser.add_argument("--jobs", type=int, default=min(cores, MOST_JOBS), metavar="N",
                        help="chapters side by side; default: %(default)s")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of the book")
    options = parser.parse_args(arguments)
    # With several threads in each of several chapters, all become slow.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    try:
        chapters = read_chapters(options.root)
        chosen = choose(chapters, options.chapters)
        # zmq needs this loop on Windows, too.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            wrong = runner.run(run_all(chapters, chosen, options))
    except KeyboardInterrupt:
        sys.exit(f"\n{STOPPED}")
    except (BookError, OSError) as error:
        wrong = [str(error)]
    for text in wrong:
        print(f"run: {text}", file=sys.stderr)
    if not wrong:
        print(f"All chapters ran ({time.perf_counter() - started:.0f} s).")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
