"""Write small books of a few cells, to test the tools that make ours."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3 (ipykernel)
  language: python
  name: python3
---

# {title}

A sentence.
"""


def cell(code: str, tag: str = "") -> str:
    """A code cell in the text of a chapter."""
    options = f":tags: [{tag}]\n\n" if tag else ""
    code = code.strip("\n")
    return f"\n```{{code-cell}} ipython3\n{options}{code}\n```\n"


def export(code: str) -> str:
    """A cell that goes into the package."""
    return cell(code, "export")


def write_chapter(folder: Path, name: str, *cells: str, title="") -> Path:
    """Write one chapter; its title is made up from its name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    title = title or f"Build {path.stem[3:]}"
    path.write_text(HEADER.format(title=title) + "".join(cells))
    return path


def make_book(root: Path, *chapters: list) -> Path:
    """A folder with our settings for pytest, and these chapters."""
    for name in ("conftest.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    (root / "tests").mkdir()
    for name, *cells in chapters:
        write_chapter(root / "chapters", name, *cells)
    return root
