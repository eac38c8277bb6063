"""Does a model read the rest of the repository? Line completion with 0, 256, 1,024 … tokens of it before the file.

A line of code is taken, and with it everything that stands behind it in its file. The model reads, in this order:

1. Other files of the same repository, `context` tokens of them. A file's repository is the first folder of its path.
   The nearest come first: those in the same folder, then those with the fewest steps between the two folders, among
   equals by path. They are taken whole until one doesn't fit; of that one, the first lines that do. The nearest stands
   last, directly before the file, so a larger context shows all of a smaller one and more before it.
2. The file itself up to the line, the nearest `own` tokens of it by whole lines. This part is the same at every
   context, and with a context of 0 it is all there is.

Each file is introduced by a comment line with its path. The model writes greedily up to the newline. Its line is
*exact* if it is the line that was taken, white space at both ends aside; *edit similarity* is 1 - Levenshtein's
distance / the longer one's length. All contexts are asked for the same lines, so two rates differ by the context alone,
and the difference of each to the smallest context has an interval of its own, over files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import Unpack

from llama.config import ModelArgs
from llama.evals.batches import batches
from llama.evals.intervals import Estimate, Share, ratio, share
from llama.evals.lines import LONGEST, candidates
from llama.evals.record import Record, begin
from llama.evals.sources import Source, choose, with_text
from llama.evals.table import number, percent, render
from llama.front import load as build
from llama.generation import Llama
from llama.longcontext.perplexity import (
    error_bars,
    metric,
    read_texts,
    report,
    rope_of,
    trained_length,
    warn_beyond,
)
from llama.options import Amount, Amounts, Count, Loading, MaybeCount, MaybeSources, Out, Seed
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = 2  # tokens of a prompt besides those of its lines: bos, and the space that is put before every text


@dataclass(frozen=True)
class Line:
    """A line that is asked for, and what stands before it in its file, introduced by its path."""

    path: str
    number: int
    """From 0."""
    text: str
    before: str


@dataclass(frozen=True)
class Completed:
    line: Line
    context: int
    text: str
    """What the model wrote."""
    exact: bool
    similarity: float


@dataclass(frozen=True)
class ByContext:
    """Of all lines, with at most `context` tokens of other files."""

    context: int
    given: float
    """How many there were, on average: a small repository has no more."""
    exact: Share
    similarity: Estimate
    """Intervals of this and of the gains are over files."""
    exact_gain: Estimate
    similarity_gain: Estimate
    """The differences to the smallest context."""


@dataclass(frozen=True)
class Completion:
    own: int
    lines: int
    files: int
    by_context: tuple[ByContext, ...]
    samples: tuple[Completed, ...]
    """Of each context in turn, the lines in one order."""


def complete_lines(
    llama: Llama,
    sources: Sequence[Source],
    contexts: Sequence[int],
    n: int | None = 200,
    own: int | None = None,
    *,
    one_repository: bool = False,
    trained: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Completion:
    """Greedy completion of `n` lines (None: all) chosen by a hash, at each of `contexts`: so many tokens of other
    files, or 0.

    `own` is how many tokens of the line's own file there may be (default: what the largest context leaves of
    max_seq_len). `one_repository` says that all sources are one. Warns where prompts go beyond `trained` (default:
    what `trained_length` knows). Raises ValueError where contexts don't fit, and where no file with a line to ask for
    has another file beside it.
    """
    args = llama.model.args
    asked = sorted(set(contexts))
    left = args.max_seq_len - max(asked, default=0) - LONGEST - _MARKS
    own = left if own is None else own
    if not asked or asked[0] < 0 or not 1 <= own <= left:
        raise ValueError(
            f"contexts {list(contexts)} and {own} tokens of the file itself, in a model built for {args.max_seq_len}; "
            f"give contexts of 0 or more, and build with a max_seq_len of at least {max(asked, default=0)} + "
            f"{max(1, own)} + {LONGEST + _MARKS}"
        )
    warn_beyond(asked[-1] + own + LONGEST + _MARKS, trained_length(args) if trained is None else trained)
    repositories = Repositories(llama.tokenizer, with_text(sources), one_repository)
    lines = repositories.choose_lines(n, own, seed)
    samples: list[Completed] = []
    found: list[ByContext] = []
    for context in asked:
        others = [repositories.context(line.path, context) for line in lines]
        prompts = [text + line.before for line, (text, _) in zip(lines, others, strict=True)]
        texts: list[str] = []
        for batch in batches(llama, prompts, f"{context} tokens of context", progress):
            results = llama.text_completion(batch, 0.0, max_gen_len=LONGEST, stop="\n")
            texts += (result["generation"] for result in results)
        here = [_judged(line, context, text) for line, text in zip(lines, texts, strict=True)]
        samples += here
        given = sum(tokens for _, tokens in others) / len(lines)
        found.append(_by_context(here, samples[: len(lines)], given))
    files = {line.path for line in lines}
    return Completion(own, len(lines), len(files), tuple(found), tuple(samples))


def _judged(line: Line, context: int, text: str) -> Completed:
    written, wanted = text.strip(), line.text.strip()
    return Completed(line, context, text, written == wanted, edit_similarity(written, wanted))


def _by_context(here: Sequence[Completed], least: Sequence[Completed], given: float) -> ByContext:
    """`least` has the same lines at the smallest context."""
    files = {path: i for i, path in enumerate(sorted({sample.line.path for sample in here}))}

    def over_files(value: Callable[[Completed], float], less: bool = False) -> Estimate:
        sums, counts = [0.0] * len(files), [0] * len(files)
        for sample, before in zip(here, least, strict=True):
            i = files[sample.line.path]
            sums[i] += value(sample) - (value(before) if less else 0.0)
            counts[i] += 1
        return ratio(sums, counts)

    return ByContext(
        here[0].context,
        given,
        share(sum(sample.exact for sample in here), len(here)),
        over_files(lambda sample: sample.similarity),
        over_files(lambda sample: float(sample.exact), less=True),
        over_files(lambda sample: sample.similarity, less=True),
    )


class Repositories:
    """Sources as repositories, and what each line costs in tokens."""

    def __init__(self, tokenizer: Tokenizer, sources: Sequence[Source], one_repository: bool = False) -> None:
        self._tokenizer = tokenizer
        self._texts = {source.path: source.text for source in sources}
        self._priced: dict[str, list[tuple[str, int]]] = {}
        self._one = one_repository
        self._members: dict[str, list[str]] = {}
        for path in sorted(self._texts):
            self._members.setdefault(self.repository(path), []).append(path)

    def repository(self, path: str) -> str:
        """The first folder of a path; files without one are a repository together."""
        return "" if self._one or "/" not in path else path.split("/")[0]

    def nearest(self, path: str) -> list[str]:
        """The other files of its repository, in the order in which they are taken."""
        others = (other for other in self._members[self.repository(path)] if other != path)
        return sorted(others, key=lambda other: (steps_between(path, other), other))

    def choose_lines(self, n: int | None, own: int, seed: int = 0) -> list[Line]:
        """`n` lines of files that have another beside them, each with at most `own` tokens before it."""
        shared = [path for path in self._texts if len(self._members[self.repository(path)]) > 1]
        places = ((path, i) for path in shared for i in candidates(self._texts[path]))
        chosen = choose(places, n, lambda place: f"{place[0]} {place[1]}", seed)
        if not chosen:
            raise ValueError(
                f"of {len(self._texts)} files, {len(shared)} have another of their repository (the first folder of "
                "their paths) beside them, and none of these has a line of code to ask for: give the folder above the "
                "repositories, or say that all files are one (--one_repository)"
            )
        return [Line(path, i, self._texts[path].split("\n")[i], self.before(path, i, own)) for path, i in chosen]

    def before(self, path: str, line: int, room: int) -> str:
        """The path as a comment, and the last whole lines before line number `line`, in at most `room` tokens."""
        (header, cost), *lines = self._lines(path)
        if cost > room:
            return ""
        room -= cost
        taken: list[str] = []
        for text, cost in reversed(lines[:line]):
            if cost > room:
                break
            room -= cost
            taken.append(text)
        return header + "".join(reversed(taken))

    def context(self, path: str, room: int) -> tuple[str, int]:
        """What is shown of the other files, and its tokens: at most `room`."""
        parts: list[str] = []
        left = room
        for other in self.nearest(path):
            lines = self._lines(other)
            shown, cost = 0, 0
            while shown < len(lines) and cost + lines[shown][1] <= left:
                cost += lines[shown][1]
                shown += 1
            if shown > 1:  # a path without a line says nothing
                parts.append("".join(text for text, _ in lines[:shown]))
                left -= cost
            if shown < len(lines):
                break
        return "".join(reversed(parts)), room - left

    def _lines(self, path: str) -> list[tuple[str, int]]:
        """A file's lines, its path as a comment before them and a blank line after, each with its tokens."""
        if path not in self._priced:
            lines = [f"# {path}", *self._texts[path].split("\n")]
            texts = [line + "\n" for line in (lines if lines[-1] == "" else [*lines, ""])]
            # A newline is a token of its own, so the tokens of lines add up.
            self._priced[path] = [(text, len(self._tokenizer.encode_infilling(text))) for text in texts]
        return self._priced[path]


