"""Training sequences for infilling: a document's middle moved to its end, so that a causal model learns to fill gaps.

A document is cut at two characters chosen uniformly (Code Llama, arXiv 2308.12950, section 2.3, after Bavarian et
al., arXiv 2207.14255). Such a middle is a third of the document on average, and hardly ever what an editor asks for: a
line or the rest of one. A model that reads billions of tokens sees enough of those all the same; for a small one there
is a second kind of cut, at the ends of lines. Each sequence is a prompt as prompts.py asks it, prefix-suffix-middle or
suffix-prefix-middle, with its answer. In the second form prefix and middle are encoded as one text, as the published
models were trained: so the model also learns to go on from a prefix that ends within a token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from llama.prompts import infilling
from llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Split:
    """A document in three parts: prefix + middle + suffix."""

    prefix: str
    middle: str
    suffix: str


def split(text: str, rng: random.Random) -> Split:
    """Cuts at two places between characters, each equally likely, the ends included."""
    first, second = sorted(rng.randint(0, len(text)) for _ in range(2))
    return Split(text[:first], text[first:second], text[second:])


def split_lines(text: str, rng: random.Random) -> Split:
    """Cuts out one to three lines, mostly one, up to the end of the last, the first not blank; a quarter of the time
    not from the first one's start, but from any character of it."""
    lines = text.split("\n")
    number = rng.choice([at for at, line in enumerate(lines) if line.strip()] or [0])
    count = min(rng.choice((1, 1, 1, 1, 1, 1, 2, 3)), len(lines) - number)
    start = sum(len(line) + 1 for line in lines[:number])
    end = start + sum(len(line) + 1 for line in lines[number : number + count]) - 1
    if rng.random() < 0.25:
        start += rng.randint(0, len(lines[number]))
    return Split(text[:start], text[start:end], text[end:])


def prefix_first(tokenizer: Tokenizer, parts: Split) -> list[int]:
    """PSM: bos, PRE, prefix, SUF, suffix, MID, middle, EOT."""
    prompt = infilling(tokenizer, parts.prefix, parts.suffix).tokens
    assert tokenizer.eot_id is not None
    return [*prompt, *tokenizer.encode_infilling(parts.middle), tokenizer.eot_id]


def suffix_first(tokenizer: Tokenizer, parts: Split) -> list[int]:
    """SPM: bos, PRE, SUF, suffix, MID, prefix and middle as one text, EOT."""
    prompt = infilling(tokenizer, "", parts.suffix, suffix_first=True).tokens
    assert tokenizer.eot_id is not None
    return [*prompt, *tokenizer.encode(parts.prefix + parts.middle, bos=False, eos=False), tokenizer.eot_id]
