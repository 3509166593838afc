"""Write the package ``t5_book`` from the cells tagged ``export``.

    python tools/export.py            write t5_book/
    python tools/export.py --check    print what would change, exit 1

Chapter ``06_attention.md`` becomes ``t5_book/attention.py``. Cells are
taken apart by syntax tree and put together again by source text, so
comments and layout stay as written. Imports are gathered at the top; those
that nothing uses are left out. ``class T5(T5):`` in a later cell, or a
later chapter, goes on with a class: its methods move into the class itself,
and a method of a known name replaces the earlier one.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
import textwrap
import tomllib
from collections import defaultdict
from pathlib import Path

from fold import Module, Piece, bound, build, by_type, check_order
from source import CHAPTERS, PACKAGE, ROOT, BookError, read_chapters

WIDTH = 76


def render(module: Module) -> str:
    """The text of a module."""
    used = {n for p in module.pieces for n in used_names(p)}
    imports = [e for e in module.imports if bound(e) in used]
    parts = [render_docstring(module)]
    if imports:
        parts.append(render_imports(imports))
    parts.append(render_all(module.public))
    head = "\n\n".join(parts)
    text = head + join(module.pieces, between="\n\n\n")
    return text + "\n"


def used_names(piece: Piece) -> set[str]:
    """Every name that a piece mentions, with those of its members."""
    node = piece.node
    if piece.kind == "class":
        outer = [*node.bases, *node.keywords, *node.decorator_list]
        names = {n for part in outer for n in mentions(part)}
        return names.union(*(used_names(m) for m in piece.members))
    return mentions(node)


def mentions(node: ast.AST) -> set[str]:
    """Every name in a syntax tree."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def render_docstring(module: Module) -> str:
    """The module's docstring, with a line on where it was built."""
    chapter = module.chapter
    text = module.docstring.text.rstrip()
    quotes = text[-3:]
    if quotes not in ('"""', "'''"):
        where = module.docstring.where
        raise BookError(f"{where}: use triple quotes for the docstring")
    origin = (
        f'Built in chapter {chapter.number}, "{chapter.title}" '
        f"(chapters/{chapter.path.name}). Edit the chapter, not this file."
    )
    lines = textwrap.wrap(origin, WIDTH, break_on_hyphens=False)
    return "\n".join([text[:-3].rstrip(), "", *lines, quotes])


def render_imports(imports: list[tuple[str, str, str]]) -> str:
    """Import statements in the usual groups, sorted."""
    groups = defaultdict(list)
    for entry in sorted(imports):
        groups[import_group(entry[0])].append(entry)
    return "\n\n".join(render_group(groups[key]) for key in sorted(groups))


def import_group(source: str) -> int:
    """Standard library first, then the packages, then the book's own."""
    top = source.split(".")[0]
    if top == "__future__":
        return 0
    if top in sys.stdlib_module_names:
        return 1
    return 3 if top in ("", PACKAGE.name) else 2


def render_group(entries: list[tuple[str, str, str]]) -> str:
    """One group: plain imports, then ``from`` imports, one a module."""
    plain = [(m, alias) for m, name, alias in entries if not name]
    lines = [f"import {m}" + f" as {a}" * bool(a) for m, a in plain]
    names, renamed = defaultdict(list), defaultdict(list)
    for source, name, alias in entries:
        if name:
            (renamed if alias else names)[source].append((name, alias))
    for source in sorted({*names, *renamed}):
        for name, alias in renamed[source]:
            lines.append(f"from {source} import {name} as {alias}")
        if names[source]:
            members = sorted((n for n, _ in names[source]), key=by_type)
            lines.append(listing(f"from {source} import ", members, "()"))
    return "\n".join(lines)


def listing(start: str, items: list[str], brackets: str) -> str:
    """``start`` and its items, on one line or, where long, one a line."""
    line = start + ", ".join(items)
    if brackets == "[]":
        line = f"{start}[{', '.join(items)}]"
    if len(line) <= WIDTH:
        return line
    inner = "".join(f"    {item},\n" for item in items)
    return f"{start}{brackets[0]}\n{inner}{brackets[1]}"


