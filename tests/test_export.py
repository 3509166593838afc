"""The exporter, and the package that it has written."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter

import pytest
from small_book import ROOT, cell, export, write_chapter

from export import export as export_book
from export import main
from source import PACKAGE, BookError, read_chapters

MODULES = sorted(p for p in PACKAGE.glob("*.py"))
CHAPTERS = read_chapters()
START = export('"""A module."""\n\nimport math\nimport os')


def exported(tmp_path, *cells, name="one"):
    """The text of a module that is made from these cells."""
    write_chapter(tmp_path, f"01_{name}.md", START, *cells)
    return export_book(tmp_path)[0][f"{name}.py"]


# --- Our package ----------------------------------------------------------


def test_package_is_what_the_chapters_say(capsys):
    assert main(["--check"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_name_is_defined_twice(path):
    tree = ast.parse(path.read_text("utf-8"))
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    for scope in [tree, *classes]:
        kinds = (ast.FunctionDef, ast.ClassDef)
        nodes = [n for n in scope.body if isinstance(n, kinds)]
        plain = [n.name for n in nodes if not is_setter(n)]
        assert max(Counter(plain).values(), default=1) == 1


def is_setter(node):
    """Is this the setter of a property?"""
    return any(isinstance(d, ast.Attribute) for d in node.decorator_list)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_are_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 250


def test_functions_are_short():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = body[-1].end_lineno - body[0].lineno + 1
                assert lines <= 20, f"{path.name}: {node.name}"


def test_chapters_import_earlier_chapters_only():
    assert export_book(ROOT / "chapters")[1] == []


def test_docstrings_name_the_chapter_that_built_them():
    titles = {c.module: (str(c.number), c.title) for c in CHAPTERS}
    pattern = re.compile(r'Built in chapter (\d+)[,\s]+"([^"]+)"')
    known = set(titles.values())
    for path in MODULES:
        text = path.read_text("utf-8")
        for number, title in pattern.findall(text):
            found = number, " ".join(title.split())
            assert found in known, f"{path.name}: {found}"


def test_import_needs_no_notebook_and_no_figures():
    code = "import sys, t5_book; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"IPython", "jupyter", "matplotlib", "transformers"}


def test_version_is_written_in_one_place():
    import t5_book

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert t5_book.__version__ == project["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {t5_book.__version__}\n" in citation


def test_public_names_can_be_imported():
    import t5_book

    for name in t5_book.__all__:
        assert hasattr(t5_book, name)


def ruff(*arguments, code=None):
    """What ruff has to say; nothing is good."""
    command = [sys.executable, "-m", "ruff", "check", "--quiet", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, input=code, text=True, capture_output=True
    )
    return done.stdout + done.stderr


def test_code_is_clean():
    assert not ruff("t5_book", "tools", "tests", "conftest.py")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.path.stem)
def test_code_of_chapters_is_clean(chapter):
    """As one script: no unknown names, no imports that nothing uses."""
    code = "\n\n\n".join(cell.source for cell in chapter.cells) + "\n"
    name = chapter.path.with_suffix(".py")
    options = ["--ignore=E402,I", f"--stdin-filename={name}", "-"]
    assert not ruff(*options, code=code)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.path.stem)
def test_code_of_chapters_fits_the_page(chapter):
    for part in chapter.cells:
        for number, line in enumerate(part.source.splitlines(), start=1):
            assert len(line) <= 76, part.where(number)


# --- The exporter ---------------------------------------------------------


def test_source_and_comments_stay(tmp_path):
    code = "# Why.\nSIZE = 2  # small\n\n\ndef f(x):\n    return x   # so"
    assert code in exported(tmp_path, export(code))


def test_only_tagged_cells_are_exported(tmp_path):
    text = exported(tmp_path, cell("print(2)"), export("X = 1"))
    assert "X = 1" in text and "print" not in text


def test_module_says_where_it_comes_from(tmp_path):
    text = exported(tmp_path)
    assert text.startswith(
        '"""A module.\n\nBuilt in chapter 1, "Build one"'
    )
    assert "Edit the chapter, not this file." in " ".join(text.split())


def test_imports_are_gathered_sorted_and_pruned(tmp_path):
    text = exported(
        tmp_path,
        export("from torch import nn, Tensor\nimport torch\nimport math"),
        export("def f(x: Tensor):\n    return math.pi, torch, nn"),
    )
    wanted = "import math\n\nimport torch\nfrom torch import Tensor, nn\n"
    assert wanted in text
    assert "import os" not in text


def test_all_lists_public_names(tmp_path):
    code = "SIZE = _hidden = 1\n\n\ndef f():\n    pass\n\n\nclass A(Exception):"
    text = exported(tmp_path, export(code + "\n    pass"))
    assert '__all__ = ["SIZE", "A", "f"]' in text


FIRST = '''
class A:
    """An A."""

    x = 1

    def f(self):
        """Say one."""
        return 1
'''
SECOND = """
# Go on.
class A(A):
    y = 2

    # Better.
    def f(self):
        return 2

    def g(self):
        return self.f()
"""
FOLDED = '''
class A:
    """An A."""

    x = 1
    # Go on.
    y = 2

    # Better.
    def f(self):
        return 2

    def g(self):
        return self.f()
'''


def test_a_class_that_grows_becomes_one_body(tmp_path):
    text = exported(tmp_path, export(FIRST), export(SECOND))
    assert text.endswith("\n" + FOLDED)


