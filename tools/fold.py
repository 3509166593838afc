"""Take export cells apart and fold them into modules.

A module is a docstring, imports and definitions (``Piece``), each kept as
source text with its syntax tree beside it.
"""

from __future__ import annotations

import ast
import builtins
import textwrap
from dataclasses import dataclass, field

from source import PACKAGE, BookError, Cell, Chapter

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
VALUE = (ast.Assign, ast.AnnAssign)
IMPORT = (ast.Import, ast.ImportFrom)


@dataclass
class Piece:
    """A definition in a module or in a class, as source text."""

    kind: str  # "docstring", "value", "function" or "class"
    names: tuple[str, ...]
    text: str  # of a class: its decorators and first line alone
    node: ast.AST
    where: str
    gap: bool = False  # a blank line stands before it in the chapter
    members: list[Piece] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The one name of a function or a class."""
        return self.names[0]


@dataclass
class Module:
    """A module in the making: its docstring, imports and definitions."""

    chapter: Chapter
    docstring: Piece | None = None
    imports: set[tuple[str, str, str]] = field(default_factory=set)
    pieces: list[Piece] = field(default_factory=list)

    def find(self, name: str) -> Piece | None:
        """The definition of a name, if there is one."""
        found = (p for p in self.pieces if name in p.names)
        return next(found, None)

    @property
    def public(self) -> list[str]:
        """The names that the module offers."""
        names = {n for p in self.pieces for n in p.names}
        return sorted((n for n in names if n[0] != "_"), key=by_type)


def by_type(name: str) -> tuple[int, str]:
    """Sort key of a name: CONSTANTS, then Classes, then functions."""
    if name.isupper() and len(name) > 1:
        return 0, name
    return 1 if name[0].isupper() else 2, name


# --- Read: from cells to pieces -------------------------------------------


def parse(cell: Cell) -> ast.Module:
    """Parse a cell; a syntax error names the chapter and the line."""
    source = cell.source
    if "export" not in cell.tags:
        source = "\n".join(map(mute_magic, source.split("\n")))
    try:
        return ast.parse(source)
    except SyntaxError as error:
        where = cell.where(error.lineno or 1)
        raise BookError(f"{where}: {error.msg}") from None


def mute_magic(line: str) -> str:
    """Replace a line for IPython alone by one that Python can read."""
    bare = line.lstrip()
    indent = line[: len(line) - len(bare)]
    return f"{indent}pass" if bare[:1] in ("%", "!") else line


def pieces_of(body: list[ast.stmt], cell: Cell, start: int) -> list[Piece]:
    """Cut the statements of a body apart, each with the comments above it.

    Args:
        body: sibling statements of the cell.
        cell: where they stand.
        start: number of lines of the cell that come before them.
    """
    lines, pieces = cell.source.splitlines(), []
    for node in body:
        if first_line(node) <= start:
            where = cell.where(node.lineno)
            raise BookError(f"{where}: put one statement on a line")
        above = lines[start : node.end_lineno]
        text = "\n".join(above).lstrip("\n")
        piece = piece_of(node, text, cell)
        piece.gap = not above[0].strip()
        pieces.append(piece)
        start = node.end_lineno
    return pieces


def piece_of(node: ast.stmt, text: str, cell: Cell) -> Piece:
    """Make a piece of one statement, and say no to what is not allowed."""
    where = cell.where(node.lineno)
    if isinstance(node, ast.ClassDef):
        return class_piece(node, text, cell)
    if isinstance(node, FUNCTION):
        return Piece("function", (function_name(node),), text, node, where)
    if isinstance(node, VALUE):
        return Piece("value", assigned(node, where), text, node, where)
    if isinstance(node, IMPORT):
        return Piece("import", (), text, node, where)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        if isinstance(node.value.value, str):
            return Piece("docstring", (), text, node, where)
    kind = type(node).__name__.lower()
    raise BookError(
        f"{where}: an export cell holds imports, constants, functions and "
        f"classes, not this statement ({kind}); move it to another cell"
    )


def class_piece(node: ast.ClassDef, text: str, cell: Cell) -> Piece:
    """Make a piece of a class: its head, and its members one by one."""
    where = cell.where(node.lineno)
    lines = cell.source.splitlines()
    head_end = first_line(node.body[0]) - 1
    while head_end and lines[head_end - 1].strip()[:1] in ("", "#"):
        head_end -= 1  # comments above a member belong to it
    if head_end < node.lineno:
        raise BookError(f"{where}: start the class body on its own line")
    tail = node.end_lineno - head_end
    head = "\n".join(text.splitlines()[:-tail])
    body = [n for n in node.body if not isinstance(n, ast.Pass)]
    members = pieces_of(body, cell, head_end)
    return Piece("class", (node.name,), head, node, where, members=members)


def first_line(node: ast.stmt) -> int:
    """The first line of a statement, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


