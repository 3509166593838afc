"""``pytest --nbval`` on the chapters: it collects them, and it bites."""

import re
import shutil
from types import SimpleNamespace

import pytest
from jupytext.cli import jupytext

from book import chapter_paths, code_of, read_notebook
from export import main as export_book
from outputs import cell_key, is_compared, stored_texts
from run import main as run_book
from tests.small_book import ROOT, cell, export, make_book, replace

pytest_plugins = ["pytester"]
FIRST = [
    export('"""A module."""\n__all__ = []\n\n\ndef one():\n    # Why.\n    return 1'),
    cell("# Compared.\nprint(one())\nprint(one(), end='', flush=True)\nprint()"),
    cell("import sys\n\nprint('never the same', file=sys.stderr)\n'two'"),
    cell("assert one() == 1\nprint(one(), 'with an assert')"),
    cell("print('of this moment')", "nbval-ignore-output"),
    cell("raise ValueError('wanted')", "raises-exception"),
]
SECOND = [cell("from t5_book.first import one\n\nprint(one())")]
ALL = len(FIRST) + len(SECOND)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A book whose chapters ran, with their texts stored."""
    book = make_book(tmp_path_factory.mktemp("book"), first=FIRST, second=SECOND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(book))
        assert export_book([f"--root={book}"]) == 0
        assert run_book([f"--root={book}", "--store"]) == 0
    return book


@pytest.fixture
def nbval(ready, pytester, monkeypatch):
    """Run pytest on a copy of that book: outcomes, cells that failed, report."""
    shutil.copytree(ready, pytester.path, dirs_exist_ok=True)
    for variable in ("CI", "BUILD_NUMBER"):
        # Where either is set, pytest's summary repeats each failure whole.
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))

    def run(*arguments):
        # Without hypothesis, which pytest would load anew each time: seconds.
        done = pytester.runpytest_inprocess(*arguments, "-ra", "-pno:hypothesispytest")
        report = str(done.stdout) + str(done.stderr)
        failed = re.findall(r"FAILED chapters/(\w+).md::Cell (\d)", report)
        return done.parseoutcomes(), [name + cell for name, cell in failed], report

    run.path = pytester.path
    return run


def test_what_is_stored(ready):
    texts = (ready / "tests/outputs/first.txt").read_text("utf-8")
    found = re.sub(r"(?m)^== \w{12} ", "== ", texts)
    assert found == (
        "== print()\n1\n1\n\n== 'two'\n'two'\n\n"
        "== raise ValueError('wanted')\nValueError: wanted\n"
    )


def test_every_chapter_is_run(nbval):
    first = nbval.path / "chapters/first.md"
    replace(first, "# Why.", "# Another comment, in an exported cell.")
    replace(first, "# Compared.", "# Another comment.")
    counts, _, report = nbval("--nbval")
    assert counts == {"passed": ALL}, report


def test_each_change_fails_its_own_cell(nbval):
    first = nbval.path / "chapters/first.md"
    stored = nbval.path / "tests/outputs/first.txt"
    replace(stored, "1\n1\n", "1\n2\n")
    replace(first, "'two'", "'three'")  # not what is stored, and not stored
    replace(first, "raise ValueError", "ValueError")
    replace(first, "of this moment", "of another")
    replace(nbval.path / "chapters/second.md", "one())", "two())")
    failed = ["first1", "first2", "first5", "second0"]
    counts, cells, report = nbval("--nbval")
    assert cells == failed and counts["passed"] == ALL - 4, report
    assert "-2\n+1" in report and "name 'two' is not defined" in report
    # Lax compares nothing, but the cells run and what must raise must.
    counts, cells, report = nbval("--nbval-lax")
    assert cells == failed[2:] and counts["passed"] == ALL - 2, report


def test_a_run_is_used_again_if_nothing_changed(nbval):
    """With workers, as in ``make test``."""
    several = "--nbval", "--nbval-reuse", "-n2", "--dist=loadfile"
    replace(nbval.path / "tests/outputs/first.txt", "1\n1\n", "1\n2\n")
    # The kept run of this chapter does not count any longer.
    replace(nbval.path / "t5_book/first.py", "return 1", "return 2")
    counts, cells, report = nbval(*several)
    assert cells == ["first1", "second0"] and counts["passed"] == ALL - 2, report


def test_collecting_nothing_fails(nbval):
    assert "no chapter was collected" in nbval("--nbval", "tests")[2]
    # Without the option, chapters are no tests.
    assert nbval("chapters")[0] == {}


def test_a_worker_that_collects_nothing_fails(pytestconfig):
    """The hook of pytest-xdist runs in the process that starts workers."""
    plugin = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    finished = plugin.pytest_xdist_node_collection_finished
    option = SimpleNamespace(nbval=True, nbval_lax=False)
    node = SimpleNamespace(config=SimpleNamespace(option=option))
    finished(node, ["tests/test_a.py::test_b", "chapters/a.md::Cell 0"])
    with pytest.raises(pytest.UsageError, match="no chapter"):
        finished(node, ["tests/test_a.py::test_b"])
    option.nbval = False
    finished(node, ["tests/test_a.py::test_b"])


# --- Our chapters ---------------------------------------------------------


def test_every_stored_text_belongs_to_a_cell():
    names = {path.stem for path in chapter_paths()}
    for path in (ROOT / "tests" / "outputs").glob("*"):
        assert path.stem in names
        chapter = ROOT / "chapters" / f"{path.stem}.md"
        cells = [cell for cell in code_of(read_notebook(chapter)) if is_compared(cell)]
        stale = stored_texts(chapter).keys() - {cell_key(cell) for cell in cells}
        assert not stale, f"run `python tools/run.py --store {path.stem}`"


def test_jupyterlab_saves_chapters_without_a_diff(tmp_path):
    """It lays out a cell's options in its own way; ``make tidy`` does the same."""
    folder = tmp_path / "chapters"
    shutil.copytree(ROOT / "chapters", folder)
    names = [path.name for path in chapter_paths()]
    jupytext(["--quiet", "--to=md:myst", *(str(folder / name) for name in names)])
    for name in names:
        text = (ROOT / "chapters" / name).read_text("utf-8")
        assert (folder / name).read_text("utf-8") == text, "run `make tidy`"
