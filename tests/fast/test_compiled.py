"""Compiled in static shapes: the same text as without, whatever the shapes, and nothing is compiled after the start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch._dynamo

from llama import Llama, ModelArgs, Transformer
from llama.cache import KVCache
from llama.fast import speed_up_
from llama.fast.compiled import CompiledHidden, Shape, compile_
from llama.longcontext.int8_cache import int8_cache
from llama.quantize.layers import quantize_
from llama.rope import SPECTRA

PROMPTS = ["def f(x):\n", "x", "import os\n\n\ndef read(path, mode):\n    return"]


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


def twin(llama: Llama, change: Callable[[Transformer], object], **options: int) -> Llama:
    model = copy.deepcopy(llama.model)
    model.cache = None
    change(model)
    return Llama(model, llama.tokenizer, prefill_chunk=16, **options)


def greedy(llama: Llama) -> list[str]:
    return [r["generation"] for r in llama.text_completion(PROMPTS, temperature=0.0, max_gen_len=70)]


def compiled(model: Transformer, lookup: int = 0) -> object:
    # "aot_eager" traces and functionalises as the real compiler does, and needs none.
    return compile_(model, chunk=16, progress=False, lookup=lookup, backend="aot_eager")


@pytest.mark.parametrize(
    "scheme", ["int8", *(pytest.param(word, marks=pytest.mark.slow) for word in ("int8-dynamic", "int4"))]
)
@pytest.mark.parametrize(
    "fused", [pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="fused")]
)
def test_quantised_models_are_compiled_too(tiny_llama: Llama, scheme: str, fused: bool) -> None:
    """Their weights are nothing that a compiler knows."""
    quick = twin(tiny_llama, lambda model: quantize_(model, scheme))
    if fused:
        speed_up_(quick.model)
    expected = greedy(quick)
    compiled(quick.model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert greedy(quick) == expected


@pytest.mark.parametrize(
    "fused", [pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="fused")]
)
def test_the_text_is_the_same_and_nothing_is_compiled_after_the_start(tiny_llama: Llama, fused: bool) -> None:
    """Ragged prompts read in chunks, rows that leave, guesses of several tokens, up to the cache's last slot."""
    expected = greedy(tiny_llama)

    def change(model: Transformer) -> object:
        return compiled(speed_up_(model) if fused else model, lookup=3)

    quick = twin(tiny_llama, change, lookup=3)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert greedy(quick) == expected
        long = quick.text_completion(["x = 1\n"], temperature=0.0)[0]["generation"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert long == tiny_llama.text_completion(["x = 1\n"], temperature=0.0)[0]["generation"]


SCALINGS: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": 16},
    "ntk_by_parts": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_paper": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
    "none": {},
}