def function_name(node: ast.FunctionDef) -> str:
    """Name of a function; a property's setter has its own, ``x.setter``."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Attribute):
            if getattr(decorator.value, "id", None) == node.name:
                return f"{node.name}.{decorator.attr}"
    return node.name


def assigned(
    node: ast.Assign | ast.AnnAssign, where: str
) -> tuple[str, ...]:
    """The names that an assignment binds."""
    targets = getattr(node, "targets", None) or [node.target]
    names = []
    for target in targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        if not all(isinstance(part, ast.Name) for part in parts):
            raise BookError(
                f"{where}: assigns to {ast.unparse(target)}; an export "
                "cell may assign to plain names alone (to add a method to "
                "a class X, write `class X(X):`)"
            )
        names += [part.id for part in parts]
    return tuple(names)


# --- Build: from pieces to modules ----------------------------------------


def build(chapters: list[Chapter]) -> dict[str, Module]:
    """Build every module; a chapter that exports nothing has none."""
    modules: dict[str, Module] = {}
    for chapter in chapters:
        if not chapter.export_cells:
            continue
        module = Module(chapter)
        for cell in chapter.export_cells:
            body = parse(cell).body
            for piece in pieces_of(body, cell, 0):
                add(piece, module, modules)
        if not module.docstring:
            where = chapter.export_cells[0].where()
            raise BookError(f"{where}: start with a module docstring")
        modules[chapter.module] = module
    return modules


def add(piece: Piece, module: Module, modules: dict[str, Module]) -> None:
    """Put a piece into its module, or into the class it goes on with."""
    if piece.kind == "docstring":
        if module.docstring or module.pieces or module.imports:
            raise BookError(f"{piece.where}: a string that does nothing")
        module.docstring = piece
    elif piece.kind == "import":
        module.imports |= imported(piece.node)
    elif piece.kind == "class" and piece.name in bases(piece):
        reopen(piece, module, modules)
    else:
        define(piece, module)


def define(piece: Piece, module: Module) -> None:
    """Add a new definition; a function may replace an earlier function."""
    for name in piece.names:
        old = module.find(name)
        if not old:
            continue
        if old.kind == piece.kind == "function":
            module.pieces[module.pieces.index(old)] = piece
            return
        hint = f"; go on with it by `class {name}({name}):`"
        raise BookError(
            f"{piece.where}: {name} is defined already ({old.where})"
            + hint * (old.kind == piece.kind == "class")
        )
    module.pieces.append(piece)


def bases(piece: Piece) -> list[str]:
    """The bases of a class, as written."""
    return [ast.unparse(base) for base in piece.node.bases]


def imported(node: ast.AST) -> set[tuple[str, str, str]]:
    """Names that a statement imports: (module, name, name bound here)."""
    if isinstance(node, ast.Import):
        return {(a.name, "", a.asname or "") for a in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    source = "." * node.level + (node.module or "")
    return {(source, a.name, a.asname or "") for a in node.names}


def reopen(
    piece: Piece, module: Module, modules: dict[str, Module]
) -> None:
    """Fold ``class X(X):`` into the class X, wherever it is defined."""
    homes = [module, *reversed(modules.values())]
    home = next((m for m in homes if m.find(piece.name)), None)
    known = home.find(piece.name) if home else None
    if not known or known.kind != "class":
        raise BookError(
            f"{piece.where}: class {piece.name}({piece.name}) goes on with "
            "a class that no earlier export cell defines"
        )
    node = piece.node
    if len(node.bases) > 1 or node.keywords or node.decorator_list:
        raise BookError(
            f"{piece.where}: to go on with a class, write "
            f"`class {piece.name}({piece.name}):` with no other base, "
            "keyword or decorator"
        )
    carry_head_comment(piece)
    for member in piece.members:
        fold(member, known)
    if home is not module:
        lend_imports(piece, module, home)


def carry_head_comment(piece: Piece) -> None:
    """Keep a comment that stands above ``class X(X):`` for its members."""
    comment = piece.text.splitlines()[:-1]
    if comment and piece.members:
        first = piece.members[0]
        text = "\n".join(comment).strip("\n")
        first.text = f"{textwrap.indent(text, '    ')}\n{first.text}"


def fold(member: Piece, known: Piece) -> None:
    """Put one member into a class: in place of its namesake, or last."""
    check_member(member, known)
    namesakes = [m for m in known.members if same(m, member)]
    if namesakes:
        known.members[known.members.index(namesakes[0])] = member
        return
    place = len(known.members)
    if member.kind == "docstring":
        place = 0
    elif member.kind == "value":
        kinds = [m.kind for m in known.members] + ["function"]
        place = min(kinds.index("function"), place)
    known.members.insert(place, member)


def same(one: Piece, two: Piece) -> bool:
    """Do two members of a class bear the same name?"""
    return one.kind == two.kind and one.names == two.names


def check_member(member: Piece, known: Piece) -> None:
    """Refuse what would mean one thing in the chapter, another folded."""
    names = {n for m in known.members for n in m.names}
    for node in ast.walk(member.node):
        if not isinstance(node, ast.Attribute):
            continue
        if ast.unparse(node.value) == "super()" and node.attr in names:
            raise BookError(
                f"{member.where}: super().{node.attr} is {known.name}'s "
                f"own {node.attr} here, its parent's once it is folded in"
            )
    if isinstance(member.node, ast.AnnAssign):
        raise BookError(
            f"{member.where}: a field belongs where {known.name} is first "
            f"defined ({known.where})"
        )


def lend_imports(piece: Piece, module: Module, home: Module) -> None:
    """Give an earlier module the imports that a folded method needs.

    A module of this book is not lent: the earlier module may not import a
    later one at its top, so such a method imports it in its body.
    """
    for entry in module.imports:
        if not entry[0].startswith(PACKAGE.name):
            home.imports.add(entry)
    own = {bound(entry) for entry in home.imports}
    own |= {name for p in home.pieces for name in p.names}
    for member in piece.members:
        missing = free_names(member.node) - own - set(dir(builtins))
        if missing:
            names = ", ".join(sorted(missing))
            raise BookError(
                f"{member.where}: moves to {home.chapter.module}.py, which "
                f"does not know {names}; import it in the function's body"
            )


def free_names(node: ast.AST) -> set[str]:
    """Names that a definition reads and does not bind anywhere inside."""
    nodes = list(ast.walk(node))
    names = [n for n in nodes if isinstance(n, ast.Name)]
    free = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    free -= {n.id for n in names if not isinstance(n.ctx, ast.Load)}
    free -= {n.arg for n in nodes if isinstance(n, ast.arg)}
    free -= {
        n.name for n in nodes if isinstance(n, (*FUNCTION, ast.ClassDef))
    }
    return free - {bound(entry) for n in nodes for entry in imported(n)}


def bound(entry: tuple[str, str, str]) -> str:
    """The name that an import binds."""
    source, name, alias = entry
    return alias or name or source.split(".")[0]


# --- Check: a chapter builds on earlier chapters alone --------------------


def check_order(
    chapters: list[Chapter], modules: dict[str, Module]
) -> list[str]:
    """Say where a code cell imports what no earlier chapter exports.

    A function may import its own chapter's module inside its body: a method
    that goes into the class of an earlier chapter has to.
    """
    home = {n: m.chapter for m in modules.values() for n in m.public}
    home |= {name: module.chapter for name, module in modules.items()}
    problems = []
    for chapter in chapters:
        for where, name, inside in package_imports(chapter):
            builder = home.get(name)
            if builder is None:
                problems.append(f"{where}: no chapter exports {name}")
            elif builder.number >= chapter.number + inside:
                names = f"{name} from {builder.path.name}"
                problems.append(f"{where}: imports {names}, not yet built")
    return problems


def package_imports(chapter: Chapter) -> list[tuple[str, str, bool]]:
    """What a chapter imports from the package.

    Returns:
        where, what (the module, or the name taken from ``t5_book`` itself),
        and whether it stands in a function of an export cell.
    """
    found = []
    for cell in chapter.cells:
        tree = parse(cell)
        inner = set()
        if "export" in cell.tags:
            functions = [
                n for n in ast.walk(tree) if isinstance(n, FUNCTION)
            ]
            inner = {id(n) for f in functions for n in ast.walk(f)}
        for node in ast.walk(tree):
            for source, name, _ in sorted(imported(node)):
                package, _, module = source.partition(".")
                if package == PACKAGE.name and (module or name):
                    where = cell.where(node.lineno)
                    found.append((where, module or name, id(node) in inner))
    return found
