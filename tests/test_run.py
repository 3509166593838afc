"""The runner: what has changed runs, side by side, and failures show."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import run as runner
from book import read_chapters
from export import main as export_book
from tests.small_book import ROOT, cell, export, make_book, replace

MODULE = export('"""A module."""\n__all__ = []\n\n\ndef one():\n    return 1')
MEET = """
import time
from pathlib import Path

Path("{mine}").touch()
waited = time.monotonic() + 600  # that long only if it fails
while not Path("{other}").exists():
    assert time.monotonic() < waited, "{other} never came"
    time.sleep(0.01)
"""
BAR = """
from tqdm.auto import tqdm

bar = tqdm(total=3, desc="Training")
for step in range(3):
    bar.update()
    bar.set_postfix(loss=f"{2.5 - step:.1f}")
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Four chapters: two that wait for each other, one that fails, one with a bar."""
    meet = [cell(MEET.format(mine=f"../{a}", other=f"../{b}")) for a, b in ("ab", "ba")]
    book = make_book(
        tmp_path,
        first=[MODULE, meet[0]],
        second=[cell("from t5_book.first import one\n\nassert one()"), meet[1]],
        third=[cell("print('fine')"), cell("x = 1\nprint(nothing)")],
        fourth=[cell(BAR)],
    )
    assert export_book([f"--root={book}"]) == 0
    monkeypatch.setenv("PYTHONPATH", str(book))
    monkeypatch.setattr(runner, "EVERY", 0)
    return book


@pytest.fixture
def run(book, capsys):
    """Run the book: the exit code, how each chapter ended, all output, errors."""
    capsys.readouterr()

    def run(*arguments):
        code = runner.main([f"--root={book}", *arguments])
        out, error = capsys.readouterr()
        ends = re.findall(r"^\[ \d/4\] (\w+) +(unchanged|failed|[\d.]+ s)$", out, re.M)
        return code, dict(ends), out, error

    return run


def test_chapters_run_side_by_side(book, run):
    code, ends, out, error = run("--jobs=2")
    assert code == 1 and len(ends) == 4
    assert [name for name in ends if ends[name] == "failed"] == ["third"]
    line = 1 + (book / "chapters/third.md").read_text().splitlines().index("x = 1")
    assert f"third.md:{line}" in error and "name 'nothing' is not defined" in error
    # A training says how far it is; this one is done before its time is known.
    assert re.search(r"fourth cell 1/1: step 3/3, loss=0.5, \S+ left", out)
    # The failure has cost no other chapter its run.
    replace(book / "chapters/third.md", "print(nothing)", "nothing = 0")
    code, ends, out, error = run("--jobs=1")
    assert code == 0, error
    assert [name for name in ends if ends[name] != "unchanged"] == ["third"]


def test_chapters_run_again_only_if_something_changed(book, run):
    (book / "a").touch()
    (book / "b").touch()
    replace(book / "chapters/third.md", "print(nothing)", "")
    assert run()[0] == 0
    changes = [
        (book / "t5_book/first.py", "return 1", "return 3", ["fourth", "second", "third"]),
        (book / "chapters/second.md", "# Build", "# Other words", []),
        (book / "chapters/second.md", "assert one()", "assert one() == 3", ["second"]),
        (book / "requirements.txt", "torch", "# torch", ["first", "fourth", "second", "third"]),
    ]
    for path, old, new, wanted in changes:
        replace(path, old, new)
        code, ends, out, error = run()
        assert code == 0, error
        assert sorted(n for n in ends if ends[n] != "unchanged") == wanted, path


def test_what_changes_while_a_chapter_runs_is_too_late_for_it(book, run):
    late = "from pathlib import Path\nmodule = Path('../t5_book/first.py')\n"
    late += "module.write_text(module.read_text() + '# late')"
    replace(book / "chapters/third.md", "print(nothing)", late)
    for _ in range(2):
        code, ends, _, error = run("third")
        assert code == 0 and ends["third"] != "unchanged", error


def test_jupyter_book_finds_the_run_with_its_text_in_one_piece(book, run):
    pieces = "for word in 'abc':\n    print(word, end='|', flush=True)"
    replace(book / "chapters/third.md", "print(nothing)", pieces)
    assert run("chapters/third.md")[0] == 0
    notebook = runner.Runs(read_chapters(book)).find("third")
    outputs = runner.code_of(notebook)[1].outputs
    assert [output.text for output in outputs] == ["a|b|c|"]


def test_a_kernel_that_dies_and_a_name_that_is_wrong(book, run):
    replace(book / "chapters/third.md", "print(nothing)", "import os\nos._exit(1)")
    code, ends, _, error = run("third")
    assert code == 1 and "third.md:" in error and "died" in error
    code, ends, _, error = run("fifth")
    assert code == 1 and "fifth" in error


def test_where_nothing_can_be_written_chapters_run_all_the_same(book, run):
    (book / "_build").touch()  # a file, where a folder is needed
    code, ends, _, error = run("fourth")
    assert code == 0 and "fourth" in ends
    assert len(error.splitlines()) == 1 and "_build" in error


def start(book, **environment):
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tools" / "run.py", f"--root={book}", "first"],
        env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )


def test_control_c_stops_all_in_one_sentence(book):
    """While a chapter runs: it waits for a file that never comes."""
    code = "import os\nfrom pathlib import Path\nPath('../pid').write_text(str(os.getpid()))"
    replace(book / "chapters/first.md", "\nimport time", f"\n{code}\nimport time")
    process = start(book)
    while not (book / "a").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode and out.strip() == runner.STOPPED
    with pytest.raises(ProcessLookupError):
        os.kill(int((book / "pid").read_text()), 0)


def test_control_c_in_the_first_second(book):
    """A library that the command imports is where it happens."""
    early = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (book / "early").mkdir()
    (book / "early" / "jupyter_cache.py").write_text(early)
    out, _ = start(book, PYTHONPATH=str(book / "early")).communicate(timeout=120)
    assert out.strip() == runner.STOPPED


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_an_environment_that_was_stopped_half_made_is_made_again(tmp_path):
    """By a Python that only pretends to make one."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nif test "$2" = venv; then mkdir -p .venv/bin; '
        'cp python .venv/bin/python; test -e working; fi\n'
    )
    python.chmod(0o755)
    command = ["make", ".venv/.t5-book-ready", "PYTHON=./python"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
    (tmp_path / ".venv" / "half").touch()
    (tmp_path / "working").touch()
    assert not subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
    assert not (tmp_path / ".venv" / "half").exists()
    assert not (tmp_path / ".venv.unfinished").exists()
