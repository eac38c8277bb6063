"""Infilling: one line is taken out of a held-out file; does the model write the same?

The prefix is what stands before the line, the suffix what stands after it, as much of both as the context holds,
nearest lines first. Exact match is a strict measure and an honest one: there is nothing to tune in it. What is asked
for are lines of code, not blank ones, comments or the prose of docstrings, and none so short that it is guessed. The
same lines can be asked for without what stands after them: so it shows what a model makes of a suffix.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from llama.evals.batches import batches
from llama.evals.intervals import Share, share
from llama.evals.sources import Source, choose, with_text
from llama.evals.syntax import parse
from llama.generation import Llama
from llama.tokenizer import Tokenizer

SHORTEST, LONGEST = 8, 80
"""Characters of a line without its indent. A longer one is mostly a literal, a shorter one `else:` or `try:`."""
Order = Literal["psm", "spm", "none"]
"""How the gap is put: prefix first, suffix first, or as a plain completion that doesn't know of the suffix."""
_MARKS = 5  # tokens of a prompt besides prefix and suffix: bos, three marks, the space that is put before a text


@dataclass(frozen=True)
class Hole:
    """prefix + line + suffix stand so in the file; the line has its indent, and no newline."""

    path: str
    number: int
    prefix: str
    line: str
    suffix: str


@dataclass(frozen=True)
class Filled:
    hole: Hole
    text: str
    exact: bool


@dataclass(frozen=True)
class Lines:
    exact: Share
    """All that the model wrote is the line, but for white space around it."""
    first_line: Share
    """The first line it wrote is: the line was known, whether or not the model stopped there."""
    samples: tuple[Filled, ...]


def infill_lines(
    llama: Llama,
    sources: Sequence[Source],
    n: int = 500,
    context: int | None = None,
    order: Order = "psm",
    seed: int = 0,
    progress: bool = False,
) -> Lines:
    """Greedy infilling of `n` lines chosen by hash (fewer, where there aren't as many).

    Prompt and answer together take at most `context` tokens (default: max_seq_len). Raises ValueError where there is
    no line to fill, where the context is too small, and where the checkpoint can't infill.
    """
    if order not in get_args(Order):
        raise ValueError(f"an order {order!r}; there are {', '.join(get_args(Order))}")
    limit = llama.model.args.max_seq_len
    context = limit if context is None else context
    room = context - LONGEST - _MARKS
    if not 0 < room <= limit - LONGEST - _MARKS:
        raise ValueError(f"a context of {context} tokens; give {LONGEST + _MARKS + 1} to {limit}, or build with more")
    files = with_text(sources)
    texts = {source.path: source.text.split("\n") for source in files}
    places = ((source.path, number) for source in files for number in candidates(source.text))
    chosen = choose(places, n, lambda place: f"{place[0]} {place[1]}", seed)
    if not chosen:
        raise ValueError(
            f"the {len(files)} source files have no line of code of {SHORTEST} to {LONGEST} characters; give others"
        )
    asked = [hole(llama.tokenizer, path, texts[path], number, room) for path, number in chosen]
    samples: list[Filled] = []
    first_lines = 0
    for batch in batches(llama, asked, "lines", progress):
        before, after = [h.prefix for h in batch], [h.suffix for h in batch]
        if order == "none":
            completed = llama.text_completion(before, 0.0, max_gen_len=LONGEST, stop="\n")
            texts_written = [result["generation"] for result in completed]
        else:
            filled = llama.text_infilling(before, after, 0.0, max_gen_len=LONGEST, suffix_first=order == "spm")
            texts_written = [result["generation"] for result in filled]
        for h, text in zip(batch, texts_written, strict=True):
            written, wanted = text.strip(), h.line.strip()
            samples.append(Filled(h, text, written == wanted))
            first_lines += written.split("\n")[0].rstrip() == wanted
    return Lines(share(sum(s.exact for s in samples), len(samples)), share(first_lines, len(samples)), tuple(samples))


def candidates(text: str) -> Iterator[int]:
    """Numbers, from 0, of the lines of code that may be asked for; none in a file that doesn't parse."""
    tree = parse(text)
    if tree is None:
        return
    prose: set[int] = set()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno != node.lineno
        if is_text and isinstance(node, ast.expr):
            prose.update(range(node.lineno - 1, node.end_lineno or node.lineno))
    for number, line in enumerate(text.split("\n")):
        code = line.strip()
        if SHORTEST <= len(code) <= LONGEST and number not in prose and not code.startswith(("#", '"""', "'''")):
            yield number


def hole(tokenizer: Tokenizer, path: str, lines: Sequence[str], number: int, room: int) -> Hole:
    """A line and as many whole lines around it as `room` tokens hold: one before and one after in turn, the nearest
    first; where one side has no more, or its next line doesn't fit, the other goes on."""
    before = [line + "\n" for line in lines[:number]]
    after = ["\n" + line for line in lines[number + 1 :]]
    sides = [iter(reversed(before)), iter(after)]
    taken: list[list[str]] = [[], []]
    open_sides = [0, 1]
    while open_sides:
        side = open_sides.pop(0)
        piece = next(sides[side], None)
        # A newline is a token of its own, so the tokens of lines add up.
        cost = 0 if piece is None else len(tokenizer.encode_infilling(piece))
        if piece is not None and cost <= room:
            room -= cost
            taken[side].append(piece)
            open_sides.append(side)
    return Hole(path, number, "".join(reversed(taken[0])), lines[number], "".join(taken[1]))
