"""Let ``pytest --nbval`` take the chapters of the book as they are.

A chapter is a text file. Here its code cells become tests: each runs in a
kernel of this environment, and its text output is compared with the one
stored in ``tools/outputs`` (``python tools/run.py --store`` writes them).
With ``--nbval-lax`` the cells only have to run.
"""

import os
from collections import defaultdict
from pathlib import Path

import pytest
from nbval.plugin import (
    IPyNbCell,
    IPyNbFile,
    find_comment_markers,
    find_metadata_tags,
)

from runs import (
    code_of,
    digest,
    find_run,
    read_notebook,
    stored_outputs,
    text_outputs,
)
from source import NAME, BookError, read_chapter

# Workers that share the cores must not each start a thread for every core:
# the tests then take ten times as long. Chapters run with one thread, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    """Add the option by which unchanged chapters need not run again."""
    parser.getgroup("nbval").addoption(
        "--nbval-reuse",
        action="store_true",
        help="compare the outputs that tools/run.py kept, where the chapter "
        "and all that it depends on are unchanged, instead of running it",
    )


def pytest_configure(config):
    """Run the chapters in this environment, whatever kernels there are."""
    option = config.option
    if not option.nbval_kernel_name:
        option.nbval_current_env = True
    # nbval waits a minute; where the machine is busy, that is too short.
    option.nbval_kernel_startup_timeout = max(
        option.nbval_kernel_startup_timeout, 600
    )


def pytest_collect_file(file_path, parent):
    """Collect ``chapters/NN_name.md``."""
    option = parent.config.option
    chapter = file_path.parent.name == "chapters"
    if chapter and NAME.fullmatch(file_path.name):
        if option.nbval or option.nbval_lax:
            return ChapterFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session, config, items):
    """Check what was collected; with workers, that is done below."""
    if not session.testsfailed and not hasattr(config, "workerinput"):
        found = any(isinstance(item, ChapterCell) for item in items)
        demand_chapters(config, found)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    """Check what a worker of pytest-xdist has collected."""
    demand_chapters(node.config, any(".md::Cell " in name for name in ids))


def demand_chapters(config, found):
    """Asking for the chapters and finding none is an error."""
    option = config.option
    asked = option.nbval or option.nbval_lax
    if asked and not found and not getattr(option, "lf", False):
        raise pytest.UsageError("--nbval: no chapter was collected")


class ChapterFile(IPyNbFile):
    """A chapter: its code cells, with the outputs stored for them."""

    def collect(self):
        """Make a test of every code cell."""
        self.nb = read_notebook(self.path)
        cells = code_of(self.nb)
        self.add_stored_outputs(cells)
        for number, cell in enumerate(cells):
            options = defaultdict(bool, find_metadata_tags(cell.metadata))
            options.update(find_comment_markers(cell.source))
            options.setdefault("check", self.compare_outputs)
            yield ChapterCell.from_parent(
                self,
                name=f"Cell {number}",
                cell_num=number,
                cell=cell,
                options=options,
            )

    def add_stored_outputs(self, cells):
        """Give each cell its stored outputs; None where there are none."""
        try:
            stored = stored_outputs(self.path)
        except BookError as error:
            if self.compare_outputs:
                raise self.CollectError(str(error)) from None
            stored = {}
        for number, cell in enumerate(cells, start=1):
            outputs = stored.get(digest(cell.source))
            cell.outputs = outputs.pop(0) if outputs else []
            # nbval compares nothing where the count is missing.
            cell.execution_count = number
            cell.metadata["stored"] = outputs is not None

    def setup(self):
        """Start a kernel, unless the last run of the chapter will do."""
        self.run = None
        if self.config.option.nbval_reuse:
            self.run = find_run(read_chapter(self.path))
        if self.run is None:
            super().setup()


class ChapterCell(IPyNbCell):
    """A code cell of a chapter."""

    def runtest(self):
        """Run the cell, or take its last run, and compare its outputs."""
        if self.options["check"] and not self.cell.metadata["stored"]:
            self.raise_cell_error(
                "The cell has changed since its output was stored; look at "
                "what it prints, then run `python tools/run.py --store "
                f"{Path(self.path).stem}`"
            )
        if self.parent.run is None:
            self.output_timeout = 600  # nbval waits 5 s
            super().runtest()
        else:
            self.compare_last_run()
        kinds = [output.output_type for output in self.test_outputs]
        if self.options["check_exception"] and "error" not in kinds:
            self.raise_cell_error(
                "The cell must raise an error, and did not"
            )

    def compare_last_run(self):
        """Compare the outputs of the chapter's last run."""
        if self.options["skip"]:
            pytest.skip()
        last = code_of(self.parent.run)[self.cell_num]
        self.test_outputs = last.outputs
        same = self.compare_outputs(last.outputs, self.cell.outputs)
        if self.options["check"] and not same:
            trace = "\n".join(self.comparison_traceback)
            self.raise_cell_error("Cell outputs differ", trace)

    def compare_outputs(self, test, ref, skip_compare=None):
        """Compare text alone: no pictures, progress bars or warnings."""
        outputs = text_outputs(test), text_outputs(ref)
        return super().compare_outputs(*outputs, skip_compare)
