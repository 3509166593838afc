"""Let ``pytest --nbval`` take the chapters of the book as they are.

A chapter is a text file. Here each of its code cells becomes a test: it runs
in a kernel of this environment. What a cell without an assert prints is
compared with ``tests/outputs``, unless the option is ``--nbval-lax``.
"""

import difflib
import functools
import os
from collections import defaultdict

import pytest
from nbval.plugin import IPyNbCell, IPyNbFile, find_metadata_tags

from book import chapter_paths, code_of, read_chapters, read_notebook
from outputs import cell_key, is_compared, printed, stored_texts

# Workers that share the cores must not each start a thread for every core:
# the tests then take ten times as long. Chapters run with one thread, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    """Add the option by which unchanged chapters need not run again."""
    parser.getgroup("nbval").addoption(
        "--nbval-reuse",
        action="store_true",
        help="compare the runs that tools/run.py kept, where nothing has changed since",
    )


def pytest_configure(config):
    """Run the chapters in this environment, whatever kernels there are."""
    config.option.nbval_current_env = True
    # nbval waits a minute for a kernel; where the machine is busy, that is too short.
    config.option.nbval_kernel_startup_timeout = 600


def pytest_collect_file(file_path, parent):
    """Collect the chapters that ``_toc.yml`` names."""
    option, root = parent.config.option, parent.config.rootpath
    if (option.nbval or option.nbval_lax) and file_path.suffix == ".md":
        if file_path in chapter_paths(root):
            return ChapterFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session, config, items):
    """Check what was collected; with workers, that is done below."""
    if not session.testsfailed and not hasattr(config, "workerinput"):
        demand_chapters(config, [item.nodeid for item in items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    """Check what a worker of pytest-xdist has collected."""
    demand_chapters(node.config, ids)


def demand_chapters(config, ids):
    """Asking for the chapters and finding none is an error."""
    option = config.option
    found = any(".md::Cell " in name for name in ids)
    if (option.nbval or option.nbval_lax) and not found and not getattr(option, "lf", False):
        raise pytest.UsageError("--nbval: no chapter was collected")


@functools.cache
def kept_runs(root):
    """The runs that tools/run.py kept; to import it takes a second."""
    from run import Runs

    return Runs(read_chapters(root))


class ChapterFile(IPyNbFile):
    """A chapter, and its kernel."""

    run = None  # the cells of its last run, where they will do

    def collect(self):
        """Make a test of every code cell."""
        self.nb = read_notebook(self.path)
        stored = stored_texts(self.path)
        for number, cell in enumerate(code_of(self.nb)):
            options = defaultdict(bool, find_metadata_tags(cell.metadata))
            options["check"] = self.compare_outputs and is_compared(cell)
            cell.execution_count = number + 1  # without it nbval compares nothing
            test = ChapterCell.from_parent(
                self, name=f"Cell {number}", cell_num=number, cell=cell, options=options
            )
            test.stored = stored.get(cell_key(cell), "")
            yield test

    def setup(self):
        """Start a kernel, unless the last run of the chapter will do."""
        if self.config.option.nbval_reuse:
            notebook = kept_runs(self.config.rootpath).find(self.path.stem)
            self.run = notebook and code_of(notebook)
        if not self.run:
            super().setup()


class ChapterCell(IPyNbCell):
    """A code cell of a chapter."""

    def runtest(self):
        """Run the cell, or take its last run, and compare its text."""
        if not self.parent.run:
            self.output_timeout = 600  # nbval waits 5 s
            super().runtest()
        elif self.options["skip"]:
            pytest.skip()
        else:
            self.test_outputs = self.parent.run[self.cell_num].outputs
            if self.options["check"] and not self.compare_outputs(self.test_outputs, []):
                self.raise_cell_error("Cell outputs differ", "\n".join(self.comparison_traceback))
        raised = any(output.output_type == "error" for output in self.test_outputs)
        if self.options["check_exception"] and not raised:
            self.raise_cell_error("The cell must raise an error, and did not")

    def compare_outputs(self, test, ref, skip_compare=None):
        """Compare what the cell printed with what is stored for it."""
        texts = self.stored.splitlines(), printed(test).splitlines()
        diff = difflib.unified_diff(*texts, "stored", "printed", lineterm="")
        hint = f"(python tools/run.py --store {self.path.stem} stores what is right)"
        self.comparison_traceback = [*diff, hint]
        return texts[0] == texts[1]
