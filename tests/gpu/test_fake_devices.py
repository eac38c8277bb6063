"""Other devices, without one: what would mix devices there, or ask for an operator that isn't there, fails here.

Numbers there are none, so these say nothing about results; tests/gpu/test_cuda.py does, where there is a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from gpu.fakes import Crossings, fake_device
from llama import Llama, ModelArgs, Transformer, parallel
from llama.cache import KVCache
from llama.fast import speed_up_
from llama.fast.compiled import CompiledHidden
from llama.longcontext.int8_cache import int8_cache
from llama.quantize.layers import linears, quantize_
from llama.quantize.operators import Stored
from llama.quantize.schemes import SCHEMES, Quantized, for_weight, scheme_of

ARGS = ModelArgs(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, max_batch_size=4, max_seq_len=160)
DEVICES = ("cuda", "mps")
WORDS = [f"{scheme.name}:{group}" if group else scheme.name for scheme in SCHEMES.values() for group in scheme.groups]
WORDS = [word.removesuffix(":64") if word.startswith("nf4") else word for word in WORDS]


@contextmanager
def on(device: str, dtype: torch.dtype) -> Iterator[torch.device]:
    parallel.start()  # fairscale's groups are made of numbers
    with fake_device(device) as there, torch.inference_mode():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield there
        finally:
            torch.set_default_dtype(before)


def stored_of(word: str, N: int, K: int) -> Stored:
    """Tensors as the scheme stores them, of no numbers: to quantise, weights would have to be looked at."""
    scheme, half = scheme_of(word), torch.bfloat16
    codes = (
        torch.zeros(N, K, dtype=torch.int8) if scheme.layout == "int8" else torch.zeros(N, K // 2, dtype=torch.uint8)
    )
    groups = K // scheme.group if scheme.group else 1
    return {"codes": codes, **{key: torch.zeros(N, groups, dtype=half) for key in scheme.keys[1:]}}


def quantised_(model: Transformer, word: str) -> Transformer:
    for name, layer in linears(model).items():
        N, K = layer.weight.shape
        own = for_weight(scheme_of(word), name)
        layer.product = Quantized(own, stored_of(str(own), N, K))
        layer.weight = None
    return model


def steps(model: Transformer, cache: KVCache, device: torch.device) -> None:
    """Prompts whole and in pieces, steps of rows at one position and at their own, from the first row on and not."""
    tokens = torch.zeros(2, 20, dtype=torch.int64)
    one, first = tokens[:, :1].int(), torch.zeros(2, 2, dtype=torch.int32)
    for part, start in (
        (tokens, 0),
        (tokens[:, :7], cache.span(20, 2, 7)),
        (tokens[:, :7], cache.span([20, 3], 2, 7, 2)),
        (one, 40),
        (one, cache.span(41, 2, 1, 1)),
        (one, [40, 12]),
        (one, cache.span([40, 12], 2, 1, 2, first)),
    ):
        hidden = model.hidden(part, start, cache)
        logits = model.logits(hidden)
        assert hidden.device == logits.device == device
        assert logits.shape == (*part.shape, 96)
        assert logits.dtype == torch.float32
    cache.copy_row_(0, 3, 5)
    cache.swap_rows_(1, 2)


CHANGES: dict[str, Callable[[Transformer], object]] = {"plain": lambda model: model, "fast": speed_up_}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("cache", ["plain", "int8"])
def test_prompts_and_steps(
    device: str, dtype: torch.dtype, change: Callable[[Transformer], object], cache: str
) -> None:
    with on(device, dtype) as there:
        model = Transformer(ARGS).requires_grad_(False)
        assert {p.device for p in model.parameters()} == {there}
        change(model)
        steps(model, int8_cache(model) if cache == "int8" else model.own_cache(), there)
        whole = model(torch.zeros(2, 20, dtype=torch.int64))
        assert whole.device == there


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_quantised_models(device: str, word: str, fast: bool) -> None:
    """By plain arithmetic, or what PyTorch says the device has; fast, products of one input are joined."""
    if word == "nf4":
        pytest.importorskip("bitsandbytes")
    with on(device, torch.bfloat16) as there:
        model = quantised_(Transformer(replace(ARGS, dim=256)).requires_grad_(False), word)
        if fast:
            speed_up_(model)
        steps(model, model.own_cache(), there)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_cudas_own_operators(word: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a build with CUDA has: packed, multiplied, joined, and their tensors back as they were stored."""
    if word == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("llama.quantize.operators.has", lambda operator, device: device == "cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    with on("cuda", dtype) as there:
        stored = stored_of(word, 64, 256)
        product = Quantized(scheme_of(word), stored)
        # On meta, not on the CPU: int8-dynamic has one operator for CUDA and for a CPU that multiplies bytes.
        elsewhere = {key: tensor.to("meta") for key, tensor in stored.items()}
        assert not product.operator.takes(elsewhere), "plain arithmetic, which takes all, instead of CUDA's operator"
        for one, width in ((product, 64), (product.joined([product]), 128)):
            out = one(torch.zeros(2, rows, 256))
            assert (out.device, out.dtype, out.shape) == (there, dtype, (2, rows, width))
        for key, tensor in product.stored.items():
            assert (tensor.device, tensor.dtype, tensor.shape) == (there, stored[key].dtype, stored[key].shape)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_the_steps_that_are_compiled(fast: bool) -> None:
    """Before any compiler: rows of padding, and a row whose number is on the device."""
    with on("cuda", torch.bfloat16) as there:
        model = Transformer(replace(ARGS, max_batch_size=12)).requires_grad_(False)
        if fast:
            speed_up_(model)
        hidden = CompiledHidden(model, 64, lookup=3, backend="eager")
        hidden.decode, hidden.read = hidden._decode, hidden._read
        model.hidden = hidden
        steps(model, model.own_cache(), there)
        for B, T in ((9, 1), (12, 4), (1, 150)):
            assert hidden(torch.zeros(B, T, dtype=torch.int32), 0, model.own_cache()).shape == (B, T, 128)


def test_a_step_needs_one_copy_and_no_wait() -> None:
    """Of the positions; and none where they are on the device already. tests/core counts those of the loop."""
    with on("cuda", torch.bfloat16):
        model = speed_up_(Transformer(ARGS).requires_grad_(False))
        cache, token = model.own_cache(), torch.zeros(2, 2, dtype=torch.int32)
        model.hidden(token, 0, cache)  # what is made once: tables
        first = torch.zeros(2, 2, dtype=torch.int32)
        for span, copies in ((cache.span([7, 3], 2, 1), 1), (cache.span([8, 4], 2, 1, 0, first), 0)):
            with Crossings() as crossings:
                model.logits(model.hidden(token, span, cache))
            assert (crossings.copied, crossings.read) == (copies, 0)


def test_what_a_fake_device_would_miss() -> None:
    """The harness itself: devices that are mixed, numbers that are looked at."""
    with on("cuda", torch.float32):
        x = torch.zeros(4, 4)
        with pytest.raises(RuntimeError, match="cpu"):
            x + torch.zeros(4, 4, device="cpu")
        with pytest.raises(RuntimeError, match="cpu"):
            x[:2] = torch.zeros(2, 2, device="cpu") @ torch.zeros(2, 4)[:, :2]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x.sum().item()
        with Crossings() as crossings:
            torch.tensor([1, 2]), torch.zeros(2, device="cpu").to("cuda"), x.to(torch.float16), x[:2]
        assert (crossings.copied, crossings.read) == (2, 0)
    right = [torch.zeros(2, 3, 4)[where].shape for where in indices()]
    with on("cuda", torch.float32):
        assert [torch.zeros(2, 3, 4)[where].shape for where in indices()] == right


def indices() -> list[object]:
    rows = torch.tensor([1, 0])
    return [(slice(1, None), 2), (rows, slice(None), 1), (rows[:, None], slice(None), rows), (..., 0), (None, 1), rows]


# A default device that isn't the model's -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_default_device_changes_nothing_for_a_model_on_the_cpu(device: str) -> None:
    """Where there is no CUDA, a tensor made on it by mistake is an error; on meta, it has no numbers."""
    torch.manual_seed(0)
    model = Transformer(replace(ARGS, dim=256)).requires_grad_(False)
    tokens = torch.arange(80).view(2, 40)

    def scores() -> list[Tensor]:
        found = []
        for change in (
            lambda model: model,
            speed_up_,
            *(partial(quantize_, scheme=word) for word in ("int8", "int8-dynamic", "int4")),
            lambda model: speed_up_(quantize_(model, "int4")),
        ):
            for cached in (Transformer.own_cache, int8_cache):
                made = copy.deepcopy(model)
                change(made)
                cache = cached(made)
                found += [made(tokens[:, :30], 0, cache), made(tokens[:, 30:31], [30, 12], cache)]
                found += [made(tokens[1:, 31:], cache.span(31, 1, 9, 3), cache), made(tokens)]
        return found

    with torch.inference_mode():
        expected = scores()
        with torch.device(device):
            found = scores()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_default_device_changes_nothing_for_a_llama_on_the_cpu(device: str) -> None:
    """Built, greedy and drawn, with what was drawn scored."""

    def written() -> list[object]:
        llama = Llama.build(max_seq_len=128, max_batch_size=2, device="cpu")
        prompts = ["def f(x):\n", "import os\n"]
        greedy = llama.text_completion(prompts, temperature=0.0, max_gen_len=12)
        drawn = llama.text_completion(prompts, 0.8, max_gen_len=12, seed=1, logprobs=True)
        free = llama.text_completion(prompts, 0.8, max_gen_len=2)
        return [greedy, drawn, [len(one) for one in free], llama.score(prompts)]

    expected = written()
    with torch.device(device):
        assert written() == expected
