"""Compiled in static shapes: the same text as without, whatever the shapes, and nothing is compiled after the start."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch._dynamo

from llama import Llama, ModelArgs, Transformer
from llama.fast import speed_up_
from llama.fast.compiled import CompiledHidden, compile_
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


def compiled(model: Transformer) -> object:
    # "aot_eager" traces and functionalises as the real compiler does, and needs none.
    return compile_(model, chunk=16, progress=False, backend="aot_eager")


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_quantised_models_are_compiled_too(tiny_llama: Llama, scheme: str, fused: bool) -> None:
    """Their weights are nothing that a compiler knows."""
    quick = twin(tiny_llama, lambda model: quantize_(model, scheme))
    if fused:
        speed_up_(quick.model)
    expected = greedy(quick)
    compiled(quick.model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert greedy(quick) == expected


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_the_text_is_the_same_and_nothing_is_compiled_after_the_start(tiny_llama: Llama, fused: bool) -> None:
    """Ragged prompts read in chunks, rows that leave, guesses of several tokens, up to the cache's last slot."""
    expected = greedy(tiny_llama)

    def change(model: Transformer) -> object:
        return compiled(speed_up_(model) if fused else model)

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


def test_every_step_falls_into_a_shape_that_was_compiled() -> None:
    """Whatever rows, tokens and positions: also where the cache's end leaves no room for padding."""
    torch.manual_seed(0)
    args = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=20, max_seq_len=40, max_batch_size=3)
    plain = Transformer(args).requires_grad_(False)
    quick = copy.deepcopy(plain)
    hidden = CompiledHidden(quick, 16, backend="eager")
    allowed = set(hidden.shapes())
    seen: set[tuple[int, int, int]] = set()

    def step(tokens: torch.Tensor, positions: torch.Tensor, slots: int) -> torch.Tensor:
        seen.add((*tokens.shape, slots))
        assert int(positions.max()) < 40
        return hidden._step(tokens, positions, slots)

    hidden.step = step
    tokens = torch.randint(20, (3, 40))
    with torch.inference_mode():
        for B in (1, 2, 3):
            for T in (1, 2, 15, 16, 17, 39, 40):
                for start in {0, 1, 40 - T}:
                    if start + T <= 40:
                        for model in (plain, quick):  # what a step sees was written before
                            Transformer.hidden(model, tokens, 0, model.own_cache())
                        expected = plain.hidden(tokens[:B, :T], start, plain.own_cache())
                        torch.testing.assert_close(hidden(tokens[:B, :T], start, quick.own_cache()), expected)
    assert seen <= allowed
    assert len(seen) > 4


def test_a_step_of_its_own_cache_or_none_is_left_to_the_plain_model(tiny_llama: Llama) -> None:
    quick = twin(tiny_llama, compiled)
    tokens = torch.arange(1, 20)[None]
    with torch.inference_mode():
        assert torch.equal(quick.model(tokens), tiny_llama.model(tokens))
        other = quick.model.new_cache(1, 32)
        assert torch.equal(
            quick.model(tokens, 0, other), tiny_llama.model(tokens, 0, tiny_llama.model.new_cache(1, 32))
        )


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
