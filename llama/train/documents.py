"""From source files to documents: pieces of a file, single functions, dialogs about code, and texts with a key.

What a model is asked to continue begins at a natural place, with the head of a function or the top of a file, so
that is where documents begin. A file longer than a training sequence is cut before a top-level statement if one is
near enough, else before a method, a blank line, or any line. Single functions are documents too: a completion stops
by itself only if the model has seen functions end. A dialog asks for code in the words of its docstring, its head or
its comment. A text with a key is what a model learns from that it can look up what stands far behind: among functions
that have nothing to do with it stand a few that return a number, and at the end is asserted what they return. (The
loss of plain code hardly rewards that; Code Llama, arXiv 2308.12950, section 3.3, measures it by such texts.)
"""

from __future__ import annotations

import ast
import io
import random
import re
import textwrap
import warnings
from collections import deque
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
_BY_DOCSTRING = (
    "Write a Python function `{name}` that {does}.",
    "Write a Python function that {does}.",
    "Write a function that {does}.",
    "Write a function `{name}({parameters})` that {does}.",
)
_BY_HEAD = (
    "Complete this function:\n{head}",
    "Fill in this Python function:\n{head}",
    "Implement `{name}({parameters})` in Python.",
)
_BY_COMMENT = ("Write Python code that does this: {comment}", "Write Python code for this comment:\n# {comment}")
_SYSTEMS = ("Provide answers in Python", "You are a helpful assistant who writes Python.", "Answer with code only.")
_SYSTEM_RATE = 0.25
"""The part of the dialogs that has a system message."""
_HEAD_RATE = 0.3
"""The part of the functions of which nothing but the head is known, and that are asked for by it all the same."""

_NO_REQUEST = re.compile(r"\b(TODO|FIXME|XXX|HACK|noqa|pragma|type:|pylint|mypy|copyright|licen[cs]e)", re.IGNORECASE)
_KEY = """\
def {name}() -> int:
    \"""Note that this function is used at the end
    \"""
    return {key}


"""
_KEYS = 4
"""How many keys a text may have; the first is `my_function`, as in the paper."""


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
    head: str = ""
    """The code up to its first statement, the docstring included; empty where all stands on one line."""
    parameters: str = ""
    """Their names, between commas; without self or cls."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer; the system message, if there is one, opens the question."""

    request: str
    answer: str
    system: str = ""

    @property
    def question(self) -> str:
        """What the model is shown, in the `[INST]` format."""
        return f"{B_INST} {B_SYS + self.system + E_SYS if self.system else ''}{self.request} {E_INST}"

    @property
    def text(self) -> str:
        """The turn as a conversation that goes on would show it."""
        return f"{self.question} {self.answer} "


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
            own = lines[node.lineno - 1 : node.end_lineno]
            code = textwrap.dedent("".join(own))
            docstring = ast.get_docstring(node) or ""
            body = (node.body[0].end_lineno or 0) if docstring else node.body[0].lineno - 1
            head = "".join(code.splitlines(keepends=True)[: body - node.lineno + 1])
            summary = docstring.split("\n\n")[0].replace("\n", " ").strip()
            # A docstring whose lines stand left of the code keeps textwrap from dedenting; such a function is left out.
            if not code[0].isspace():
                yield Function(node.name, summary, code, head, _parameters(node.args))


def _parameters(args: ast.arguments) -> str:
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return ", ".join(name for name in names if name not in ("self", "cls"))


def turns(text: str, rng: random.Random) -> Iterator[Turn]:
    """The dialogs that a file gives: about each function once, where something can be asked, and about comments."""
    for function in functions(text):
        if turn := ask_for_function(function, rng):
            yield turn
    for comment, code in commented(text):
        if turn := _turn(rng.choice(_BY_COMMENT).format(comment=comment), code, rng):
            yield turn


