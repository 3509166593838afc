"""The exporter: what it makes of cells, and what it refuses."""

import pytest

from book import BookError, read_chapters
from export import export as export_book
from export import main
from tests.small_book import FIRST_LINE, cell, export, make_book

START = export('"""A module."""\n\nimport math\n\n__all__ = []')


def exported(root, **chapters):
    """The files of the package that these chapters make."""
    return export_book(read_chapters(make_book(root, **chapters)))


def test_our_package_is_what_the_chapters_say(capsys):
    assert main(["--check"]) == 0, capsys.readouterr()


GROWN = """
\"\"\"What grows.\"\"\"
import functools, os
from torch import nn, Tensor
import torch

__all__ = ["Tree"]
---
# Why two.
SIZE = 2
DEPTH: int = 3  # small

NAMES = {}


def helper(x: Tensor) -> int:
    return 1


class Tree(nn.Module):
    kind = "oak"

    # Kept as it is written.
    def __init__(self):
        self._age = 1

    @property
    def age(self):
        return self._age

    @age.setter
    def age(self, value):
        self._age = value
---
@add_to(Tree)
def grow(self):
    return 1
---
# t5_book/wood.py
\"\"\"What trees are made of.\"\"\"
__all__ = []
---
# t5_book/wood.py
def trunk(tree):
    return 1
---
# Better.
@add_to(Tree)
@torch.no_grad()
def grow(self):
    return trunk(self) + helper(self) + SIZE
---
@functools.cache
def helper(x: Tensor) -> int:
    return 2
---
Tree.plant = helper
"""
GROWN_MODULE = '''\
"""What grows.

Built in chapter 1, "Build grown" (chapters/grown.md). Edit the chapter, not
this file.
"""

import functools

import torch
from torch import Tensor, nn

from t5_book.wood import trunk

__all__ = ["Tree"]

# Why two.
SIZE = 2
DEPTH: int = 3  # small

NAMES = {}


@functools.cache
def helper(x: Tensor) -> int:
    return 2


class Tree(nn.Module):
    kind = "oak"

    # Kept as it is written.
    def __init__(self):
        self._age = 1

    @property
    def age(self):
        return self._age

    @age.setter
    def age(self, value):
        self._age = value

    # Better.
    @torch.no_grad()
    def grow(self):
        return trunk(self) + helper(self) + SIZE


Tree.plant = helper
'''


def test_modules_are_as_written_by_hand(tmp_path):
    cells = [export(code) for code in GROWN.split("---")]
    files = exported(tmp_path, grown=[cell('print("not exported")'), *cells])
    assert files["grown.py"] == GROWN_MODULE
    wood = 'this file.\n"""\n\n__all__ = []\n\n\ndef trunk(tree):\n    return 1\n'
    assert files["wood.py"].endswith(wood)


def test_a_later_chapter_adds_to_a_module(tmp_path):
    more = '# t5_book/one.py\nfrom math import pi\n\n__all__ = ["Y", "one"]\nY = one = pi'
    first = export('"""One."""\n__all__ = ["X"]\nX = 1')
    two = [cell("from t5_book import X"), export(more.replace("Y = one", "Y = pi\none"))]
    files = exported(tmp_path, one=[first], two=two)
    assert '"Build one" (chapters/one.md) and chapter 2, "Build' in files["one.py"]
    code = 'from math import pi\n\n__all__ = ["X", "Y", "one"]\n\nX = 1\nY = pi\none = pi\n'
    assert files["one.py"].endswith(code)
    # A name that a module bears would hide the module.
    assert "from t5_book.one import X, Y\n" in files["__init__.py"]
    assert "two.py" not in files


# What an export cell must not hold: the line of it, and a word of the message.
ERRORS = {
    "X = = 1": (0, "invalid syntax"),
    "X = 1\nprint(X)": (1, "Expr"),
    "for x in []:\n    pass": (0, "For"),
    "X = 1; Y = 2": (0, "own line"),
    "X = 1\n'text'": (1, "Expr"),
    "@add_to(A)\ndef f(self):\n    pass": (1, "class A"),
    "__all__ = ['f']": (0, "f"),
}


@pytest.mark.parametrize("code", ERRORS)
def test_errors_name_the_file_and_the_line(code, tmp_path):
    line, word = ERRORS[code]
    with pytest.raises(BookError, match=rf"^one\.md:{FIRST_LINE + line}: .*{word}"):
        exported(tmp_path, one=[export(code), START])


def test_a_module_needs_a_docstring_and_a_public_name_one_home(tmp_path):
    with pytest.raises(BookError, match=rf"one\.md:{FIRST_LINE}: .*docstring"):
        exported(tmp_path, one=[export("X = 1")])
    both = export('"""A module."""\n__all__ = ["X"]\nX = 1')
    with pytest.raises(BookError, match=r"two\.md:\d+: X .* one\.py"):
        exported(tmp_path, one=[both], two=[both])


def test_a_private_name_stays_in_its_module(tmp_path):
    one = [START, export("def _f():\n    pass")]
    other = export('# t5_book/other.py\n"""Other."""\n__all__ = []\nX = _f')
    with pytest.raises(BookError, match=r"(?s)_f.*other\.py:8"):
        exported(tmp_path, one=[*one, other])
    with pytest.raises(BookError, match=r"two\.md:\d+: .*_f"):
        exported(tmp_path, one=one, two=[cell("from t5_book.one import _f")])


LATER = [
    "from t5_book.two import X",
    "from t5_book.one import Y",
    "from t5_book import X",
    "%matplotlib inline\nimport t5_book.two",
    "def f():\n    from t5_book import two",
]


@pytest.mark.parametrize("code", LATER)
def test_a_chapter_may_not_look_ahead(code, tmp_path):
    two = [START, export('__all__ = ["X"]\nX = 1')]
    after = cell("import t5_book.two\nfrom t5_book import X, two")
    assert exported(tmp_path, one=[START], two=two, three=[after])
    with pytest.raises(BookError, match=r"middle\.md:\d+: no earlier chapter"):
        exported(tmp_path, one=[START], middle=[cell(code)], two=two)


def test_the_command_writes_what_changed_and_checks(tmp_path, capsys):
    book = make_book(tmp_path, one=[START, export("X = 1")])
    root = f"--root={book}"
    assert main([root, "--check"]) == 1
    assert "one.py" in capsys.readouterr().out
    assert main([root]) == main([root, "--check"]) == 0
    module, stale = book / "t5_book" / "one.py", book / "t5_book" / "stale.py"
    date = module.stat().st_mtime_ns
    stale.write_text("")
    assert main([root]) == 0
    assert not stale.exists() and module.stat().st_mtime_ns == date
    # A chapter without a heading; none at all; no chapters.
    chapter, toc = book / "chapters" / "one.md", book / "_toc.yml"
    for change in (lambda: chapter.write_text(""), chapter.unlink):
        change()
        assert main([root]) == 1 and "one.md" in capsys.readouterr().err
    toc.write_text("parts: []\n")
    assert main([root]) == 1 and "_toc.yml" in capsys.readouterr().err
