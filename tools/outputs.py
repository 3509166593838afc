"""The text that cells print, stored for the tests to compare with.

Only where no assert says it: ``tests/outputs/NAME.txt`` has the text of those
cells of ``chapters/NAME.md`` that print and do not assert. A cell is known by
a hash of its code. ``python tools/run.py --store`` writes the files.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from nbformat import NotebookNode

from book import ASSERT, code_of


def is_compared(cell: NotebookNode) -> bool:
    """Is a cell's text compared? An assert says more than a text does."""
    tags = cell.metadata.get("tags", ())
    return "nbval-ignore-output" not in tags and not ASSERT.search(cell.source)


def cell_key(cell: NotebookNode) -> str:
    """A short hash of a cell's code, without its comments."""
    lines = [line.rstrip() for line in cell.source.splitlines()]
    code = [line for line in lines if line and line.lstrip()[0] != "#"]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


def printed(outputs: list[NotebookNode]) -> str:
    """The text among outputs: no pictures, progress bars or warnings."""
    text = ""
    for output in outputs:
        kinds = output.get("data", {})
        if output.output_type == "error":
            text += f"{output.ename}: {output.evalue}\n"
        elif output.get("name") == "stdout":
            text += output.text
        elif not any(kind.startswith(("image/", "application/")) for kind in kinds):
            text += kinds.get("text/plain", "") + "\n"
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def stored_path(chapter: Path) -> Path:
    """Where the text of a chapter is stored."""
    return chapter.parent.parent / "tests" / "outputs" / f"{chapter.stem}.txt"


def stored_texts(chapter: Path) -> dict[str, str]:
    """The stored text of a chapter's cells, by their keys."""
    path = stored_path(chapter)
    text = path.read_text("utf-8") if path.exists() else ""
    parts = re.split(r"^== (\w{12}) .*\n", text, flags=re.MULTILINE)
    return {key: found.strip("\n") for key, found in zip(parts[1::2], parts[2::2])}


def store(chapter: Path, notebook: NotebookNode) -> None:
    """Store the text of those cells of a run whose text is compared."""
    texts = {}
    for cell in code_of(notebook):
        key, text = cell_key(cell), printed(cell.outputs)
        if text and is_compared(cell):
            texts[key] = f"== {key} {cell.source.splitlines()[-1].strip()}\n{text}\n"
    path = stored_path(chapter)
    path.unlink(missing_ok=True)
    if texts:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(texts.values()), "utf-8")