def ask_for_function(function: Function, rng: random.Random) -> Turn | None:
    """A request whose answer is the function, or None if there is nothing to ask by.

    The docstring's sentence is turned into a request: "Return the sum." becomes "Write a function that returns …".
    Otherwise, and sometimes even so, the head is given and the whole function asked for.
    """
    does = third_person(function.summary)
    has_body = bool(function.head.strip()) and function.head.count("\n") + 1 < function.code.count("\n")
    if does is not None and not function.name.startswith("__") and (not has_body or rng.random() < 0.7):
        request = rng.choice(_BY_DOCSTRING)
    elif has_body and (does is not None or rng.random() < _HEAD_RATE):
        request = rng.choice(_BY_HEAD if function.parameters else _BY_HEAD[:2])
    else:
        return None
    values = vars(function) | {"head": function.head.rstrip("\n"), "does": does}
    return _turn(request.format(**values), function.code, rng)


def _turn(request: str, answer: str, rng: random.Random) -> Turn | None:
    if any(tag in request or tag in answer for tag in SPECIAL_TAGS):
        return None
    system = rng.choice(_SYSTEMS) if rng.random() < _SYSTEM_RATE else ""
    return Turn(request.strip(), answer.strip(), system)


def commented(text: str) -> Iterator[tuple[str, str]]:
    """Comments that say in a sentence what the lines below do, and those lines, dedented: two at least, and they
    parse by themselves."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        start = at
        while at < len(lines) and lines[at].lstrip().startswith("# "):
            at += 1
        if at == start:
            at += 1
            continue
        indent = len(lines[start]) - len(lines[start].lstrip())
        end = at
        while end < len(lines) and lines[end].strip() and _belongs(lines[end], indent):
            end += 1
        comment = " ".join(line.strip().removeprefix("# ").strip() for line in lines[start:at])
        code = textwrap.dedent("\n".join(lines[at:end])) + "\n"
        is_sentence = comment[:1].isupper() and comment.count(" ") >= 3 and len(comment) <= 200
        if is_sentence and end - at >= 2 and not _NO_REQUEST.search(comment) and _parses(code):
            yield comment, code


def _belongs(line: str, indent: int) -> bool:
    """Whether a line goes on with a block at `indent`: not further left, and no new comment beside it."""
    own = len(line) - len(line.lstrip())
    return own > indent or (own == indent and not line.lstrip().startswith("#"))


def with_keys(pool: deque[str], room: int, cost: Callable[[str], int], rng: random.Random) -> Document | None:
    """A text of at most `room` tokens: functions taken off `pool`, among them one to four that return a number of two
    digits, and at the end, in another order, what each returns. None where not a single key fits."""
    names = ["my_function"]
    for code in rng.sample(pool, min(len(pool), 4 * _KEYS)):
        name = code.removeprefix("async ").removeprefix("def ").partition("(")[0]
        if name.isidentifier() and name not in names:
            names.append(name)
    names = names[: rng.randint(1, _KEYS)]
    keys: dict[str, str] = {}  # the function's text to its question's
    left = room
    for name in names:
        key = rng.randrange(10, 100)
        part, question = _KEY.format(name=name, key=key), f"assert {name}() == {key}\n"
        if (size := cost(part) + cost(question)) <= left:
            keys[part] = question
            left -= size
    if not keys:
        return None
    fill: list[str] = []
    later: list[str] = []
    while pool and len(later) < 8:
        code = pool.popleft().rstrip() + "\n\n\n"
        size = cost(code)
        if size <= left and not any(f"def {name}(" in code for name in names):
            fill.append(code)
            left -= size
        elif size <= room // 4:  # a longer one would come back again and again
            later.append(code)
    pool.extend(later)
    for part in keys:
        fill.insert(rng.randint(0, len(fill)), part)
    return Document("".join([*fill, *rng.sample(list(keys.values()), len(keys))]), ends=True)


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


def _parses(text: str) -> bool:
    try:
        _parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)
