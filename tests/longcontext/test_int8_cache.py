"""The cache in int8: how far a number may be off, that nothing else changes, and what it does to a real model."""

from __future__ import annotations

import math
import sysconfig
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fixtures_text import SLOTS
from llama.cache import KVCache, Span
from llama.config import ModelArgs
from llama.generation import Llama
from llama.interop.memory import Settings, plan
from llama.longcontext.int8_cache import Int8Cache, dequantize, int8_cache, quantize
from llama.train.corpus import HELD_OUT_ONE_IN, stable_hash
from reference import MakeModel
from reference import llama as reference_llama

CPU = torch.device("cpu")


# --- a slot's numbers -------------------------------------------------------------------------------------------------


def scales_of(stored: Tensor) -> Tensor:
    """(..., 1) float64, from the two bytes behind a slot's numbers: a bfloat16 is a float32 without its lower half."""
    low, high = stored[..., -2:].view(torch.uint8).to(torch.int32).unbind(-1)
    return (high << 24 | low << 16).view(torch.float32).double()[..., None]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_no_number_is_off_by_more_than_half_a_scale(size: float) -> None:
    x = torch.randn(64, 3, 32) * size * torch.logspace(-3, 3, 64)[:, None, None]
    stored = quantize(x)
    scale = scales_of(stored)
    error = (stored[..., :-2].double() * scale - x.double()).abs()
    assert (error <= scale / 2 * (1 + 1e-6)).all()
    assert (scale >= x.double().abs().amax(-1, keepdim=True) / 127.6).all()
    assert (scale <= x.double().abs().amax(-1, keepdim=True) / 126.5).all()  # no larger than need be


def test_the_largest_number_fits_a_byte_however_its_scale_is_rounded() -> None:
    """A scale that is rounded down makes the largest number more than 127 scales; 127.5 of them would become -128."""
    largest = torch.linspace(1, 2, 4097)[:, None]
    stored = quantize(torch.cat((largest, -largest), -1))
    assert (stored[:, 0] == 127).all()
    assert (stored[:, 1] == -127).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_the_number_times_the_scale(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, 8).to(dtype)
    stored = quantize(x)
    exact = stored[..., :-2].double() * scales_of(stored)
    got = dequantize(stored, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=0)


def test_zeros_stay_zeros() -> None:
    assert torch.equal(dequantize(quantize(torch.zeros(3, 8)), torch.float32), torch.zeros(3, 8))


def test_the_order_in_memory_does_not_matter() -> None:
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(quantize(x.permute(2, 0, 1, 3)), quantize(x).permute(2, 0, 1, 3))
    assert torch.equal(quantize(x.mT.contiguous().mT), quantize(x))


@pytest.mark.parametrize("head_dim", [32, 128])
def test_it_takes_half_the_bytes_of_bfloat16_and_two_for_each_scale(head_dim: int) -> None:
    sizes = 3, 2, head_dim, 4, 160
    half = Int8Cache(*sizes, dtype=torch.bfloat16, device=CPU)
    whole = KVCache(*sizes, dtype=torch.bfloat16, device=CPU)
    assert half.nbytes == whole.nbytes // 2 + 2 * (2 * 3 * 2 * 4 * 160)
    assert half.nbytes / whole.nbytes == 1 / 2 + 1 / head_dim


def test_the_plan_knows_its_bytes(tiny: ModelArgs, make_model: MakeModel) -> None:
    """And that one layer's floats come and go."""
    model, _ = make_model(tiny)
    plain, planned = (plan(tiny, Settings(1, torch.float32, kv, device="cpu")) for kv in (None, torch.int8))
    assert planned.kv_cache == int8_cache(model).nbytes
    assert 0 < planned.decode - plain.decode <= 2 * 4 * 160 * 2 * 8 * 4  # K and V, rows, slots, heads, numbers, bytes


def test_no_layers_floats_outlive_the_next_layers() -> None:
    """A cache that kept them would be larger than the one it replaces."""
    cache = Int8Cache(2, 2, 8, 1, 40, dtype=torch.float32, device=CPU)
    new = torch.randn(1, 5, 2, 8)
    seen = cache.extend(0, cache.span(0, 1, 5), new, new)
    alive = [weakref.ref(x) for x in seen]
    del seen
    assert not any(x() is not None for x in alive)


