"""Whether token healing helps: the rest of a word, and of a line, at random cursors of files that the model never saw.

A cursor is any character of a line but its end. Both orders are asked for the middle, greedily, up to the end of the
line, with healing and without. Right is what stands in the file.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama.generation import Llama
from llama.requests import Request
from llama.sampling import Sampling
from llama.serve.assemble import Assembler, Parts

BEFORE, AFTER, LONGEST = 700, 300, 64
"""Characters before the cursor, and after its line; and the most tokens of an answer."""


@dataclass(frozen=True)
class Cursor:
    prefix: str
    rest: str
    """Of the line."""
    suffix: str

    @property
    def is_within_a_word(self) -> bool:
        return bool(re.fullmatch(r"\w\w", self.prefix[-1:] + self.rest[:1]))


@dataclass(frozen=True)
class Healed:
    """Shares of cursors."""

    order: str
    healing: bool
    words: float
    """Of those within a word: its rest was right."""
    lines_of_words: float
    lines: float
    """Of all: the line's rest was right."""


def cursors(texts: Sequence[str], n: int, seed: int = 1) -> list[Cursor]:
    """`n` of them. ValueError where no text is long enough."""
    long = [text for text in texts if len(text) > BEFORE]
    if not long:
        raise ValueError(f"no file has {BEFORE} characters: give longer ones")
    rng, found = random.Random(seed), list[Cursor]()
    while len(found) < n:
        text = rng.choice(long)
        at = rng.randrange(200, len(text) - 100)
        end = text.find("\n", at)
        if end >= at + 3:
            found.append(Cursor(text[max(0, at - BEFORE) : at], text[at:end], text[end : end + AFTER]))
    return found


def measure(llama: Llama, places: Sequence[Cursor]) -> list[Healed]:
    """Both orders, with healing and without."""
    found = []
    within = [i for i, place in enumerate(places) if place.is_within_a_word]
    for order in ("psm", "spm"):
        for healing in (False, True):
            written = fill(llama, places, order == "spm", healing)
            words = [_word(text) == _word(place.rest) for text, place in zip(written, places, strict=True)]
            lines = [text == place.rest for text, place in zip(written, places, strict=True)]
            of_words, of_lines = ([right[i] for i in within] for right in (words, lines))
            shares = (sum(right) / max(1, len(right)) for right in (of_words, of_lines, lines))
            found.append(Healed(order, healing, *shares))
    return found


def fill(llama: Llama, places: Sequence[Cursor], suffix_first: bool, healing: bool) -> list[str]:
    """What the model writes at each cursor, up to the end of the line."""
    assembler = Assembler(llama.tokenizer, llama.model.args.max_seq_len, suffix_first=suffix_first, heal=healing)
    made = [assembler.infill(Parts(place.prefix, place.suffix), LONGEST, stop=["\n"]) for place in places]
    requests = [
        Request(llama.tokenizer, one.prompt, LONGEST, Sampling(0.0), ("\n",), row=i, allowed=one.allowed)
        for i, one in enumerate(made)
    ]
    texts = [""] * len(places)
    for event in llama.loop.run(requests):
        texts[event.row] += event.text
    return [text[len(one.healed) :] for text, one in zip(texts, made, strict=True)]


def _word(text: str) -> str:
    return re.split(r"\W", text, maxsplit=1)[0]
