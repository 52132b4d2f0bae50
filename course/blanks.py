"""Functions as pieces of source text: find one, take its body out, put another in.

Everything works on whole lines, by the positions that `ast` gives, so that comments and layout elsewhere
stay as they are.
"""
import ast
import copy
import textwrap
from typing import NamedTuple


class Piece(NamedTuple):
    """Where a function is in a text. `first` and `end` count lines from 0: its body without the docstring."""
    node: ast.FunctionDef
    first: int
    end: int


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


def transplant(source: str, name: str, other: str) -> str:
    """`source` with the body that the function has in the text `other`, and nothing else of it.

    The statements are written from their syntax tree, since `other` may be indented by tabs or by 2 spaces.
    Raises as `find` does, and ValueError where the signature differs.
    """
    ours, theirs = signature(source, name), signature(other, name)
    if ours != theirs:
        raise ValueError(f"its signature is {theirs}, not {ours}")
    node = find(other, name).node
    statements = node.body[ast.get_docstring(node) is not None:]
    text = "\n".join(map(ast.unparse, statements)) or "pass"
    return replace_body(source, name, textwrap.indent(text, " " * (find(source, name).node.col_offset + 4)))
