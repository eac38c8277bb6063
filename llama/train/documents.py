"""From source files to documents: pieces of a file, single functions, and dialogs about a function.

What a model is asked to continue begins at a natural place, with the head of a function or the top of a file, so
that is where documents begin. A file longer than a training sequence is cut before a top-level statement if one is
near enough, else before a method, a blank line, or any line. Single functions are documents too: a completion stops
by itself only if the model has seen functions end. A dialog asks for a function in the words of its docstring.
"""

from __future__ import annotations

import ast
import io
import random
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llama.prompts import B_INST, B_SYS, E_INST, E_SYS, SPECIAL_TAGS

_TOP_LEVEL, _NESTED, _BLANK, _LINE = range(4)

_IMPERATIVES = frozenset(
    """
    Add Ask Bind Calculate Call Change Check Clear Close Compare Compile Compute Construct Convert Copy
    Create Decode Delete Determine Display Encode Execute Expand Extract Fetch Find Format Generate Get
    Guess Initialize Insert Install Invoke Iterate List Load Make Mark Move Normalize Open Parse Perform
    Print Process Produce Put Query Raise Read Register Remove Replace Reset Resolve Retrieve Return Round
    Run Save Search Send Set Show Split Start Stop Store Transform Turn Update Verify Wait Wrap Write
    """.split()  # noqa: SIM905
)
_REQUESTS = (
    "Write a Python function `{name}` that {does}.",
    "Write a Python function that {does}.",
    "Write a function that {does}.",
)
_SYSTEM = f"{B_SYS}Provide answers in Python{E_SYS}"


@dataclass(frozen=True)
class Document:
    text: str
    ends: bool
    """Whether the text stops where a writer would have stopped, so that eos may follow it."""


@dataclass(frozen=True)
class Function:
    """A function of the corpus, dedented; `summary` is the first line of its docstring, or empty."""

    name: str
    summary: str
    code: str


def cut(text: str, room: int, cost: Callable[[list[str]], list[int]]) -> Iterator[Document]:
    """Cuts a file into documents of at most `room` tokens that, joined, are the file.

    `cost` says how many tokens each of some lines takes, its newline included. A single line that is over `room`
    is left out: it is data, and cutting it would begin a document in the middle of a literal.
    """
    lines = list(io.StringIO(text))  # at newlines alone, as the parser counts: a form feed ends no line
    costs = cost(lines)
    ranks = _rank_cuts(text, lines)
    start = 0
    while start < len(lines):
        end, spent = start, 0
        while end < len(lines) and spent + costs[end] <= room:
            spent += costs[end]
            end += 1
        if end == start:
            start += 1
            continue
        if end < len(lines):
            # The best kind of place within reach, and of those the last.
            end = min(range(start + 1, end + 1), key=lambda at: (ranks[at], -at))
        at_boundary = end == len(lines) or ranks[end] == _TOP_LEVEL
        yield Document("".join(lines[start:end]), ends=at_boundary)
        start = end


def _rank_cuts(text: str, lines: list[str]) -> list[int]:
    """How good a place before each line is to cut at; the lower the better."""
    ranks = [_LINE if line.strip() else _BLANK for line in lines]
    tree = _parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            _mark(ranks, lines, node, _NESTED)
    for statement in tree.body:
        _mark(ranks, lines, statement, _TOP_LEVEL)
    return ranks


def _mark(ranks: list[int], lines: list[str], node: ast.stmt, rank: int) -> None:
    """Ranks the first line that belongs to a statement: its decorators and the comments above belong to it."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    ranks[first] = rank


def functions(text: str) -> Iterator[Function]:
    """The functions and methods of a file, each without its indent; those inside another function belong to that."""
    lines = list(io.StringIO(text))
    todo: list[ast.stmt] = list(reversed(_parse(text).body))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ClassDef):
            todo.extend(reversed(node.body))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            docstring = ast.get_docstring(node) or ""
            # A docstring whose lines stand left of the code keeps textwrap from dedenting; such a function is left out.
            if not code[0].isspace():
                yield Function(node.name, docstring.split("\n\n")[0].replace("\n", " ").strip(), code)


def dialog(function: Function, rng: random.Random) -> str | None:
    """A finished turn in the `[INST]` format whose answer is the function, or None if its docstring asks for nothing.

    The docstring's sentence is turned into a request: "Return the sum." becomes "Write a function that returns …".
    """
    does = third_person(function.summary)
    if does is None or function.name.startswith("__") or any(tag in function.code for tag in SPECIAL_TAGS):
        return None
    system = _SYSTEM if rng.random() < 0.2 else ""
    request = rng.choice(_REQUESTS).format(name=function.name, does=does)
    return f"{B_INST} {system}{request} {E_INST} {function.code.strip()} "


def third_person(summary: str) -> str | None:
    """The first sentence of a docstring as what a function "does", or None if it doesn't begin with a known verb."""
    sentence = summary.split(". ")[0].rstrip(".: ")
    verb, _, rest = sentence.partition(" ")
    if verb not in _IMPERATIVES:
        verb = verb.removesuffix("s")
    if verb not in _IMPERATIVES or not rest or len(sentence) > 160:
        return None
    verb = verb.lower()
    if verb.endswith(("ss", "sh", "ch", "x")):
        return f"{verb}es {rest}"
    return f"{verb[:-1]}ies {rest}" if verb.endswith(("py", "fy", "ry")) else f"{verb}s {rest}"


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)
