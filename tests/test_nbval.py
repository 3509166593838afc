"""``pytest --nbval`` on the chapters: it collects them, and it bites."""

import json
import re
import shutil
from types import SimpleNamespace

import nbformat
import pytest
from jupytext.cli import jupytext
from small_book import ROOT, cell, export, make_book

from export import main as export_book
from run import main as run_book
from runs import (
    code_of,
    digest,
    read_notebook,
    stored_outputs,
    stored_path,
    text_outputs,
)
from source import read_chapters
from tidy import tidy

pytest_plugins = ["pytester"]
CHAPTERS = read_chapters()
MODULE = export('"""A module."""') + export("def one():\n    return 1")
FIRST = [
    "01_one.md",
    MODULE,
    cell("print('one')\nprint(one())"),
    cell("import sys\n\nprint('never the same', file=sys.stderr)\n'two'"),
    cell(
        "figure = {'image/png': 'aGk=', 'text/plain': '<Figure>'}\n"
        "display(figure, raw=True)"
    ),
    cell("raise ValueError('wanted')", "raises-exception"),
]
SECOND = ["02_two.md", cell("from t5_book.one import one\n\nprint(one())")]


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A book whose chapters ran, with their outputs stored."""
    book = make_book(tmp_path_factory.mktemp("book"), FIRST, SECOND)
    folder, package = book / "chapters", book / "t5_book"
    places = [f"--chapters={folder}", f"--package={package}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(book))
        assert export_book(places) == 0
        assert run_book([f"--folder={folder}", "--store"]) == 0
    return book


@pytest.fixture
def book(ready, pytester, monkeypatch):
    """A copy of that book, for a test to change."""
    shutil.copytree(ready, pytester.path, dirs_exist_ok=True)
    for variable in ("CI", "BUILD_NUMBER"):
        # Where either is set, pytest's summary repeats each failure whole.
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))
    return pytester


def pytest_on(book, *arguments):
    """Run pytest on the book; its outcomes, exit code and report."""
    # Without this, pytest would load hypothesis anew each time: seconds.
    quick = "-pno:hypothesispytest"
    done = book.runpytest_inprocess(*arguments, "-ra", quick)
    report = str(done.stdout) + str(done.stderr)
    return done.parseoutcomes(), done.ret, report


def nbval(book, *arguments):
    """Run ``pytest --nbval`` on the book."""
    return pytest_on(book, "--nbval", *arguments)


def failed_cells(report):
    """The cells that failed, by the summary at the report's end."""
    pattern = r"FAILED chapters/(\d\d)_\w+.md::Cell (\d)"
    return {(int(c), int(n)) for c, n in re.findall(pattern, report)}


def replace(path, old, new):
    """Replace a text in a file."""
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_every_chapter_is_collected_by_itself(book):
    counts, code, report = nbval(book)
    assert (counts, code) == ({"passed": 7}, 0), report


def test_each_change_fails_its_own_cell(book):
    first = book.path / "chapters/01_one.md"
    stored = book.path / "tools/outputs/01_one.ipynb"
    replace(stored, '"1\\n"', '"2\\n"')  # what cell 2 prints
    replace(stored, "'two'", "'three'")  # the result of cell 3
    replace(first, "<Figure>", "<Picture>")  # the code of cell 4
    counts, code, report = nbval(book, str(first))
    assert (counts, code) == ({"failed": 3, "passed": 3}, 1), report
    assert failed_cells(report) == {(1, 2), (1, 3), (1, 4)}
    assert report.count("Cell outputs differ") == 2
    assert "The cell has changed since its output was stored" in report


def test_a_changed_package_fails(book):
    replace(book.path / "t5_book/one.py", "return 1", "return 2")
    counts, _, report = nbval(book, "--nbval-reuse", "chapters/02_two.md")
    assert counts == {"failed": 1}, report


def test_a_missing_stored_output_fails(book):
    (book.path / "tools/outputs/01_one.ipynb").unlink()
    counts, code, report = nbval(book, "--nbval-reuse")
    assert (counts, code) == ({"passed": 1, "errors": 1}, 1), report
    assert "01_one.md has no stored outputs" in report


def test_collecting_nothing_fails(book):
    counts, code, report = nbval(book, "tests")
    assert code != 0 and "no chapter was collected" in report


