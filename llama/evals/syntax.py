"""Python as syntax: what parses, and the functions of a file as texts of their own."""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Function:
    """A function or method without its decorators and its place's indent. It parses by itself."""

    name: str
    code: str
    head_lines: int | None
    """How many lines the signature and the docstring take; None where there is no docstring, or nothing after it."""


def parse(code: str) -> ast.Module | None:
    """The syntax tree; None where there is none, for whatever reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the code that is looked at
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return None


def functions(text: str) -> Iterator[Function]:
    """The functions of a file and the methods of its classes; one inside another function is a part of that."""
    tree = parse(text)
    lines = text.split("\n")  # as the parser counts: a form feed ends no line
    todo: list[ast.stmt] = tree.body[::-1] if tree else []
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ClassDef):
            todo += node.body[::-1]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            # Left out: a string whose lines stand left of the code keeps it from being dedented.
            if parse(code):
                yield Function(node.name, code, _head_lines(node))


def _head_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int | None:
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return None
    end = node.body[0].end_lineno or node.lineno
    return end - node.lineno + 1 if node.body[1].lineno > end else None