@pytest.mark.parametrize(("name", "kv_heads"), [("default", 4), *((name, 2) for name in SPECTRA)])
def test_every_spectrum_compiled_gives_the_scores_that_it_gives_without(name: str, kv_heads: int) -> None:
    """With as many kv heads as heads, and with fewer; a prompt in chunks, then rows at positions of their own."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": kv_heads, "vocab_size": 40}
    scaling = {"rope_type": name, **SCALINGS[name]}
    plain = Transformer(ModelArgs(**sizes, rope_scaling=scaling, max_seq_len=64, max_batch_size=2)).requires_grad_(
        False
    )
    for name, weight in plain.named_parameters():
        weight.mul_(1 if "norm" in name else 10)
    quick = compile_(speed_up_(copy.deepcopy(plain)), chunk=16, progress=False, backend="eager")
    tokens = torch.randint(40, (2, 60))
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for start, end in ((0, 16), (16, 37), (37, 38)):
            expected = plain(tokens[:, start:end], start)
            assert expected.abs().max() > 1
            torch.testing.assert_close(quick(tokens[:, start:end], start), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            quick(tokens[:, 38:39], [38, 20]), plain(tokens[:, 38:39], [38, 20]), rtol=0, atol=1e-4
        )


def small(rows: int = 5, slots: int = 40, **sizes: int) -> tuple[Transformer, Transformer]:
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 20, **sizes}
    plain = Transformer(ModelArgs(**sizes, max_seq_len=slots, max_batch_size=rows)).requires_grad_(False)
    for name, weight in plain.named_parameters():
        weight.mul_(1 if "norm" in name else 10)
    return plain, copy.deepcopy(plain)


def filled_(caches: Sequence[KVCache]) -> list[list[torch.Tensor]]:
    """Puts the same noise into caches, as what other sequences left there; returns copies of their tensors."""
    for stores in zip(*((*cache.keys, *cache.values) for cache in caches), strict=True):
        noise = torch.randn(stores[0].shape)
        for store in stores:
            store.copy_(noise)
    return [[store.clone() for store in (*cache.keys, *cache.values)] for cache in caches]


def test_every_step_falls_into_a_shape_that_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows, tokens, positions and first row; also at the cache's end, where padding has no room. And whatever
    the padding, nothing is written but the new tokens' own slots: idle rows keep their prefixes."""
    monkeypatch.setattr("llama.fast.compiled.EXACT_ROWS", 2)
    monkeypatch.setattr("llama.fast.compiled.FEWEST_SLOTS", 10)
    monkeypatch.setattr("llama.fast.compiled.PIECES", (3,))
    plain, quick = small(rows=7)
    hidden = CompiledHidden(quick, 16, lookup=4, backend="eager")
    assert hidden.rows == [1, 2, 4, 7]
    assert hidden.slots == [10, 20, 40]
    allowed, seen = set(hidden.shapes()), set()
    run = hidden._run

    def noted(shape: Shape, *rest: torch.Tensor, **row: int) -> torch.Tensor:
        seen.add(shape)
        return run(shape, *rest, **row)

    monkeypatch.setattr(hidden, "_run", noted)
    hidden.decode, hidden.read = hidden._decode, hidden._read
    tokens = torch.randint(20, (7, 40))
    caches = plain.own_cache(), quick.own_cache()
    with torch.inference_mode():
        for B, row in ((1, 0), (2, 0), (3, 0), (5, 0), (7, 0), (1, 6), (3, 2)):
            for T in (1, 2, 4, 5, 6, 15, 16, 17, 39, 40):
                for start in {0, 1, 7, 40 - T}:
                    if start + T > 40:
                        continue
                    before, _ = filled_(caches)
                    spans = [cache.span(start, B, T, row) for cache in caches]
                    expected = plain.hidden(tokens[:B, :T], spans[0], caches[0])
                    found = hidden(tokens[:B, :T].int(), spans[1], caches[1])
                    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
                    for cache in caches:
                        for store, was in zip((*cache.keys, *cache.values), before, strict=True):
                            assert not torch.equal(store, was)
                            store[row : row + B, :, start : start + T] = was[row : row + B, :, start : start + T]
                            assert torch.equal(store, was), (B, row, T, start)
    assert seen <= allowed
    assert {shape.prompt for shape in seen} == {False, True}


def test_idle_rows_keep_their_prefixes_and_what_is_overwritten_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows padded, at positions of their own; the next to come finds what an idle row is said to hold."""
    monkeypatch.setattr("llama.fast.compiled.EXACT_ROWS", 2)
    plain, quick = small()
    compile_(quick, chunk=16, progress=False, backend="aot_eager")
    cache, tokens = quick.own_cache(), torch.randint(1, 20, (5, 30))
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = plain(tokens, 0)
        quick(tokens[:, :20], 0)
        for row, own in enumerate(tokens[:, :20].tolist()):
            cache.tokens[row] = own
        idle = [store[3:].clone() for store in (*cache.keys, *cache.values)]
        for position in range(20, 26):  # three of five rows go on: padded to four
            found = quick(
                torch.stack([tokens[i, position - i] for i in range(3)])[:, None],
                [position, position - 1, position - 2],
            )
            for i in range(3):
                torch.testing.assert_close(found[i, 0], expected[i, position - i], rtol=0, atol=1e-4)
        assert [len(own) for own in cache.tokens] == [20, 19, 18, 20, 20]
        for store, was in zip((*cache.keys, *cache.values), idle, strict=True):
            assert torch.equal(store[3:], was)
        for row in (3, 4):
            found = quick.logits(quick.hidden(tokens[row : row + 1, 20:], cache.span(20, 1, 10, row), cache))
            torch.testing.assert_close(found, expected[row : row + 1, 20:], rtol=0, atol=1e-4)
        assert [len(own) for own in cache.tokens] == [20, 19, 18, 20, 20]
        quick.hidden(tokens[:1, :1], cache.span(5, 1, 1, 3), cache)
        assert [len(own) for own in cache.tokens] == [20, 19, 18, 5, 20]


@pytest.mark.slow
def test_an_int8_cache_is_compiled_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are written by index and kept by padding like any other numbers."""
    monkeypatch.setattr("llama.fast.compiled.EXACT_ROWS", 2)
    plain, quick = small(dim=32)
    plain.cache, quick.cache = int8_cache(plain), int8_cache(quick)
    compile_(quick, chunk=16, progress=False, backend="aot_eager")
    tokens = torch.randint(20, (5, 30))
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for B, T, start, row in ((5, 20, 0, 0), (1, 5, 20, 4), (3, 1, 20, 0), (5, 1, 21, 0), (2, 1, 22, 3)):
            part = tokens[row : row + B, start : start + T]
            both = [model.hidden(part, model.cache.span(start, B, T, row), model.cache) for model in (plain, quick)]
            torch.testing.assert_close(both[1], both[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "fused", [pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="fused")]
)
@pytest.mark.slow
def test_bfloat16_is_compiled_as_well(fused: bool) -> None:
    """What depends on the processor is nothing that a compiler can look into."""
    plain, quick = (model.bfloat16() for model in small(dim=128))
    exact = copy.deepcopy(plain).float()
    compile_(speed_up_(quick) if fused else quick, chunk=16, progress=False, backend="aot_eager")
    tokens = torch.randint(20, (2, 30))
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        right = exact(tokens)
        losses = []
        for model in (plain, quick):
            found = [model(tokens[:, :20], 0), *(model(tokens[:, i : i + 1], i) for i in range(20, 30))]
            losses.append(float((torch.cat(found, 1) - right).norm() / right.norm()))
    assert 0 < losses[1] < 1.5 * losses[0]


