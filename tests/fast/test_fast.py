"""The fast model against the plain one, and against transformers by way of it: the same scores, the same text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama import Llama, ModelArgs, Transformer
from llama.cache import Span
from llama.fast import speed_up_
from llama.fast.attention import _decode
from llama.fast.block import FusedNorm, Turn
from llama.fast.packing import packed
from llama.model import RMSNorm, scaled_dot_product
from llama.quantize.layers import quantize_
from llama.rope import rotate as plain_rotate

SHAPES = {
    "heads": {"n_heads": 4, "n_kv_heads": 4},
    "grouped": {"n_heads": 8, "n_kv_heads": 2},
    "one kv head": {"n_heads": 4, "n_kv_heads": 1},
    "small heads": {"n_heads": 16, "n_kv_heads": 8},
}


@pytest.fixture(params=["kernels", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With steps and prompts' attention in llama/kernels, and by what stands in where no compiler is."""
    if request.param == "operators":
        monkeypatch.setattr("llama.fast.packing.available", lambda: False)
        monkeypatch.setattr("llama.kernels.prompt.available", lambda: False)
    return str(request.param)


def twins(dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Transformer, Transformer]:
    """A plain model and a fast one of the same random weights, large enough that no score is near 0."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=256, n_layers=3, vocab_size=97, max_seq_len=96, max_batch_size=3, **sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else weight * 8)
    model = model.to(dtype).requires_grad_(False)
    return model, speed_up_(copy.deepcopy(model))


def read(model: Transformer, steps: Sequence[tuple[Tensor, int | list[int]]]) -> list[Tensor]:
    """As the loop does, over the model's own cache."""
    with torch.inference_mode():
        return [model.logits(model.hidden(tokens, start, model.own_cache())) for tokens, start in steps]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_prefill_in_chunks_and_decode_are_those_of_the_plain_model(sizes: dict[str, int]) -> None:
    """And with rows at positions of their own."""
    plain, fast = twins(**sizes)
    tokens = torch.randint(97, (3, 80), generator=torch.Generator().manual_seed(1))
    steps: list[tuple[Tensor, int | list[int]]] = [(tokens[:, :37], 0), (tokens[:, 37:60], 37), (tokens[:, 60:61], 60)]
    steps += [(tokens[:, 61:62], [61, 20, 3]), (tokens[:2, 62:66], [62, 21]), (tokens[:1, 66:67], 66)]
    for expected, found in zip(read(plain, steps), read(fast, steps), strict=True):
        assert expected.abs().max() > 1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_whole_sequences_without_a_cache() -> None:
    plain, fast = twins(n_heads=4, n_kv_heads=2)
    tokens = torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(fast(tokens), plain(tokens), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_bfloat16_is_as_near_to_float32_as_the_plain_model_in_bfloat16() -> None:
    exact, _ = twins(n_heads=4, n_kv_heads=2)
    plain, fast = twins(torch.bfloat16, n_heads=4, n_kv_heads=2)
    tokens = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = F.log_softmax(exact(tokens), -1)
        errors = [(F.log_softmax(model(tokens), -1) - expected).square().mean().sqrt() for model in (plain, fast)]
    assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.usefixtures("way")
def test_the_text_is_the_same() -> None:
    """Ragged prompts, rows that leave, guesses that are read along; of the embedded checkpoint, whose heads are of a
    size that the kernels take."""
    llama = Llama.build(max_seq_len=128)
    prompts = ["def f(x):\n", "x", "import os\n\n\ndef read(path):\n    return"]
    args = {"temperature": 0.0, "max_gen_len": 60}
    expected = [r["generation"] for r in llama.text_completion(prompts, **args)]
    fast = Llama(speed_up_(llama.model), llama.tokenizer)
    assert [r["generation"] for r in fast.text_completion(prompts, **args)] == expected
    guessing = Llama(fast.model, fast.tokenizer, lookup=4)
    assert [r["generation"] for r in guessing.text_completion(prompts, **args)] == expected


@pytest.mark.parametrize(("H", "K", "D"), [(8, 8, 64), (8, 2, 64), (16, 2, 128)])
@pytest.mark.parametrize("peak", [1, 8, 25], ids=["flat", "peaked", "sharp"])
def test_one_query_in_bfloat16_is_as_exact_as_the_fused_kernel(H: int, K: int, D: int, peak: float) -> None:
    """Of 4,096 keys, against float64. A score of some tens that is rounded to bfloat16 is off by a tenth, and so is
    the weight made of it: that cost 7 to 13 times the kernel's error."""
    draw = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(2, n, S, D, generator=draw) for n, S in ((H, 1), (K, 4096), (K, 4096)))
    q, keys, values = q.bfloat16(), (keys * peak / D**0.5 * 2).bfloat16(), values.bfloat16()
    exact = F.scaled_dot_product_attention(q.double(), keys.double(), values.double(), enable_gqa=True)
    span = Span([4095], 1, 4096, q.dtype, q.device)

    def error(found: Tensor) -> float:
        assert found.dtype == torch.bfloat16
        return float((found.double() - exact).norm() / exact.norm())

    fused = error(scaled_dot_product(q, keys, values, span))
    assert 0 < error(_decode(q, keys, values, None)) < 1.5 * fused
    mask = Span([4095, 4095], 1, 4096, q.dtype, q.device).mask
    assert 0 < error(_decode(q, keys, values, mask)) < 1.5 * fused


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fast"])
def test_rows_at_one_position_need_no_mask(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a prompt from its start nor for one token each: a mask keeps a GPU from its fastest kernels."""
    model = twins(n_heads=4, n_kv_heads=2)[fused]
    if fused:
        model.hidden = partial(Transformer.hidden, model)  # block by block
    tokens = torch.arange(30).view(3, 10)
    for part, start, masks in ((tokens, 0, 0), (tokens[:, :1], 10, 0), (tokens[:, :1], [11, 3, 4], 1)):
        made: list[Span] = []
        mask = Span.mask

        def counted(span: Span, made: list[Span] = made, mask: property = mask) -> Tensor:
            made.append(span)
            return mask.__get__(span)

        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(Span, "mask", property(counted))
            model.hidden(part, start, model.own_cache())
        assert len({id(span) for span in made}) == masks


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "operators"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_packed_product_is_the_product(
    dtype: torch.dtype, rows: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.fast.packing.available", lambda: kernels)
    g = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=g).to(dtype) for size in ((33, 40), (2, rows, 40)))
    exact = x.double() @ weight.double().T
    found = packed(weight)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(),
        exact,
        rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-1 if dtype == torch.bfloat16 else 1e-4,
    )


def test_without_the_private_operator_a_product_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.fast.packing.available", lambda: False)
    monkeypatch.setattr("llama.fast.packing._can_reorder", lambda dtype: False)
    weight, x = torch.randn(5, 4), torch.randn(3, 4)
    assert torch.equal(packed(weight)(x), F.linear(x, weight))


def test_weights_are_taken_over_and_not_kept_twice() -> None:
    plain, fast = twins(n_heads=4, n_kv_heads=2)
    left = sum(p.numel() for p in fast.parameters())
    assert left == fast.tok_embeddings.weight.numel() + fast.norm.weight.numel()
    assert sum(p.numel() for p in plain.parameters()) > 2 * left


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantised_model_is_made_fast_with_the_same_codes(scheme: str) -> None:
    torch.manual_seed(0)
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, max_seq_len=64, multiple_of=64)
    model = quantize_(Transformer(args).to(torch.bfloat16).requires_grad_(False), scheme)
    fast = speed_up_(copy.deepcopy(model))
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(fast(tokens), model(tokens), rtol=0, atol=2e-2)


def test_rotation_by_complex_numbers_is_the_rotation() -> None:
    x, turn = torch.randn(2, 5, 3, 8), Turn()
    for _ in range(2):  # what was made of one step's angles is not used for the next
        angles = torch.randn(1, 5, 1, 4)
        rotation = angles.cos(), angles.sin()
        for part in (x, x[:, :, 1:]):
            torch.testing.assert_close(turn(part, rotation), plain_rotate(part, *rotation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_norm_of_twice_as_many_is_rms_norm(dtype: torch.dtype, size: float) -> None:
    """Against float64; around the eps too, where it counts."""
    norm = RMSNorm(96, 1e-6).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    x = (torch.randn(2, 5, 96) * size + size).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.to(dtype).double()
    found = FusedNorm(norm.to(dtype))(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=2e-6 if dtype == torch.float32 else 2**-8, atol=1e-6)