def steps_between(one: str, other: str) -> int:
    """How many folders one goes up and down from one file to another: 0 within a folder."""
    here, there = one.split("/")[:-1], other.split("/")[:-1]
    same = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    return len(here) + len(there) - 2 * same


def edit_similarity(one: str, other: str) -> float:
    """1 - Levenshtein's distance / the longer length, in characters; 1 for two empty texts."""
    longest = max(len(one), len(other))
    return 1.0 if longest == 0 else 1 - levenshtein(one, other) / longest


def levenshtein(one: str, other: str) -> int:
    """The fewest characters to insert, delete or replace that make one text the other (Wagner and Fischer, 1974)."""
    letters = np.frombuffer(other.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    places = np.arange(len(other) + 1)
    row = places  # from the empty beginning of `one` to each beginning of `other`
    for i, letter in enumerate(one, start=1):
        above = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))  # deleted, or replaced
        # An insertion costs 1 a place, so less its place, each entry is the least of those before it.
        row = np.minimum.accumulate(np.concatenate([[i], above]) - places) + places
    return int(row[-1])


# What is written -----------------------------------------------------------------------------------------------------


def rows_of(found: Completion, args: ModelArgs) -> Iterator[dict[str, Any]]:
    """One row a figure. `n` counts the units of the interval: lines for `exact`, files for the others."""
    for by in found.by_context:
        place = {**rope_of(args), "context": by.context, "given": round(by.given, 1), "lines": found.lines}
        yield {**place, **metric("exact", rate_of(by.exact))}
        yield {**place, **metric("edit_similarity", by.similarity)}
        yield {**place, **metric("exact_gain", by.exact_gain)}
        yield {**place, **metric("edit_similarity_gain", by.similarity_gain)}


