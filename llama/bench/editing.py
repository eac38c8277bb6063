"""What guessing ahead brings: tokens a second with prompt lookup and without, where code repeats and where it doesn't.

What a guess saves depends on how often it is right, and that on what is written. Three kinds of text stand for what
happens: a function that is written again with one of its names changed (*edit*), a function that goes on as its author
wrote it (*continue*), and ids drawn at random, where no guess can be right (*random*). The model computes as ever, but
what it writes is laid down: so any shape can be measured, also with random weights, and all see the same text. With a
real checkpoint its *own* text can be measured as well: what it writes after the same prompts by itself.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from llama.bench.measures import draw_prompts
from llama.bench.rounds import Spread, Timer, interleave, ratios, spread
from llama.cache import KVCache, Span
from llama.evals.intervals import Share, share
from llama.evals.sources import Source, choose, with_text
from llama.evals.syntax import functions
from llama.generation import Llama
from llama.model import Transformer
from llama.prompts import Prompt
from llama.tokenizer import Tokenizer

BEFORE, AFTER = "# Before\n", "\n\n# After\n"
BEGUN = 8  # tokens of the second time that the prompt has already
CERTAIN = 1e9  # more than any score


@dataclass(frozen=True)
class Case:
    """A prompt, and how many tokens are to follow it: those of `script`, or the model's own."""

    kind: str
    prompt: list[int]
    n: int
    script: list[int] | None = None
    temperature: float = 0.0


