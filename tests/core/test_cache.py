"""The cache's one invariant, a slot is written before it becomes visible, and what follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from llama.cache import KVCache
from llama.config import ModelArgs
from llama.model import Transformer
from reference import MakeModel

CPU = torch.device("cpu")
ATOL = 5e-5  # float32 against float64, logits of order 1


def a_cache(rows: int = 3, slots: int = 40, bucket: int = 16) -> KVCache:
    return KVCache(2, 2, 4, rows, slots, dtype=torch.float32, device=CPU, bucket=bucket)


def spoil_(cache: KVCache, value: float = 1e4) -> None:
    for store in (*cache.keys, *cache.values):
        store.fill_(value)


def test_whatever_lies_in_later_slots_changes_nothing(tiny: ModelArgs, make_model: MakeModel) -> None:
    model, weights = make_model(tiny)
    tokens = torch.randint(tiny.vocab_size, (3, 20))
    expected = reference.llama(tiny, weights, tokens)
    for bucket in (1, 128):
        cache = model.new_cache(4, 160, bucket)
        spoil_(cache)
        with torch.inference_mode():
            parts = [model(tokens[:, :9], 0, cache), model(tokens[:, 9:10], 9, cache), model(tokens[:, 10:], 10, cache)]
        torch.testing.assert_close(torch.cat(parts, 1).double(), expected, rtol=0, atol=ATOL)


def test_garbage_in_a_visible_slot_would_show(tiny: ModelArgs, make_model: MakeModel) -> None:
    """What the test above must be able to notice."""
    model, _ = make_model(tiny)
    tokens = torch.randint(tiny.vocab_size, (1, 10))
    cache = model.new_cache(1, 160)
    with torch.inference_mode():
        model(tokens[:, :9], 0, cache)
        cache.values[0][0, 0, 8] += 0.1
        after = model(tokens[:, 9:], 9, cache)
    assert (after[0, 0] - model(tokens)[0, -1]).abs().max() > 1e-3


def test_the_example_of_the_docstring(tiny: ModelArgs, make_model: MakeModel) -> None:
    """Padding is overwritten, and a row can be taken back to any earlier position."""
    model, weights = make_model(tiny)
    a, b, c, d, x, pad = 5, 17, 40, 41, 77, 0
    with torch.inference_mode():
        model(torch.tensor([[a, b, c, pad]]), 0)
        last = [model(torch.tensor([[d]]), 3), model(torch.tensor([[x]]), 1)]
    for got, row in zip(last, ([a, b, c, d], [a, x]), strict=True):
        expected = reference.llama(tiny, weights, torch.tensor([row]))[:, -1:]
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=ATOL)


def test_a_reused_row_forgets_its_last_sequence(tiny: ModelArgs, make_model: MakeModel) -> None:
    model, weights = make_model(tiny)
    long, short = torch.randint(tiny.vocab_size, (4, 100)), torch.randint(tiny.vocab_size, (2, 7))
    with torch.inference_mode():
        model(long, 0)
        first, then = model(short[:, :4], 0), model(short[:, 4:], 4)
    expected = reference.llama(tiny, weights, short)
    torch.testing.assert_close(torch.cat([first, then], 1).double(), expected, rtol=0, atol=ATOL)


def test_a_copied_row_continues_as_its_source(tiny: ModelArgs, make_model: MakeModel) -> None:
    """A finished row leaves, and the last one takes its place."""
    model, weights = make_model(tiny)
    tokens = torch.randint(tiny.vocab_size, (3, 12))
    cache = model.new_cache(3, 160)
    with torch.inference_mode():
        model(tokens[:, :10], 0, cache)
        before = [store.clone() for store in (*cache.keys, *cache.values)]
        cache.copy_row_(2, 0, 10)
        for store, old in zip((*cache.keys, *cache.values), before, strict=True):
            assert torch.equal(store[1:], old[1:])
        got = model(tokens[[2, 1], 10:], 10, cache)
    expected = reference.llama(tiny, weights, tokens[[2, 1]])[:, 10:]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=ATOL)


def test_the_bucket_changes_shapes_and_not_results(tiny: ModelArgs, make_model: MakeModel) -> None:
    model, _ = make_model(tiny)
    tokens = torch.randint(tiny.vocab_size, (2, 40))
    attention = model.layers[0].attention
    attend, seen, results = attention.attend, {}, {}
    for bucket in (1, 7, 16, 128):
        shapes = seen[bucket] = set()

        def spy(q: Tensor, keys: Tensor, values: Tensor, span: Any, shapes: set[int] = shapes) -> Tensor:
            shapes.add(keys.shape[2])
            return attend(q, keys, values, span)

        attention.attend = spy
        cache = model.new_cache(2, 100, bucket)
        with torch.inference_mode():
            results[bucket] = torch.cat([model(tokens[:, i : i + 1], i, cache) for i in range(40)], 1)
    assert seen == {1: set(range(1, 41)), 7: {7, 14, 21, 28, 35, 42}, 16: {16, 32, 48}, 128: {100}}
    for bucket in (7, 16, 128):
        torch.testing.assert_close(results[bucket], results[1], rtol=0, atol=ATOL)


def test_extend_writes_each_row_at_its_own_place_and_gives_views() -> None:
    cache = a_cache()
    keys, values = torch.randn(2, 2, 3, 2, 4)  # each (B 2, T 3, K 2, D 4)
    span = cache.span([5, 0], 2, 3)
    seen_keys, seen_values = cache.extend(1, span, keys, values)
    assert seen_keys.shape == seen_values.shape == (2, 2, 8, 4)
    assert seen_keys.data_ptr() == cache.keys[1].data_ptr()
    assert seen_values.data_ptr() == cache.values[1].data_ptr()
    for store, new in ((cache.keys[1], keys), (cache.values[1], values)):
        expected = torch.zeros_like(store)
        expected[0, :, 5:8], expected[1, :, 0:3] = new[0].transpose(0, 1), new[1].transpose(0, 1)
        assert torch.equal(store, expected)
    assert not cache.keys[0].any()


@pytest.mark.parametrize("start", [3, [3, 3], torch.tensor(3), torch.tensor([3, 3])])
def test_the_forms_of_a_start_position_are_one(start: int | Sequence[int] | Tensor) -> None:
    span = a_cache().span(start, 2, 2)
    assert span.positions.tolist() == [[3, 4]]
    assert (span.slots, span.start) == (5, 3)


def test_the_mask_shows_slots_up_to_the_tokens_own() -> None:
    span = a_cache().span([2, 0], 2, 2)
    assert span.mask.shape == (2, 1, 2, 4)
    assert (span.mask[:, 0] == 0).tolist() == [
        [[True, True, True, False], [True, True, True, True]],
        [[True, False, False, False], [True, True, False, False]],
    ]
    assert set(span.mask.unique().tolist()) == {0.0, -torch.inf}


def test_plain_causal_attention_only_where_nothing_else_is_visible() -> None:
    cache = a_cache(bucket=16)
    assert cache.span(0, 2, 6).is_square
    assert not cache.span(1, 2, 6).is_square  # something stands before
    assert not cache.span([0, 1], 2, 6).is_square
    assert not cache.span(0, 2, 1).is_square  # a single token is shown a whole bucket


@pytest.mark.parametrize(
    ("start", "B", "T", "named"),
    [
        (38, 1, 3, "positions 38 to 40.*slots 0 to 39.*max_seq_len of at least 41"),
        ([0, 40], 2, 1, "max_seq_len of at least 41"),
        (-1, 1, 1, "positions -1"),
        ([0, -2], 2, 1, "positions -2"),
        (0, 4, 1, "4 rows.*has 3 rows.*max_batch_size"),
        ([0, 0, 0], 2, 1, "2 rows.*3 start positions"),
    ],
)
def test_what_does_not_fit_is_named(start: int | list[int], B: int, T: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        a_cache().span(start, B, T)


def test_a_full_cache_is_full_to_the_last_slot(tiny: ModelArgs, make_model: MakeModel) -> None:
    args = dataclasses.replace(tiny, max_seq_len=21, max_batch_size=2)
    model, weights = make_model(args)
    tokens = torch.randint(args.vocab_size, (2, 22))
    with torch.inference_mode():
        parts = [model(tokens[:, :20], 0), model(tokens[:, 20:21], 20)]
        with pytest.raises(ValueError, match="max_seq_len of at least 22"):
            model(tokens[:, 21:], 21)
    expected = reference.llama(args, weights, tokens[:, :21])
    torch.testing.assert_close(torch.cat(parts, 1).double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p6_allocated_once_in_the_models_dtype_and_to_size(
    tiny: ModelArgs, make_model: MakeModel, dtype: torch.dtype
) -> None:
    model = make_model(tiny)[0].to(dtype)
    tokens = torch.randint(tiny.vocab_size, (4, 6))
    with torch.inference_mode():
        model(tokens, 0)
        cache = model.own_cache()
        places = [store.data_ptr() for store in (*cache.keys, *cache.values)]
        model(tokens[:, :1], 6)
        model(tokens, 100)
    assert model.own_cache() is cache
    assert places == [store.data_ptr() for store in (*cache.keys, *cache.values)]
    assert {store.dtype for store in (*cache.keys, *cache.values)} == {dtype}
    per_token = tiny.n_layers * 2 * tiny.n_kv_heads * tiny.head_dim * dtype.itemsize
    assert cache.nbytes == per_token * tiny.max_batch_size * tiny.max_seq_len


ARGS = ModelArgs(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32, hidden_dim=24)
WEIGHTS = reference.random_weights(ARGS)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_history_of_steps_is_the_plain_sequence(data: st.DataObject) -> None:
    """Rows of unequal length grow by chunks of any size, padded on the right, and are now and then taken back."""
    with torch.device("meta"):
        model: nn.Module = Transformer(ARGS)
    model.load_state_dict(WEIGHTS, assign=True)
    B = data.draw(st.integers(1, 3), "rows")
    cache = model.new_cache(B, 48, data.draw(st.sampled_from([1, 8, 48]), "bucket"))
    spoil_(cache)
    rows: list[list[int]] = [[] for _ in range(B)]
    for _ in range(data.draw(st.integers(1, 5), "steps")):
        rows = [row[: data.draw(st.integers(max(0, len(row) - 3), len(row)), "kept")] for row in rows]
        starts = [len(row) for row in rows]
        T = data.draw(st.integers(1, 9), "T")
        lengths = [data.draw(st.integers(1, T), "new") for _ in rows]
        tokens = torch.tensor(
            data.draw(st.lists(st.lists(st.integers(0, 31), min_size=T, max_size=T), min_size=B, max_size=B))
        )
        with torch.inference_mode():
            got = model(tokens, starts, cache)
        for b, row in enumerate(rows):
            row += tokens[b, : lengths[b]].tolist()
            expected = reference.llama(ARGS, WEIGHTS, torch.tensor([row]))[0, starts[b] :]
            torch.testing.assert_close(got[b, : lengths[b]].double(), expected, rtol=0, atol=ATOL)
