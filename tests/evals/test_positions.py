"""Loss by position against the oracle, and bytes by token against the text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures_text import next_logprobs, training_texts
from llama.evals.positions import bytes_of, loss_by_position
from llama.evals.sources import File
from llama.generation import Llama
from llama.tokenizer import Tokenizer

TEXTS = training_texts()
LONG = [File(f"{i}.py", text[1000:2000]) for i, text in enumerate(TEXTS)]


def test_bins_hold_the_losses_of_the_oracle(tiny_llama: Llama) -> None:
    found = loss_by_position(tiny_llama, LONG[:2], length=31, bins=4)
    assert [(b.start, b.end) for b in found.bins] == [(1, 8), (8, 16), (16, 23), (23, 31)]
    sequences = [tiny_llama.tokenizer.encode(file.text, bos=True, eos=False)[:31] for file in LONG[:2]]
    tables = [next_logprobs(ids) for ids in sequences]
    for b in found.bins:
        places = range(b.start, b.end)
        nats = sum(-float(t[p - 1, ids[p]]) for t, ids in zip(tables, sequences, strict=True) for p in places)
        assert b.nats_per_token.value == pytest.approx(nats / (2 * len(places)), rel=1e-5)
        sizes = [len(tiny_llama.tokenizer.decode(ids[1:end]).encode()) for ids in sequences for end in (b.start, b.end)]
        size = sizes[1] - sizes[0] + sizes[3] - sizes[2]
        assert b.bits_per_byte.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_every_bin_has_the_same_documents_and_short_ones_are_left_out(tiny_llama: Llama) -> None:
    found = loss_by_position(tiny_llama, [*LONG, File("short.py", "x = 1\n")], length=100, bins=3)
    assert found.documents == tuple(file.path for file in LONG)
    assert all(b.nats_per_token.n == len(LONG) for b in found.bins)
    ids = tiny_llama.tokenizer.encode(LONG[0].text, bos=True, eos=False)
    exact = File("exact.py", tiny_llama.tokenizer.decode(ids[:100]))
    assert len(tiny_llama.tokenizer.encode(exact.text, bos=True, eos=False)) == 100
    assert loss_by_position(tiny_llama, [exact], length=100, bins=3).documents == ("exact.py",)
    fewer = loss_by_position(tiny_llama, LONG, length=100, bins=3, documents=2)
    assert len(fewer.documents) == 2
    assert set(fewer.documents) < set(found.documents)


@given(st.one_of(st.sampled_from(TEXTS).map(lambda text: text[:400]), st.text(alphabet="a b\n\tä€𝄞")))
def test_tokens_account_for_every_byte_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert sum(bytes_of(tokenizer, ids)) == len(text.encode())


@pytest.mark.parametrize(
    ("length", "bins", "message"), [(129, 4, "a length of 129"), (20, 20, "20 bins"), (20, 0, "0 bins")]
)
def test_lengths_and_bins_that_cannot_be_are_refused(tiny_llama: Llama, length: int, bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_by_position(tiny_llama, LONG, length, bins)


def test_documents_that_are_too_short_are_refused_with_the_longest(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="no document has 128 tokens, the longest 4"):
        loss_by_position(tiny_llama, [File("a.py", "xyz"), File("b.py", "x")])