def cases(
    tokenizer: Tokenizer, words: int, sources: Sequence[Source], room: int, most: int, each: int, own: bool
) -> list[Case]:
    """`each` cases of every kind, of at most `most` new tokens, that fit into `room` tokens.

    With `own` also what the model writes by itself: greedily after an edit has begun, and sampled at temperature 1
    where code goes on (a small model's greedy text repeats itself). Raises ValueError where the sources have too few
    functions that fit.
    """
    found: list[Case] = []
    codes = {f.code.strip() for source in with_text(sources) for f in functions(source.text)}
    for code in choose(codes, None, lambda code: code):
        changed = rename(code)
        if changed is None:
            continue
        before = tokenizer.encode(BEFORE + code + AFTER, bos=True, eos=False)
        after = tokenizer.encode_infilling(changed)
        if len(before) + len(after) > room or len(after) < 4 * BEGUN:
            continue
        prompt, answer = before + after[:BEGUN], after[BEGUN:][:most]
        whole = tokenizer.encode(code, bos=True, eos=False)
        head, rest = whole[: len(whole) // 4], whole[len(whole) // 4 :][:most]
        found += [Case("edit", prompt, len(answer), answer), Case("continue", head, len(rest), rest)]
        if own:
            found += [Case("edit, own", prompt, len(answer)), Case("continue, own", head, len(rest), None, 1.0)]
        if sum(case.kind == "edit" for case in found) == each:
            return found + _random_cases(words, room, most, each)
    raise ValueError(
        f"the sources have fewer than {each} functions that fit twice into {room} tokens: give more source files, "
        "fewer --prompts, or a larger --max_seq_len"
    )


def _random_cases(words: int, room: int, most: int, each: int) -> list[Case]:
    ids = draw_prompts(words, each, min(room, 2 * most))
    return [Case("random", row[: len(row) // 2], len(row) - len(row) // 2, row[len(row) // 2 :]) for row in ids]


def rename(code: str) -> str | None:
    """The code with its most frequent name changed; None where no name comes three times."""
    nodes = list(ast.walk(ast.parse(code)))
    names = Counter(
        [node.id for node in nodes if isinstance(node, ast.Name)] + [n.arg for n in nodes if isinstance(n, ast.arg)]
    )
    frequent = [(-count, name) for name, count in names.items() if count >= 3 and not keyword.iskeyword(name)]
    if not frequent:
        return None
    name = min(frequent)[1]
    return re.sub(rf"\b{name}\b", f"new_{name}", code)


class Watched:
    """A model whose passes are counted, and which finds likeliest what a script says.

    It is one more around another: what it doesn't know, the model answers.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.passes = self.read = 0
        self.text: list[int] | None = None
        """Prompt and script; None: the model's own scores stand."""
        self._next: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden(self, tokens: Tensor, span: Span, cache: KVCache) -> Tensor:
        self.passes, self.read = self.passes + 1, self.read + tokens.shape[1]
        if self.text is not None:
            start = span.starts[0]
            following = self.text[start + 1 : start + 1 + tokens.shape[1]]
            self._next = following + [0] * (tokens.shape[1] - len(following))  # after the end anything will do
        return self.model.hidden(tokens, span, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        scores = self.model.logits(hidden)
        if self.text is not None:
            rows = scores.view(-1, scores.shape[-1])
            told = torch.tensor(self._next[-len(rows) :], device=scores.device)
            rows[torch.arange(len(rows), device=scores.device), told] = CERTAIN
        return scores


@dataclass(frozen=True)
class Guessing:
    """One kind of text: speed with `lookup` over speed without, and how often guesses were right."""

    kind: str
    prompts: int
    tokens: int
    """Written in each round, after the first of each answer."""
    without: Spread
    """Tokens/s."""
    with_lookup: Spread
    ratio: Spread
    accepted: Share | None
    """Of the guessed tokens; None where none was guessed."""
    tokens_per_pass: float


@dataclass
class _Count:
    tokens: int = 0
    passes: int = 0
    read: int = 0


def editing(
    llama: Llama,
    asked: Sequence[Case],
    lookup: int,
    rounds: int,
    timer: Timer | None = None,
    progress: bool = False,
) -> list[Guessing]:
    """Every kind of case with `lookup` tokens guessed at a time and with none, in turns; one row, greedily but where
    a case says otherwise. The model must have room for the longest case."""
    watched = Watched(llama.model)
    kinds = list(dict.fromkeys(case.kind for case in asked))
    counts: dict[tuple[str, int], _Count] = {}
    tasks: dict[tuple[str, int], Callable[[Timer], float]] = {}
    for kind in kinds:
        for most in (0, lookup):
            own = [case for case in asked if case.kind == kind]
            writer = Llama(cast(Transformer, watched), llama.tokenizer, ranks=llama.ranks, lookup=most)
            writer.loop.chunk = llama.prefill_chunk
            tasks[kind, most] = _writing(writer, watched, own, counts, (kind, most))
    timer = timer or Timer.of(llama.ranks.device)
    seconds = interleave(tasks, rounds, timer, what="editing", progress=progress)
    return [_guessing(kind, lookup, asked, counts, seconds) for kind in kinds]


def _guessing(
    kind: str,
    lookup: int,
    asked: Sequence[Case],
    counts: Mapping[tuple[str, int], _Count],
    seconds: Mapping[tuple[str, int], Sequence[float]],
) -> Guessing:
    count = counts[kind, lookup]
    rates = {most: [counts[kind, most].tokens / s for s in seconds[kind, most]] for most in (0, lookup)}
    guessed = count.read - count.passes
    return Guessing(
        kind,
        sum(case.kind == kind for case in asked),
        count.tokens,
        spread(rates[0]),
        spread(rates[lookup]),
        spread(ratios(rates[lookup], rates[0])),
        share(min(count.tokens - count.passes, guessed), guessed) if guessed else None,
        count.tokens / max(count.passes, 1),
    )


def _writing(
    llama: Llama, watched: Watched, own: Sequence[Case], counts: dict[tuple[str, int], _Count], name: tuple[str, int]
) -> Callable[[Timer], float]:
    def task(timer: Timer) -> float:
        total, count = 0.0, _Count()
        for seed, case in enumerate(own):
            watched.text = None if case.script is None else case.prompt + case.script
            prompt = Prompt(case.prompt, frozenset())
            stream = llama.stream([prompt], case.n, case.temperature, 1.0, seed=seed)
            next(stream)  # what reading the prompt takes is the same with guesses and without
            watched.passes = watched.read = 0
            begin = timer.now()
            count.tokens += sum(len(event.tokens) for event in stream)
            total += timer.now() - begin
            count.passes, count.read = count.passes + watched.passes, count.read + watched.read
        counts[name] = count
        return total

    return task
