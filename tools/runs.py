"""Remember how each chapter ran: its outputs, in two places.

``_build/.jupyter_cache`` holds the last run of every chapter with all its
outputs. Jupyter Book reads it and so need not run a chapter again. Jupyter
Book itself looks a chapter up by its cells alone; here a run counts only as
long as everything that it depends on is unchanged, too (``run_key``).

``tools/outputs`` holds the text outputs, for the tests to compare with. It
is committed; pictures, widgets and progress bars are left out.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import NotebookNode
from nbval.plugin import coalesce_streams

from source import BookError, Chapter, read_chapters

WIDGET = "application/vnd.jupyter.widget-view+json"


def read_notebook(chapter: Path) -> NotebookNode:
    """Read a chapter as Jupyter Book does, so that its cache is found."""
    return read_myst_markdown_notebook(chapter.read_text(encoding="utf-8"))


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(text: str) -> str:
    """A short fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- Full outputs, for the site -------------------------------------------


def run_key(chapter: Chapter) -> str:
    """A fingerprint of all that the outputs of a chapter depend on.

    These are its code cells, the modules of earlier chapters (a chapter
    imports no others), the other files beside it, the pinned packages and
    Python itself.
    """
    folder = chapter.path.parent
    root = folder.parent
    earlier = [
        c for c in read_chapters(folder) if c.number < chapter.number
    ]
    modules = [root / "t5_book" / f"{c.module}.py" for c in earlier]
    beside = [
        p for p in folder.iterdir() if p.suffix not in (".md", ".svg")
    ]
    files = [*modules, *beside, root / "requirements.txt"]
    cells = code_of(read_notebook(chapter.path))
    parts = [
        sys.version,
        *(json.dumps([c.metadata, c.source]) for c in cells),
    ]
    for path in sorted(path for path in files if path.is_file()):
        parts += [path.name, path.read_bytes().hex()]
    return digest("\n".join(parts))


def open_cache(root: Path):
    """Open the cache of a book; it is made where it is missing."""
    return get_cache(str(root / "_build" / ".jupyter_cache"))


def find_run(chapter: Chapter) -> NotebookNode | None:
    """The last run of a chapter with its outputs, if it still counts."""
    cache = open_cache(chapter.path.parent.parent)
    notebook = read_notebook(chapter.path)
    try:
        record = cache.match_cache_notebook(notebook)
    except KeyError:
        return None
    if record.data.get("key") != run_key(chapter):
        return None
    return cache.merge_match_into_notebook(notebook)[1]


def keep_run(
    chapter: Chapter, notebook: NotebookNode, key: str, seconds: float
):
    """Put a run into the cache, in place of earlier runs of the chapter.

    ``key`` is the ``run_key`` from before the run: what changes while a
    chapter runs has come too late for it.
    """
    root = chapter.path.parent.parent
    cache = open_cache(root)
    name = str(chapter.path.relative_to(root))
    drop_runs(cache, lambda uri: uri == name)
    data = {"execution_seconds": seconds, "key": key}
    bundle = CacheBundleIn(notebook, name, data=data)
    cache.cache_notebook_bundle(bundle, overwrite=True)
    # Sphinx reads a page anew only if its text changed or this is missing.
    page = root / "_build" / ".doctrees" / f"{name.removesuffix('.md')}"
    page.with_suffix(".doctree").unlink(missing_ok=True)


def drop_runs(cache, unwanted) -> None:
    """Remove the runs whose chapter's name is ``unwanted``."""
    for record in cache.list_cache_records():
        if unwanted(record.uri):
            cache.remove_cache(record.pk)


# --- Text outputs, for the tests ------------------------------------------


def stored_path(chapter: Path) -> Path:
    """Where the text outputs of a chapter are stored."""
    root = chapter.parent.parent
    return root / "tools" / "outputs" / f"{chapter.stem}.ipynb"


def text_outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Reduce outputs to the text that is the same in every run.

    A kernel may send what a cell prints in one piece or in several, as
    chance has it; here it is one.
    """
    kept = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET in output.get(
            "data", {}
        ):
            continue  # progress bars and warnings
        output = nbformat.from_dict(output)
        output.pop("traceback", None)
        if "data" in output:
            text = output.data.get("text/plain")
            output.data = NotebookNode({"text/plain": text} if text else {})
            output.metadata = NotebookNode()
        if output.output_type == "error":
            output.traceback = []
        if output.get("data", True):
            kept.append(output)
    return coalesce_streams(kept)


def store_outputs(chapter: Path, executed: NotebookNode) -> bool:
    """Write the text outputs of a run; say whether they changed."""
    notebook = nbformat.v4.new_notebook()
    for count, cell in enumerate(code_of(executed), start=1):
        stored = nbformat.v4.new_code_cell(
            outputs=text_outputs(cell.outputs),
            execution_count=count,
            metadata={"source": digest(cell.source)},
            id=f"cell-{count}",
        )
        for output in stored.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
        notebook.cells.append(stored)
    text = nbformat.writes(notebook) + "\n"
    path = stored_path(chapter)
    path.parent.mkdir(parents=True, exist_ok=True)
    changed = not path.exists() or path.read_text("utf-8") != text
    path.write_text(text, encoding="utf-8")
    return changed


def stored_outputs(chapter: Path) -> dict[str, list[list[NotebookNode]]]:
    """Stored outputs, by the fingerprint of their cell's code.

    Cells with the same code have one list of outputs each, in their order.

    Raises:
        BookError: if none are stored for this chapter.
    """
    path = stored_path(chapter)
    if not path.exists():
        raise BookError(
            f"{chapter.name} has no stored outputs; look at what it prints, "
            f"then run `python tools/run.py --store {chapter.stem}`"
        )
    found: dict[str, list[list[NotebookNode]]] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        found.setdefault(cell.metadata.source, []).append(cell.outputs)
    return found
