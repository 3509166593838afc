"""Write a small book of a few cells, to test the tools that make ours."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADER = """\
---
kernelspec:
  display_name: Python 3 (ipykernel)
  language: python
  name: python3
---

# Build {name}
"""
TOC = """\
format: jb-book
root: README
parts:
  - caption: All
    numbered: 1
    chapters:
"""
FIRST_LINE = HEADER.count("\n") + 5  # of the code in a chapter's first export cell


def cell(code: str, tag: str = "") -> str:
    """A code cell in the text of a chapter."""
    options = f":tags: [{tag}]\n\n" if tag else ""
    return f"\n```{{code-cell}} ipython3\n{options}{code.strip()}\n```\n"


def export(code: str) -> str:
    """A cell that goes into the package."""
    return cell(code, "export")


def make_book(root: Path, **chapters: list[str]) -> Path:
    """A book of these chapters, each a list of cells and other text."""
    for name in ("conftest.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    (root / "chapters").mkdir(exist_ok=True)
    (root / "tests").mkdir(exist_ok=True)
    for name, parts in chapters.items():
        text = HEADER.format(name=name) + "".join(parts)
        (root / "chapters" / f"{name}.md").write_text(text, "utf-8")
    lines = [f"      - file: chapters/{name}\n" for name in chapters]
    (root / "_toc.yml").write_text(TOC + "".join(lines), "utf-8")
    return root


def replace(path: Path, old: str, new: str) -> None:
    """Replace a text in a file."""
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