def test_a_later_chapter_may_go_on_with_a_class(tmp_path):
    write_chapter(tmp_path, "01_one.md", START, export(FIRST))
    method = "class A(A):\n    def area(self):\n        return math.pi"
    write_chapter(
        tmp_path,
        "02_two.md",
        export('"""More."""\n\nimport math\n\nfrom t5_book.one import A')
        export(method),
        export("def two(a: A):\n    return a"),
    )
    files, problems = export_book(tmp_path)
    assert not problems
    assert (
        "def area" in files["one.py"] and "import math" in files["one.py"]
    )
    assert "area" not in files["two.py"] and "math" not in files["two.py"]


def test_a_later_function_replaces_an_earlier_one(tmp_path):
    text = exported(
        tmp_path,
        export("def f():\n    return 1"),
        export("def f():\n    return 2"),
    )
    assert "return 2" in text and "return 1" not in text


def test_properties_keep_their_setters(tmp_path):
    code = """
class A:
    @property
    def x(self):
        return 1

    @x.setter
    def x(self, value):
        pass
"""
    assert code in exported(tmp_path, export(code))


def test_super_reaches_the_parent(tmp_path):
    text = exported(
        tmp_path,
        export("class A(dict):\n    size = 1"),
        export(
            "class A(A):\n    def copy(self):\n        return super().copy()"
        ),
    )
    names = {}
    exec(text, names)
    assert names["A"](b=2).copy() == {"b": 2}


def test_names_of_modules_are_not_hidden(tmp_path):
    write_chapter(
        tmp_path,
        "01_one.md",
        START,
        export("def one():\n    pass\n\n\nX = 1"),
    )
    text = export_book(tmp_path)[0]["__init__.py"]
    assert '__all__ = ["X"]' in text


def test_export_twice_changes_nothing_and_check_says_so(tmp_path, capsys):
    write_chapter(
        tmp_path / "chapters", "01_one.md", START, export("X = 1")
    )
    package = tmp_path / "t5_book"

    def say(*arguments):
        places = [f"--chapters={tmp_path}/chapters", f"--package={package}"]
        code = main([*places, *arguments])
        return code, capsys.readouterr().out

    assert say() == (0, "t5_book: one.py, __init__.py\n")
    assert say() == (0, "t5_book: unchanged\n")
    assert say("--check")[0] == 0
    module = package / "one.py"
    module.write_text(module.read_text().replace("X = 1", "X = 2"))
    code, diff = say("--check")
    assert code == 1 and "-X = 2\n+X = 1\n" in diff
    (package / "stale.py").write_text("")
    assert say() == (0, "t5_book: one.py, stale.py (removed)\n")


ERRORS = {
    "X = = 1": r"01_one.md:28: invalid syntax",
    "X = 1\nprint(X)": r"01_one.md:29: .* not this statement \(expr\)",
    "for x in []:\n    pass": r"01_one.md:28: .*\(for\)",
    "math.x = 1": r"01_one.md:28: assigns to math.x",
    "X = 1; Y = 2": r"01_one.md:28: put one statement on a line",
    "class A(A):\n    x = 1": r"01_one.md:28: class A\(A\) goes on with",
    "class A: x = 1": r"01_one.md:28: start the class body on its own line",
    "X = 1\nX = 2": r"01_one.md:29: X is defined already \(01_one.md:28\)",
    "class A:\n    x = 1\n\n\nclass A:\n    x = 1": r"by `class A\(A\):`",
    "class A:\n    x = 1\n\n\nclass A(A, dict):\n    y = 1": "no other base",
    "class A:\n    x = 1\n\n\nclass A(A):\n    y: int = 1": "a field belongs",
    FIRST
    + "\n\nclass A(A):\n    def f(self):\n        return super().f()": (
        r"super\(\).f is A's own f here, its parent's once"
    ),
    "X = 1\n'text'": r"01_one.md:29: a string that does nothing",
}


@pytest.mark.parametrize("code", ERRORS)
def test_errors_name_the_file_and_the_line(code, tmp_path):
    with pytest.raises(BookError, match=ERRORS[code]):
        exported(tmp_path, export(code))


def test_a_module_needs_a_docstring(tmp_path):
    write_chapter(tmp_path, "01_one.md", export("X = 1"))
    with pytest.raises(
        BookError, match="01_one.md:19: start with a module"
    ):
        export_book(tmp_path)


def test_a_method_that_moves_must_find_its_names(tmp_path):
    write_chapter(tmp_path, "01_one.md", START, export(FIRST))
    method = "class A(A):\n    def h(self):\n        return helper()"
    helper = "def helper():\n    return 1"
    write_chapter(
        tmp_path,
        "02_two.md",
        export('"""More."""\n\nfrom t5_book.one import A')
        export(helper),
        export(method),
    )
    with pytest.raises(
        BookError, match="02_two.md:.* does not know helper"
    ):
        export_book(tmp_path)


LATER = {
    "from t5_book.two import X": "imports two from 02_two.md, not yet built"
    "from t5_book import X": "imports X from 02_two.md, not yet built",
    "from t5_book.none import X": "no chapter exports none"
    "%matplotlib inline\nimport t5_book.one": "imports one from 01_one.md",
}


@pytest.mark.parametrize("code", LATER)
def test_a_chapter_may_not_look_ahead(code, tmp_path):
    write_chapter(tmp_path, "01_one.md", START, cell(code))
    write_chapter(tmp_path, "02_two.md", START, export("X = 1"))
    (problem,) = export_book(tmp_path)[1]
    assert problem.startswith("01_one.md:") and LATER[code] in problem


def test_a_name_is_exported_by_one_chapter(tmp_path):
    for name in ("01_one.md", "02_two.md"):
        write_chapter(tmp_path, name, START, export("X = 1"))
    with pytest.raises(BookError, match="X is exported twice: one and two"):
        export_book(tmp_path)


def test_a_folder_without_chapters_is_an_error(tmp_path):
    with pytest.raises(BookError, match="no chapters"):
        export_book(tmp_path)