# --- in a model -------------------------------------------------------------------------------------------------------


class Rounding(KVCache):
    """The same by definition: a plain cache in float64, of numbers that are already rounded."""

    def extend(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = super().extend(layer, span, self.rounded(keys), self.rounded(values))
        return seen[0].to(keys.dtype), seen[1].to(keys.dtype)

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16().double()
        return (x.double() / scale).round() * scale


def spoil_(cache: Int8Cache) -> None:
    """What padding, longer rows and wrong guesses leave behind."""
    for store in (*cache.keys, *cache.values):
        store.copy_(quantize(torch.full((*store.shape[:-1], store.shape[-1] - 2), 1e4)))


def test_scores_are_those_of_rounded_keys_and_values(tiny: ModelArgs, make_model: MakeModel) -> None:
    """Whatever the chunks; with garbage in every slot that is not visible; with a row for each of three starts."""
    model, weights = make_model(tiny)
    tokens = torch.randint(tiny.vocab_size, (3, 20))
    by_definition = Rounding(2, 2, 8, 4, 160, dtype=torch.float64, device=CPU)
    with torch.inference_mode():
        by_definition.span = lambda *a: Span([0], 20, 20, torch.float32, torch.device("cpu"))  # type: ignore[method-assign]
        expected = model(tokens, 0, by_definition)
        for bucket in (1, 128):
            cache = int8_cache(model, 4, 160, bucket)
            spoil_(cache)
            parts = [model(tokens[:, :9], 0, cache), model(tokens[:, 9:10], 9, cache), model(tokens[:, 10:], 10, cache)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-2)
            assert (
                torch.cat(parts, 1) - expected
            ).abs().median() < 1e-5  # a number at the edge of two may fall either way
            ragged = model(torch.stack([tokens[0, 6:8], tokens[1, 11:13], tokens[2, 3:5]]), [6, 11, 3], cache)
            for row, start in enumerate((6, 11, 3)):
                torch.testing.assert_close(ragged[row], expected[row, start : start + 2], rtol=0, atol=2e-2)
    exact = reference_llama(tiny, weights, tokens)
    assert 1e-4 < (expected - exact).abs().max() < 0.2  # and rounding is seen, but small, beside scores of order 1


def test_a_wrong_guess_is_overwritten_and_a_row_can_move(tiny: ModelArgs, make_model: MakeModel) -> None:
    model, _ = make_model(tiny)
    tokens = torch.randint(tiny.vocab_size, (2, 12))
    with torch.inference_mode():
        expected = model(tokens, 0, int8_cache(model))[1, 9:]
        cache = int8_cache(model)
        model(tokens[:, :9], 0, cache)
        model(torch.randint(tiny.vocab_size, (2, 3)), 9, cache)  # read, and rejected
        cache.copy_row_(1, 0, 9)
        got = model(tokens[1:, 9:], 9, cache)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)


def test_rows_at_an_offset_are_the_first_rows_bit_by_bit(tiny: ModelArgs, make_model: MakeModel) -> None:
    """A prompt in two pieces, a token each at positions of their own and at one; no byte of another row is touched."""
    model, _ = make_model(tiny)
    cache = int8_cache(model, rows=4)
    tokens = torch.randint(tiny.vocab_size, (2, 20))
    stores = (*cache.keys, *cache.values)
    found = []
    with torch.inference_mode():
        for row in (0, 2, 1):
            spoil_(cache)
            before = [store.clone() for store in stores]
            steps = [(tokens[:, :9], 0), (tokens[:, 9:12], 9), (tokens[:, 12:13], [12, 4]), (tokens[:, 13:14], 13)]
            found.append(
                [model(part, cache.span(start, 2, part.shape[1], row), cache) for part, start in steps]
                + [store[row : row + 2, :, :14].clone() for store in stores]
            )
            for store, was in zip(stores, before, strict=True):
                assert not torch.equal(store[row : row + 2, :, :12], was[row : row + 2, :, :12])
                assert torch.equal(store[:row], was[:row])
                assert torch.equal(store[row + 2 :], was[row + 2 :])
    for other in found[1:]:
        for one, first in zip(other, found[0], strict=True):
            assert torch.equal(one, first)


