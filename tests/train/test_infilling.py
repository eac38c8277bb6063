"""Sequences with a gap: they are prompts with their answers, and put together again they are the document."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llama.prompts import infilling
from llama.tokenizer import Tokenizer
from llama.train.infilling import Split, prefix_first, split, split_lines, suffix_first

parts = st.text(max_size=12) | st.sampled_from(["", " ", "    x", "def f(x):\n", " <EOT>", "<SUF>", "☺", "é", "▁"])
splits = st.builds(Split, parts, parts, parts)


def text_of(parts: Split) -> str:
    return (parts.prefix + parts.middle + parts.suffix).replace("▁", " ")  # which SentencePiece can't tell apart


@given(parts=splits)
def test_prefix_first_is_a_prompt_and_its_answer(tokenizer: Tokenizer, parts: Split) -> None:
    ids = prefix_first(tokenizer, parts)
    prompt = infilling(tokenizer, parts.prefix, parts.suffix).tokens
    assert ids[: len(prompt)] == prompt
    assert ids[-1] == tokenizer.eot_id
    assert tokenizer.decode_infilling(ids[len(prompt) : -1]) == parts.middle.replace("▁", " ")


@given(parts=splits)
def test_prefix_first_reassembles(tokenizer: Tokenizer, parts: Split) -> None:
    ids = prefix_first(tokenizer, parts)
    marks = {tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id}
    pre, suf, mid, eot = (at for at, token in enumerate(ids) if token in marks)  # just four, whatever the text says
    assert ids[0] == tokenizer.bos_id
    assert (pre, eot) == (1, len(ids) - 1)
    prefix, suffix = tokenizer.decode(ids[pre + 1 : suf]), tokenizer.decode_infilling(ids[suf + 1 : mid])
    assert prefix + tokenizer.decode_infilling(ids[mid + 1 : eot]) + suffix == text_of(parts)


@given(parts=splits)
def test_suffix_first_reassembles_with_prefix_and_middle_as_one_text(tokenizer: Tokenizer, parts: Split) -> None:
    ids = suffix_first(tokenizer, parts)
    marks = {tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id}
    pre, suf, mid, eot = (at for at, token in enumerate(ids) if token in marks)
    assert (pre, suf, eot) == (1, 2, len(ids) - 1)
    assert ids[mid + 1 : eot] == tokenizer.encode(parts.prefix + parts.middle, bos=False, eos=False)
    suffix = tokenizer.decode_infilling(ids[suf + 1 : mid])
    assert tokenizer.decode(ids[mid + 1 : eot]) + suffix == text_of(parts)


def test_suffix_first_begins_like_its_prompt(tokenizer: Tokenizer) -> None:
    parts = Split("def f(x):\n", "    return x\n", "\ny = f(1)\n")
    prompt = infilling(tokenizer, parts.prefix, parts.suffix, suffix_first=True).tokens
    assert suffix_first(tokenizer, parts)[: len(prompt)] == prompt


def test_gaps_are_anywhere_and_of_any_size() -> None:
    """Each of the 4 x 4 pairs of places in three characters, the mixed ones twice as often as those of no gap."""
    rng = random.Random(0)
    found = [split("abc", rng) for _ in range(8000)]
    assert all(parts.prefix + parts.middle + parts.suffix == "abc" for parts in found)
    counts = Counter((len(parts.prefix), len(parts.middle)) for parts in found)
    assert len(counts) == 10
    for (_, size), count in counts.items():
        assert abs(count - (500 if size == 0 else 1000)) < 130


@given(text=st.text(alphabet="ab \n", max_size=30), seed=st.integers(0, 99))
def test_gaps_of_lines_end_at_a_lines_end(text: str, seed: int) -> None:
    parts = split_lines(text, random.Random(seed))
    assert parts.prefix + parts.middle + parts.suffix == text
    assert parts.suffix == "" or parts.suffix[0] == "\n"
    assert parts.middle.count("\n") <= 2
    first = (parts.prefix.split("\n")[-1] + parts.middle).split("\n")[0]
    assert first.strip() or not text.strip()  # a blank line is nothing to learn from


def test_gaps_of_lines_are_of_every_line_and_begin_anywhere_in_it() -> None:
    """Three in four at a line's start; of the others, each of the five places within "abcd" as often."""
    rng = random.Random(0)
    found = [split_lines("abcd\n\nabcd\nabcd", rng) for _ in range(12000)]
    starts = Counter(len(parts.prefix) for parts in found)
    assert set(starts) == {line + place for line in (0, 6, 11) for place in range(5)}
    for line in (0, 6, 11):
        assert abs(starts[line] - 12000 / 3 * (3 / 4 + 1 / 20)) < 150
        for place in range(1, 5):
            assert abs(starts[line + place] - 12000 / 3 / 20) < 60
    middles = Counter(parts.middle.count("\n") for parts in found if len(parts.prefix) < 5)
    assert set(middles) == {0, 1, 2}
    assert middles[0] > middles[1] + middles[2]
