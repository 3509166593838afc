"""The package and the book as a house: what may import what, what may be named where."""

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter

import pytest

import t5_book
from book import read_chapters
from tests.small_book import ROOT

MODULES = sorted(path for path in (ROOT / "t5_book").glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text("utf-8")) for path in MODULES}


def imports(tree):
    """Every import in a syntax tree: its node, and the module's full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node, node.module or "."
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name


def test_no_import_runs_in_a_circle_or_hides_in_a_function():
    graph = {}
    for name, tree in TREES.items():
        ours = [(node, path) for node, path in imports(tree) if "t5_book" in path]
        for node, path in ours:
            where = f"{name}.py:{node.lineno}"
            assert node in tree.body, f"{where} imports {path} inside of something"
            # `from t5_book import x` would be an arrow to the top of the house.
            assert path.startswith("t5_book."), f"{where} imports {path}"
        if name != "__init__":
            graph[name] = {path.removeprefix("t5_book.") for _, path in ours}
    TopologicalSorter(graph).prepare()  # CycleError, with the circle


@pytest.mark.parametrize("name", TREES)
def test_no_name_is_defined_twice(name):
    classes = [node for node in TREES[name].body if isinstance(node, ast.ClassDef)]
    for scope in [TREES[name], *classes]:
        nodes = [n for n in scope.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        # A property and its setter share their name.
        names = Counter(
            node.name for node in nodes
            if f"{node.name}.setter" not in map(ast.unparse, node.decorator_list)
        )
        assert max(names.values(), default=1) == 1, names.most_common(1)


def test_public_names_can_be_imported():
    for name in t5_book.__all__:
        assert hasattr(t5_book, name)


def test_version_is_written_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert t5_book.__version__ == project["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {t5_book.__version__}\n" in citation


def test_import_needs_no_notebook_and_no_figures():
    code = "import sys, t5_book; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"IPython", "jupyter", "matplotlib", "transformers"}


def ruff(*arguments):
    """What ruff has to say; nothing is good."""
    command = [sys.executable, "-m", "ruff", "check", "--quiet", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return done.stdout + done.stderr


def test_code_is_clean():
    assert ruff("t5_book", "tools", "tests", "benchmarks", "conftest.py") == ""


def test_code_of_chapters_is_clean(tmp_path):
    """Each as one script: no unknown names, no imports that nothing uses."""
    for chapter in read_chapters():
        code = "\n\n\n".join(cell.source for cell in chapter.cells) + "\n"
        (tmp_path / f"{chapter.name}.py").write_text(code, "utf-8")
    # F811: each module that a chapter builds has its own imports.
    rules = f"--config={ROOT}/pyproject.toml", "--ignore=E402,F811,I"
    assert ruff(*rules, str(tmp_path)) == ""


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=str)
def test_benchmarks_start(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path), run_name="__main__")
    assert path.name in capsys.readouterr().out


# --- Numbers --------------------------------------------------------------

NUMBER = re.compile(r"\b[Cc]hapters?\s+\d+")


def test_chapters_have_their_numbers_from_the_table_of_contents_alone():
    """``_toc.yml`` says them; the exporter repeats them, once for each module."""
    pages = [ROOT / "README.md", *(ROOT / "chapters").glob("*.md")]
    texts = {path.name: path.read_text("utf-8") for path in pages}
    for path in MODULES:
        text = path.read_text("utf-8")
        built = r"\n\nBuilt in chapter .+?Edit\s+the\s+chapter,\s+not\s+this\s+file\."
        texts[path.name] = re.sub(built, "", text, count=1, flags=re.DOTALL)
    found = {name for name, text in texts.items() if NUMBER.search(text)}
    assert not found


def test_readme_lists_the_chapters_in_order_by_their_titles():
    text = (ROOT / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| \[(.+)\]\(chapters/(\w+)\.md\)", text, re.MULTILINE)
    chapters = read_chapters()
    assert listed == [(chapter.title, chapter.name) for chapter in chapters]