def test_what_a_step_gave_is_not_overwritten_by_the_next() -> None:
    """A recorded graph writes to the same memory each time; here, one that does the same without a GPU."""
    _, quick = small()
    hidden = CompiledHidden(quick, 16, backend="eager")
    rooms: dict[tuple[int, ...], torch.Tensor] = {}

    def recorded(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*inputs: object) -> torch.Tensor:
            found = function(*inputs)
            return rooms.setdefault(tuple(found.shape), torch.empty_like(found)).copy_(found)

        return run

    hidden.decode, hidden.read = recorded(hidden._decode), recorded(hidden._read)
    tokens = torch.randint(20, (3, 40))
    with torch.inference_mode():
        for parts in ((tokens[:, :40], tokens.flip(1)), (tokens[:, :1], tokens[:, 1:2])):
            first = hidden(parts[0], 0, quick.own_cache())
            kept = first.clone()
            hidden(parts[1], 0, quick.own_cache())
            assert torch.equal(first, kept)
            torch.testing.assert_close(first, quick.hidden(parts[0], 0, quick.new_cache(3, 40)), rtol=0, atol=1e-4)


def test_few_graphs() -> None:
    """One for each number of rows and each size of slots; prompts add a handful. As many as docs and README say."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=20, max_seq_len=4096, max_batch_size=8))
    hidden = CompiledHidden(model, 512, backend="eager")
    assert hidden.rows == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(list(hidden.shapes())) == 38
    assert len(list(CompiledHidden(model, 512, lookup=7, backend="eager").shapes())) == 70


def test_whole_sequences_and_other_caches_are_left_to_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model's own cache needn't be named."""
    plain, quick = small()
    hidden = CompiledHidden(quick, 16, backend="eager")
    left: list[object] = []
    monkeypatch.setattr(hidden, "plain", lambda tokens, start, cache: left.append(cache))
    quick.hidden, tokens, other = hidden, torch.arange(10)[None], quick.new_cache(1, 32)
    with torch.inference_mode():
        hidden(tokens)
        hidden(tokens, 0, other)
        hidden(tokens[:, :0], 0, quick.own_cache())
        assert left == [None, other, quick.own_cache()]
        torch.testing.assert_close(quick(tokens, 0), plain(tokens, 0), rtol=0, atol=1e-4)
    assert len(left) == 3


def test_no_compiler_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tiny_llama: Llama) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"g\+\+.*leave --compile out"):
        compile_(copy.deepcopy(tiny_llama.model))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_compiled_by_the_real_compiler_the_text_is_the_same(tiny_llama: Llama, fused: bool) -> None:
    """Minutes: C++ is written and compiled for every shape."""

    def change(model: Transformer) -> object:
        return compile_(speed_up_(model) if fused else model, chunk=16, progress=False)

    assert greedy(twin(tiny_llama, change)) == greedy(tiny_llama)