def render_all(names: list[str]) -> str:
    """The line ``__all__ = [...]``."""
    return listing("__all__ = ", [f'"{name}"' for name in names], "[]")


def join(pieces: list[Piece], between: str) -> str:
    """The text of pieces, with blank lines as between hand-written ones."""
    text, before = "", None
    for piece in pieces:
        values = before and before.kind == piece.kind == "value"
        if values and not piece.gap:
            space = "\n"
        elif values or (piece.kind == "value" and not before):
            space = "\n\n"
        else:
            space = between
        text += space + render_piece(piece)
        before = piece
    return text


def render_piece(piece: Piece) -> str:
    """The text of one piece; of a class, with all its members."""
    if piece.kind != "class":
        return piece.text.rstrip()
    members = join(piece.members, between="\n\n").lstrip("\n")
    return f"{piece.text.rstrip()}\n{members or '    pass'}"


def render_init(modules: dict[str, Module], version: str) -> str:
    """The text of ``__init__.py``: the public names, and the version.

    A function that bears the name of a module (``attention``) stays in it:
    re-exported, it would hide the module.
    """
    entries, homes = [], {}
    for name, module in modules.items():
        for public in module.public:
            if public in homes:
                both = f"{homes[public]} and {name}"
                raise BookError(f"{public} is exported twice: {both}")
            homes[public] = name
            if public not in modules:
                entries.append((f"{PACKAGE.name}.{name}", public, ""))
    names = sorted((e[1] for e in entries), key=by_type)
    parts = [INIT.strip(), render_imports(entries), render_all(names)]
    return "\n\n".join([*parts, f'__version__ = "{version}"\n'])


INIT = '''
"""T5, built chapter by chapter: the package of the T5 book.

>>> from t5_book import T5

Each module comes from one chapter and says from which. These files are
generated by tools/export.py: edit the chapters, not the files.
"""
'''


def book_version() -> str:
    """The version of the book; it is written in pyproject.toml alone."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["version"]


def export(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The text of every file of the package, by file name.

    Returns:
        the files, and what is wrong with the order of the chapters.
    """
    chapters = read_chapters(folder)
    modules = build(chapters)
    files = {f"{name}.py": render(m) for name, m in modules.items()}
    files["__init__.py"] = render_init(modules, book_version())
    return files, check_order(chapters, modules)


def difference(files: dict[str, str], package: Path) -> str:
    """What would change in the package, as a diff ("" where nothing)."""
    found = {p.name: p.read_text("utf-8") for p in package.glob("*.py")}
    diff = []
    for name in sorted({*files, *found}):
        old, new = found.get(name, ""), files.get(name, "")
        path = f"{package.name}/{name}"
        lines = [text.splitlines(keepends=True) for text in (old, new)]
        diff += difflib.unified_diff(*lines, path, f"{path} (exported)")
    return "".join(diff)


def write(files: dict[str, str], package: Path) -> list[str]:
    """Write what has changed, remove what no chapter exports any more."""
    package.mkdir(exist_ok=True)
    changed = []
    for name, text in files.items():
        path = package / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(name)
    for path in package.glob("*.py"):
        if path.name not in files:
            path.unlink()
            changed.append(f"{path.name} (removed)")
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    options = parse_arguments(arguments)
    try:
        files, problems = export(options.chapters)
    except BookError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"export: {problem}", file=sys.stderr)
    name = options.package.name
    if options.check:
        diff = difference(files, options.package)
        print(diff or f"{name} is what the chapters say")
        return int(bool(diff or problems))
    changed = write(files, options.package)
    print(f"{name}: {', '.join(changed) or 'unchanged'}")
    return int(bool(problems))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Write the package t5_book from the chapters."
    )
    add = parser.add_argument
    add("--check", action="store_true", help="change nothing; show a diff")
    add("--chapters", type=Path, default=CHAPTERS, metavar="FOLDER")
    add("--package", type=Path, default=PACKAGE, metavar="FOLDER")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
