"""The runner: what has changed runs, side by side, and failures show."""

import os
import re

import pytest
from small_book import cell, export, make_book

from export import main as export_book
from run import main as run_book
from run import usable_cores
from runs import stored_path

MODULE = export('"""A module."""') + export("def one():\n    return 1")
USE = cell("from t5_book.one import one\n\nprint(one())")
MEET = """
import time
from pathlib import Path

Path("{mine}").touch()
waited = time.monotonic() + 600  # that long only if it fails
while not Path("{other}").exists():
    assert time.monotonic() < waited, "{other} never came"
    time.sleep(0.01)
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of four chapters: two that wait for each other, a bad one."""
    one, two = "../chapter-1", "../chapter-2"
    book = make_book(
        tmp_path,
        ["01_one.md", MODULE, cell(MEET.format(mine=one, other=two))],
        ["02_two.md", USE, cell(MEET.format(mine=two, other=one))],
        ["03_three.md", cell("print('fine')"), cell("print(nothing)")],
        ["04_four.md", cell("assert 1 + 1 == 2")],
    )
    folder, package = f"{book}/chapters", f"{book}/t5_book"
    assert (
        export_book([f"--chapters={folder}", f"--package={package}"]) == 0
    )
    monkeypatch.setenv("PYTHONPATH", str(book))
    return book


@pytest.fixture
def run(book, capsys):
    """Run the book; the exit code, the lines printed, and the errors."""
    capsys.readouterr()

    def run(*arguments):
        code = run_book([f"--folder={book}/chapters", *arguments])
        out, error = capsys.readouterr()
        return code, out.splitlines(), error

    return run


def replace(path, old, new):
    """Replace a text in a file."""
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_chapters_run_side_by_side(book, run):
    code, lines, error = run("--jobs=2", "--store")
    assert code == 1
    names = [re.search(r"] (\S+)", line)[1] for line in lines]
    assert sorted(names) == ["01_one", "02_two", "03_three", "04_four"]
    failed = [line for line in lines if line.endswith("failed")]
    assert failed == ["[ 3/4] 03_three               failed"], error
    assert "run: 03_three.md:21: cell 2\n" in error
    assert "NameError: name 'nothing' is not defined" in error
    # The failure has cost no other chapter its run.
    assert stored_path(book / "chapters/04_four.md").exists()
    assert not stored_path(book / "chapters/03_three.md").exists()
    replace(book / "chapters/03_three.md", "print(nothing)", "nothing = 0")
    code, lines, error = run("--jobs=1")
    again = [line for line in lines if "unchanged" not in line]
    assert (code, len(lines), len(again)) == (0, 5, 2), error
    assert "03_three" in again[0] and "All chapters ran" in again[1]


def test_chapters_run_again_only_if_something_changed(book, run):
    for path in ("chapter-1", "chapter-2"):
        (book / path).touch()
    _, lines, _ = run("1", "2", "--jobs=1")
    assert "01_one" in lines[0] and "02_two" in lines[1], "not in order"
    replace(book / "t5_book/one.py", "return 1", "return 3")
    _, lines, _ = run("1", "2", "--jobs=1")
    assert "01_one" in lines[0] and "unchanged" in lines[0]
    assert "02_two" in lines[1] and "unchanged" not in lines[1]


def test_what_changes_while_a_chapter_runs_is_too_late_for_it(book, run):
    module = "Path('../t5_book/one.py')"
    late = f"{module}.write_text({module}.read_text() + '# late')"
    chapter = book / "chapters/03_three.md"
    replace(chapter, "print('fine')", "from pathlib import Path")
    replace(chapter, "print(nothing)", late)
    for _ in range(2):
        code, lines, error = run("3")
        assert code == 0 and "unchanged" not in lines[0], error


def test_all_failures_are_shown(book, run):
    replace(book / "chapters/04_four.md", "assert", "assert not")
    code, _, error = run("03_three", "chapters/04_four.md")
    assert code == 1 and "NameError" in error and "AssertionError" in error


def test_wrong_arguments_are_errors(run):
    assert run("05_five")[::2] == (1, "run: no chapter is called 05_five\n")
    with pytest.raises(SystemExit):
        run("--jobs=0")


def test_as_many_cores_as_this_process_may_use(monkeypatch):
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda _: {0, 3}, raising=False
    )
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores() == 5
