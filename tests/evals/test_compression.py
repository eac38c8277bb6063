"""Bits per byte against the oracle's probabilities in float64 and the `xz` program."""

from __future__ import annotations

import lzma
import math
import random
import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures_text import ARGS, WEIGHTS, Spy
from llama.evals.compression import compression, windows, xz_bits
from llama.evals.sources import File
from llama.generation import Llama
from reference import llama as reference_llama

FILES = [
    File("b.py", "def add(a, b):\n    return a + b  # süß\n" * 6),
    File("a.py", "import os\n\nprint(os.name)\n"),
    File("c.py", "x"),
]


def bits_by_the_oracle(llama: Llama, text: str, length: int, stride: int) -> float:
    """Every token by itself: the latest context that the protocol allows it, one float64 pass for each."""
    ids = llama.tokenizer.encode(text, bos=False, eos=False)
    nats = 0.0
    for at, token in enumerate(ids):
        # The first window that reaches the token.
        first = next(start for start in range(0, len(ids), stride) if start + length - 1 > at)
        before = [llama.tokenizer.bos_id, *ids[first:at]]
        logits = reference_llama(ARGS, WEIGHTS, torch.tensor([before]))[0, -1]
        nats -= float(torch.log_softmax(logits, -1)[token])
    return nats / math.log(2)


@pytest.mark.parametrize(("length", "stride"), [(24, 12), (24, 23), (24, 5), (128, 64)])
def test_bits_of_a_file_are_those_of_the_oracle(tiny_llama: Llama, length: int, stride: int) -> None:
    found = compression(tiny_llama, FILES, length, stride)
    assert found.sizes.paths == ("a.py", "b.py", "c.py")
    for file, bits, size in zip(
        sorted(FILES, key=lambda f: f.path), found.sizes.model_bits, found.sizes.bytes, strict=True
    ):
        assert bits == pytest.approx(bits_by_the_oracle(tiny_llama, file.text, length, stride), rel=1e-5)
        assert size == len(file.text.encode())


def test_ratios_are_of_totals(tiny_llama: Llama) -> None:
    found = compression(tiny_llama, FILES, 24)
    sizes = found.sizes
    bits, total = sum(sizes.model_bits), sum(sizes.bytes)
    texts = [file.text.encode() for file in sorted(FILES, key=lambda file: file.path)]
    solid = xz_bits(b"".join(texts))
    assert found.stride == 12
    assert found.bits_per_byte.value == pytest.approx(bits / total)
    assert found.nats_per_token.value == pytest.approx(bits * math.log(2) / sum(sizes.tokens))
    assert found.of_xz.value == pytest.approx(bits / sum(xz_bits(text) for text in texts))
    assert found.of_solid_xz.value == pytest.approx(bits / solid)
    assert found.of_solid_xz.low == pytest.approx(found.bits_per_byte.low * total / solid)


def test_logits_are_made_a_few_tokens_at_a_time(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(tiny_llama, monkeypatch)
    monkeypatch.setattr(tiny_llama.loop, "chunk", 16)
    compression(tiny_llama, FILES, 64)
    assert max(spy.scored) <= 16
    assert max(rows * tokens for rows, tokens in spy.read) <= 16


def test_short_windows_share_a_pass(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(tiny_llama, monkeypatch)
    compression(tiny_llama, FILES, 64)
    assert max(rows for rows, _ in spy.read) == tiny_llama.model.args.max_batch_size


@given(st.integers(0, 200), st.integers(1, 30), st.data())
def test_windows_score_every_token_once_with_context(tokens: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    scored: list[int] = []
    for first, new in windows(tokens, size, stride):
        assert first <= new
        assert first == 0 or new - first >= size - stride, "a later window's tokens see at least size - stride"
        scored += range(new, min(first + size, tokens))
    assert scored == list(range(tokens))


@pytest.mark.parametrize("size", [0, 1, 4_000, 70_000, 300_000])
def test_xz_is_xz_9e(size: int) -> None:
    half = random.Random(0).randbytes((size + 1) // 2)
    data = (half + half)[:size]  # which only a dictionary of half the size sees
    assert xz_bits(data) == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    if shutil.which("xz"):
        program = subprocess.run(["xz", "-9e", "-T1", "-c"], input=data, capture_output=True, check=True)
        assert xz_bits(data) == 8 * len(program.stdout)


@pytest.mark.parametrize(
    ("length", "stride", "message"),
    [
        (129, None, "larger max_seq_len"),
        (1, None, "windows of 1"),
        (24, 24, "a stride of 24"),
        (24, 0, "a stride of 0"),
    ],
)
def test_windows_that_cannot_be_are_refused(tiny_llama: Llama, length: int, stride: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compression(tiny_llama, FILES, length, stride)


def test_no_text_is_refused(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="nothing to measure on"):
        compression(tiny_llama, [File("a.py", "")])