def rate_of(found: Share) -> Estimate:
    return Estimate(found.rate, found.low, found.high, found.n)


def draw(found: Completion, figure: Figure) -> None:
    """Exact match and edit similarity by context, with their intervals."""
    exact = [rate_of(by.exact) for by in found.by_context]
    similar = [by.similarity for by in found.by_context]
    places = range(len(found.by_context))
    names = [str(by.context) for by in found.by_context]
    for axes, values, title in zip(
        figure.subplots(1, 2), (exact, similar), ("exact match", "edit similarity"), strict=True
    ):
        axes.errorbar(places, [value.value for value in values], error_bars(values), marker="o", capsize=3)
        axes.set_xticks(places, names)
        axes.set_ylim(0, math.ceil(10 * max(value.high for value in values) + 0.1) / 10)
        axes.set_xlabel("tokens of other files")
        axes.set_title(f"{title}, {found.lines} lines of {found.files} files", fontsize="medium")


def command(
    *,
    sources: MaybeSources = None,
    contexts: Amounts = (0, 128, 256),
    own: Count = 128,
    lines: MaybeCount = 200,
    one_repository: bool = False,
    trained: MaybeCount = None,
    seed: Seed = 0,
    show: Amount = 0,
    out: Out = "longcontext",
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Lines completed with so many tokens of their repository before them: OUT/completion.csv, .json and .png.

    Args:
        sources: a folder of Python repositories, or a corpus (the standard library counts as one repository).
        contexts: tokens of other files: 0,512,2048.
        own: tokens of the line's own file before it.
        lines: how many lines, chosen by a hash (none: all).
        one_repository: all files are one repository, whatever their folders.
        trained: the context the model was trained on, where its files don't say: longer prompts are warned of.
        seed: of the choice.
        show: for how many of the lines to print what was written, above the table.
        out: the folder of the results.
        json: print JSON instead of the table.
    """
    started, texts = begin(out), read_texts(sources)
    options: Loading = {"max_seq_len": max(contexts, default=0) + own + LONGEST + _MARKS, **loading}
    llama = build(**options)
    whole = one_repository or sources is None
    limits: dict[str, Any] = {"one_repository": whole, "trained": trained, "seed": seed, "progress": True}
    found = complete_lines(llama, texts, contexts, lines, own, **limits)
    shown = ""
    for i in range(min(show, found.lines)):
        line = found.samples[i].line
        shown += f"# {line.path}, line {line.number + 1}\n{'the file':>10}: {line.text}\n"
        for sample in found.samples[i :: found.lines]:
            shown += f"{sample.context:>10}: {sample.text}\n"
    rows = [
        (str(by.context), f"{by.given:.0f}", percent(by.exact), number(by.similarity), number(by.similarity_gain))
        for by in found.by_context
    ]
    made_of: dict[str, Any] = {
        "sources": sources,
        "one_repository": whole,
        "own": own,
        "lines": found.lines,
        "files": found.files,
    }
    made_of |= {"seed": seed, "trained": trained, "options": loading}
    record = Record("completion", list(rows_of(found, llama.model.args)), made_of)
    header = ("context", "given", "exact match", "edit similarity", "gained")
    report(llama, record, out, started, shown + render(header, rows), lambda figure: draw(found, figure), json)