def test_rows_are_swapped_copied_and_forgotten_with_what_they_hold(tiny: ModelArgs, make_model: MakeModel) -> None:
    """Scale bytes and all; so a row goes on as if it had always been where it is now."""
    model, _ = make_model(tiny)
    tokens = torch.randint(tiny.vocab_size, (3, 12))
    cache = int8_cache(model, rows=3)
    with torch.inference_mode():
        model(tokens[:, :9], 0, cache)
        for row, own in enumerate(tokens[:, :9].tolist()):
            cache.tokens[row] = own
        expected = model(tokens[:, 9:], 9, cache)
        assert [len(own) for own in cache.tokens] == [9, 9, 9]
        cache.swap_rows_(0, 2)
        cache.copy_row_(0, 1, 7)
        held = tokens[:, :9].tolist()
        assert cache.tokens == [held[2], held[2][:7], held[0]]
        for row, own, start in ((0, 2, 9), (1, 2, 7), (2, 0, 9)):
            span = cache.span(start, 1, 12 - start, row)
            found = model(tokens[own : own + 1, start:], span, cache)[0, 9 - start :]
            torch.testing.assert_close(found, expected[own], rtol=0, atol=1e-5)
        model(tokens[:1, :1], cache.span([4], 1, 1, 2), cache)
    assert cache.tokens == [held[2], held[2][:7], held[0][:4]]


def test_bfloat16_models_are_given_bfloat16(tiny: ModelArgs, make_model: MakeModel) -> None:
    """The mask as well: of int8 it could not be made."""
    model, _ = make_model(tiny)
    model = model.bfloat16()
    tokens = torch.randint(tiny.vocab_size, (2, 12))
    cache = int8_cache(model)
    assert cache.span(3, 2, 2).mask.dtype == torch.bfloat16
    with torch.inference_mode():
        expected = model(tokens, 0, model.new_cache(2, 40))
        model(tokens[:, :8], 0, cache)
        got = model(tokens[:, 8:], 8, cache)
    assert (got - expected[:, 8:]).abs().max() < 0.3  # scores of order 1, as far as 8 bits of a bfloat16 go


def test_a_llama_writes_with_it(tiny_checkpoint: Path) -> None:
    """Ragged prompts, more than rows, guesses and all: the text is what each prompt gets alone."""
    prompts = [[1, 300, 301, 302, 303], [1, 310, 311], [1, 320, 321, 322, 323, 324, 325]]
    llama = Llama.build(tiny_checkpoint, max_seq_len=SLOTS, max_batch_size=2, prefill_chunk=4, lookup=4)
    llama.model.cache = int8_cache(llama.model)
    together, _ = llama.generate(prompts, 20, temperature=0)
    alone = Llama.build(tiny_checkpoint, max_seq_len=SLOTS, max_batch_size=1)
    alone.model.cache = int8_cache(alone.model)
    assert together == [alone.generate([prompt], 20, temperature=0)[0][0] for prompt in prompts]


def test_perplexity_of_the_embedded_checkpoint_changes_by_less_than_one_percent() -> None:
    llama = Llama.build(max_seq_len=512, max_batch_size=2, prefill_chunk=128)
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = [path.read_text() for path in modules if stable_hash(path.name) % HELD_OUT_ONE_IN == 0]
    texts = [llama.tokenizer.encode(text, bos=True, eos=False)[:512] for text in sorted(held_out, key=len)[-3:]]
    assert [len(text) for text in texts] == [512] * 3

    def perplexity() -> float:
        losses = [-p for found in llama.score(texts) for p in found["logprobs"][1:] if p is not None]
        return math.exp(sum(losses) / len(losses))

    plain = perplexity()
    llama.model.cache = int8_cache(llama.model)
    assert abs(perplexity() / plain - 1) < 0.01
    assert perplexity() != plain  # it was used
