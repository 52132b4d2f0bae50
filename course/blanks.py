"""Functions as pieces of source text: find one, take its body out, put another in.

Everything works on whole lines, by the positions that `ast` gives, so that comments and layout elsewhere
stay as they are. What a student's body uses of the helpers and imports that the student added to the file
comes with it, inside the function: there it can replace nothing else.
"""
import ast
import copy
import functools
import symtable
import textwrap
from typing import NamedTuple


class Piece(NamedTuple):
    """Where a function is in a text. `first` and `end` count lines from 0: its body without the docstring."""
    node: ast.FunctionDef
    first: int
    end: int


@functools.lru_cache(maxsize=64)
def find(source: str, name: str) -> Piece:
    """The function with this qualified name, "random_mask" or "Encoder.forward".

    Of two with one name Python takes the last, and so does this. Raises KeyError where there is none,
    ValueError for a function on one line, SyntaxError where the text does not parse.
    """
    nodes = ast.parse(source).body
    for part in name.split("."):
        found = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                 and node.name == part]
        if not found:
            raise KeyError(name)
        nodes = found[-1].body
    node = found[-1]
    if not isinstance(node, ast.FunctionDef):
        raise KeyError(name)
    documented = ast.get_docstring(node) is not None
    first = nodes[0].end_lineno if documented else nodes[0].lineno - 1
    if first < node.lineno:
        raise ValueError("it is on one line: put its body on the lines below")
    return Piece(node, first, node.end_lineno)


def function(source: str, name: str) -> str:
    """The function's text without its decorators."""
    piece = find(source, name)
    return "".join(source.splitlines(keepends=True)[piece.node.lineno - 1:piece.end])


def body(source: str, name: str) -> str:
    """The body's own text, comments and indentation included, without the docstring."""
    piece = find(source, name)
    return "".join(source.splitlines(keepends=True)[piece.first:piece.end])


def replace_body(source: str, name: str, text: str) -> str:
    """The source with `text`, indented as it has to be, for the body; signature and docstring stay."""
    piece, lines = find(source, name), source.splitlines(keepends=True)
    return "".join([*lines[:piece.first], text.rstrip("\n") + "\n", *lines[piece.end:]])


def blank(source: str, name: str, message: str) -> str:
    """The source with `raise NotImplementedError(message)` for the body."""
    indent = " " * (find(source, name).node.col_offset + 4)
    return replace_body(source, name, f'{indent}raise NotImplementedError("{message}")')


def signature(source: str, name: str) -> str:
    """Decorators, arguments and defaults as text, without spaces, comments and annotations."""
    node = find(source, name).node
    arguments = copy.deepcopy(node.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return "".join(f"@{ast.unparse(d)} " for d in node.decorator_list) + f"({ast.unparse(arguments)})"


def bound(statement) -> list:
    """The names that a statement at a module's top defines: a function, a class, an import, an assignment to
    names. None of any other statement."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in statement.names if alias.name != "*"]
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value:
        names = [name for target in targets for name in getattr(target, "elts", [target])]
        if all(isinstance(name, ast.Name) for name in names):
            return [name.id for name in names]
    return []


def used(statement) -> set:
    """The names that a statement, or anything in it, looks up in its module."""
    found, tables = set(), [symtable.symtable(ast.unparse(statement), "statement", "exec")]
    while tables:
        table = tables.pop()
        found |= {s.get_name() for s in table.get_symbols()
                  if s.is_global() and s.is_referenced() or s.is_declared_global()}
        tables += table.get_children()
    return found


def new_part(statement, old: set):
    """The statement, if all names that it defines are new; of an import the new ones, and
    `import scipy.linalg` beside an old `scipy`. Else None."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        names = [alias for alias in statement.names
                 if (alias.asname or alias.name).split(".")[0] not in {*old, "*"}
                 or isinstance(statement, ast.Import) and "." in alias.name and not alias.asname]
        statement = copy.copy(statement)
        statement.names = names
        return statement if names else None
    names = bound(statement)
    return statement if names and not old & {*names} else None


def added(clean: ast.Module, theirs: ast.Module, names: set) -> list:
    """The statements of `theirs` that define `names`, and what these use in turn, in the file's order. What
    `clean` defines is never among them."""
    old = {name for statement in clean.body for name in bound(statement)}
    new = [part for statement in theirs.body if (part := new_part(statement, old))]
    taken, wanted = set(), set(names)
    while wanted:
        name = wanted.pop()
        for i, statement in enumerate(new):
            if i not in taken and name in bound(statement):
                taken.add(i)
                wanted |= used(statement)
    return [new[i] for i in sorted(taken)]


def transplant(source: str, name: str, other: str) -> str:
    """`source` with the body that the function has in the text `other`, and with what that body uses of the
    helpers, constants and imports that `other` has more than `source`. These go into the function:

        def _added():
            import itertools
            return itertools
        itertools = _added()
        <the body>

    The statements are written from their syntax tree, since `other` may be indented by tabs or by 2 spaces.
    Raises as `find` does, and ValueError where the signature differs.
    """
    ours, theirs = signature(source, name), signature(other, name)
    if ours != theirs:
        raise ValueError(f"its signature is {theirs}, not {ours}")
    node = copy.deepcopy(find(other, name).node)
    node.decorator_list, node.returns = [], None
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    statements = node.body[ast.get_docstring(node) is not None:]
    needed = used(node)
    helpers = added(ast.parse(source), ast.parse(other), needed)
    taken = {name for helper in helpers for name in bound(helper)}
    for part in ast.walk(ast.Module([node, *helpers], [])):
        if isinstance(part, ast.Global) and taken & {*part.names}:
            raise ValueError(f"`global {part.names[0]}`: what a call leaves for the next one is not taken")
    text = "\n".join(map(ast.unparse, statements)) or "pass"
    if names := sorted(needed & taken):
        lines = [*map(ast.unparse, helpers), f"return {', '.join(names)}"]
        text = (f"def _added():\n{textwrap.indent(chr(10).join(lines), '    ')}\n"
                f"{', '.join(names)} = _added()\n{text}")
    return replace_body(source, name, textwrap.indent(text, " " * (find(source, name).node.col_offset + 4)))