def test_a_worker_that_collects_nothing_fails(pytestconfig):
    """The hook of pytest-xdist runs in the process that starts workers."""
    plugin = pytestconfig.pluginmanager.get_plugin(
        str(ROOT / "conftest.py")
    )
    finished = plugin.pytest_xdist_node_collection_finished
    option = SimpleNamespace(nbval=True, nbval_lax=False)
    node = SimpleNamespace(config=SimpleNamespace(option=option))
    finished(node, ["tests/test_a.py::test_b", "chapters/01_a.md::Cell 0"])
    with pytest.raises(pytest.UsageError, match="no chapter was collected"):
        finished(node, ["tests/test_a.py::test_b"])
    option.nbval = False
    finished(node, ["tests/test_a.py::test_b"])


def test_without_the_option_chapters_are_no_tests(book):
    code = pytest_on(book, "chapters")[1]
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED


def test_one_chapter_by_its_path(book):
    one = nbval(book, "--nbval-reuse", "chapters/02_two.md")
    assert one[:2] == ({"passed": 1}, 0)


def test_lax_runs_the_cells_and_compares_nothing(book):
    replace(book.path / "tools/outputs/01_one.ipynb", '"1\\n"', '"2\\n"')
    (book.path / "tools/outputs/02_two.ipynb").unlink()
    first, second = "chapters/01_one.md", "chapters/02_two.md"
    replace(book.path / first, "raise ValueError", "ValueError")
    replace(book.path / second, "print(one())", "print(two())")
    counts, code, report = pytest_on(book, "--nbval-lax")
    assert (counts, code) == ({"failed": 2, "passed": 5}, 1), report
    assert failed_cells(report) == {(1, 5), (2, 0)}
    assert "must raise an error, and did not" in report
    assert "name 'two' is not defined" in report


def test_a_run_is_used_again_and_still_compared(book):
    replace(book.path / "tools/outputs/02_two.ipynb", '"1\\n"', '"2\\n"')
    counts, code, report = nbval(book, "--nbval-reuse")
    assert (counts, code) == ({"failed": 1, "passed": 6}, 1), report


def test_several_workers_share_the_chapters(book):
    """As ``make test`` does: each chapter's cells stay together."""
    replace(book.path / "tools/outputs/02_two.ipynb", '"1\\n"', '"2\\n"')
    several = "--nbval-reuse", "-n2", "--dist=loadfile"
    counts, code, report = nbval(book, *several)
    assert (counts, code) == ({"failed": 1, "passed": 6}, 1), report
    assert failed_cells(report) == {(2, 0)}


def test_stored_outputs_are_text_alone(book):
    text = (book.path / "tools/outputs/01_one.ipynb").read_text("utf-8")
    assert "image/png" not in text and "never the same" not in text
    assert "<Figure>" in text and str(book.path) not in text


def test_it_does_not_matter_in_how_many_pieces_a_text_came():
    def stream(text):
        return nbformat.v4.new_output("stream", name="stdout", text=text)

    pieces = [stream("one\n"), stream("two\n")]
    assert text_outputs(pieces) == [stream("one\ntwo\n")]
    assert pieces == [stream("one\n"), stream("two\n")]


# --- Our chapters ---------------------------------------------------------


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.path.stem)
def test_outputs_of_every_cell_are_stored(chapter):
    cells = code_of(read_notebook(chapter.path))
    stored = stored_outputs(chapter.path)
    assert {digest(cell.source) for cell in cells} == set(stored)


def test_no_outputs_are_stored_for_a_chapter_that_is_gone():
    known = {stored_path(chapter.path) for chapter in CHAPTERS}
    assert set((ROOT / "tools" / "outputs").glob("*.ipynb")) == known


def test_stored_outputs_have_a_count():
    """Without one nbval compares nothing."""
    for chapter in CHAPTERS:
        notebook = json.loads(stored_path(chapter.path).read_text("utf-8"))
        counts = [cell["execution_count"] for cell in notebook["cells"]]
        assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.path.stem)
def test_jupytext_makes_a_notebook(chapter, tmp_path):
    target = tmp_path / "chapter.ipynb"
    jupytext(["--to=ipynb", f"--output={target}", str(chapter.path)])
    made = code_of(nbformat.read(target, as_version=4))
    ours = code_of(read_notebook(chapter.path))
    assert [cell.source for cell in made] == [cell.source for cell in ours]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.path.stem)
def test_jupyterlab_saves_it_without_a_diff(chapter):
    text = chapter.path.read_text("utf-8")
    assert tidy(text) == text, "run `python tools/tidy.py`"
