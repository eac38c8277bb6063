"""On a CUDA GPU: the oracle's logits, the CPU's products, the CPU's text. All of it alone by `pytest -m cuda`.

Without a GPU these are skipped. What can be known without one is tested in test_fake_devices.py.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor

import reference
from gpu.test_fake_devices import WORDS
from llama import Llama, ModelArgs, Transformer, parallel
from llama.cache import KVCache
from llama.fast import speed_up_
from llama.fast.attention import _decode
from llama.fast.compiled import compile_
from llama.longcontext.int8_cache import int8_cache
from llama.quantize.layers import quantize_
from llama.quantize.schemes import Quantized, scheme_of
from parallel.ranks import on_ranks

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not GPUS, reason="no CUDA GPU here")]

CHANGES: dict[str, Callable[[Transformer], object]] = {"plain": lambda model: model, "fast": speed_up_}
CACHES: dict[str, Callable[[Transformer], KVCache]] = {"plain": Transformer.own_cache, "int8": int8_cache}
EXACT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far logits may be off, of their own size."""


def on_gpu(args: ModelArgs, dtype: torch.dtype = torch.float32) -> tuple[Transformer, dict[str, Tensor]]:
    parallel.start()
    weights = reference.random_weights(args)
    with torch.device("cuda"):
        model = Transformer(args).to(dtype).requires_grad_(False)
    model.load_state_dict(weights, strict=True)
    return model, weights


def off(found: Tensor, right: Tensor) -> float:
    found, right = found.double().cpu(), right.double().cpu()
    return float((found - right).norm() / right.norm())


def steps(model: Transformer, cache: KVCache, tokens: Tensor) -> Tensor:
    """Logits of tokens (B, T): a prompt in two pieces, a token for all rows at one position, then the rows from the
    second on by themselves, each at its own position, one of them again."""
    tokens, T = tokens.cuda(), tokens.shape[1]
    found = [model(tokens[:, :9], 0, cache), model(tokens[:, 9:-2], 9, cache), model(tokens[:, -2:-1], T - 2, cache)]
    model(tokens[1:, 5:6], cache.span([5] * (len(tokens) - 1), len(tokens) - 1, 1, 1), cache)
    first = model(tokens[:1, -1:], cache.span(T - 1, 1, 1), cache)
    model(tokens[1:, 6:], cache.span(6, len(tokens) - 1, T - 6, 1), cache)
    starts = [T - 1] * (len(tokens) - 2) + [T - 2]
    last = torch.cat((tokens[1:-1, -1], tokens[-1:, -2]))[:, None].int()
    given = torch.tensor(starts, device="cuda")[:, None]
    ragged = model(last, cache.span(starts, len(starts), 1, 1, given), cache)
    assert off(ragged[-1, 0], found[-1][-1, 0]) < 2e-2
    found.append(
        torch.cat((first, ragged[:-1], model(tokens[-1:, -1:], cache.span(T - 1, 1, 1, len(tokens) - 1), cache)))
    )
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_logits_are_the_oracles(
    tiny: ModelArgs,
    dtype: torch.dtype,
    change: Callable[[Transformer], object],
    cache: Callable[[Transformer], KVCache],
    kv_heads: int,
) -> None:
    tiny.n_kv_heads = kv_heads
    model, weights = on_gpu(tiny, dtype)
    change(model)
    tokens = torch.randint(tiny.vocab_size, (4, 40))
    with torch.inference_mode():
        found = steps(model, cache(model), tokens)
    assert 0 < off(found, reference.llama(tiny, weights, tokens)) < EXACT[dtype] + (2e-2 if cache is int8_cache else 0)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", EXACT)
def test_products_are_the_cpus(word: str, dtype: torch.dtype) -> None:
    """Each operator by few and many rows, against float64 by the weights that its codes stand for; joined; and its
    tensors come back bit by bit."""
    if word == "nf4":
        pytest.importorskip("bitsandbytes")
    scheme, weight = scheme_of(word), torch.randn(128, 512)
    stored = scheme.quantize(weight)
    exact = scheme.dequantize(stored).double()
    product = Quantized(scheme, {key: tensor.cuda() for key, tensor in stored.items()})
    bound = 2e-2 if "dynamic" in word else 1e-2
    for rows in (1, 2, 5, 16, 17, 40, 200):
        x = torch.randn(rows, 512).to(dtype)
        right = x.double() @ exact.T
        assert off(product(x.cuda()), right) < bound
        assert off(product.joined([product])(x.cuda()), torch.cat((right, right), 1)) < bound
    assert {key: tensor.cpu().tolist() for key, tensor in product.stored.items()} == {
        key: tensor.tolist() for key, tensor in stored.items()
    }


@pytest.mark.parametrize("word", ["int8", "int8-dynamic", "int4", "int4-dynamic"])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_a_quantised_model_has_the_cpus_logits(word: str, fast: bool) -> None:
    args = ModelArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, max_batch_size=4, max_seq_len=160)
    model, weights = on_gpu(args)
    on_cpu = Transformer(args).requires_grad_(False)
    on_cpu.load_state_dict(weights)
    quantize_(on_cpu, word)
    quantize_(model, word)
    if fast:
        speed_up_(model)
    tokens = torch.randint(96, (4, 40))
    with torch.inference_mode():
        assert off(steps(model, model.own_cache(), tokens), on_cpu(tokens)) < (5e-2 if "dynamic" in word else 2e-2)


@pytest.mark.parametrize("peak", [1, 8, 25])
def test_one_query_in_bfloat16_keeps_its_scores_in_float32(peak: float) -> None:
    q, keys, values = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 4096, 64) * peak / 4, torch.randn(2, 2, 4096, 64)
    q, keys, values = (x.cuda().bfloat16() for x in (q, keys, values))
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), keys.double(), values.double(), enable_gqa=True
    )
    assert off(_decode(q, keys, values, None), exact) < 5e-3
    assert off(_decode(q, keys, values, torch.zeros(1, 1, 1, 4096, device="cuda")), exact) < 5e-3


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_step_makes_the_host_wait_for_nothing(tiny: ModelArgs, change: Callable[[Transformer], object]) -> None:
    model, _ = on_gpu(tiny)
    change(model)
    cache, tokens = model.own_cache(), torch.zeros(3, 1, dtype=torch.int32, device="cuda")
    first = torch.tensor([[7], [3], [4]], device="cuda")
    with torch.inference_mode():
        for _ in range(2):
            model.logits(model.hidden(tokens, cache.span([7, 3, 4], 3, 1, 0, first), cache))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.logits(model.hidden(tokens, cache.span([7, 3, 4], 3, 1, 0, first), cache))
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Text ----------------------------------------------------------------------------------------------------------------

PROMPTS = ["def f(x):\n", "x", "import os\n\n\ndef read(path, mode):\n    return"]


def written(llama: Llama) -> list[str]:
    """Up to the cache's last slot."""
    return [found["generation"] for found in llama.text_completion(PROMPTS, temperature=0.0)]


def llama_on(device: str, **settings: int) -> Llama:
    limits = {"max_seq_len": 160, "max_batch_size": 3, "prefill_chunk": 16, **settings}
    return Llama.build(device=device, dtype=torch.float32, **limits)


@pytest.mark.parametrize("lookup", [0, 3])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_text_up_to_the_caches_end_is_the_cpus(change: Callable[[Transformer], object], lookup: int) -> None:
    llama = llama_on("cuda", lookup=lookup)
    change(llama.model)
    assert written(llama) == written(llama_on("cpu"))


def test_a_seed_writes_the_same_again() -> None:
    llama = llama_on("cuda")
    once, again = (llama.text_completion(PROMPTS, 0.8, seed=[1, 2, 3], max_gen_len=30) for _ in range(2))
    assert once == again


# Compiled ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("lookup", [0, 3])
def test_compiled_text_up_to_the_caches_end_is_the_cpus(
    change: Callable[[Transformer], object], lookup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are padded, graphs for few slots and for all; nothing is compiled after the start, and steps may come
    from any thread."""
    monkeypatch.setattr("llama.fast.compiled.EXACT_ROWS", 1)
    monkeypatch.setattr("llama.fast.compiled.FEWEST_SLOTS", 64)
    torch._dynamo.reset()
    llama = llama_on("cuda", lookup=lookup, max_batch_size=4)
    change(llama.model)
    compile_(llama.model, 16, progress=False, lookup=lookup)
    right, found = written(llama_on("cpu")), []
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert written(llama) == right
        thread = threading.Thread(target=lambda: found.append(written(llama)))
        thread.start()
        thread.join()
    assert found == [right]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_recorded_graphs_give_what_the_model_gives(
    tiny: ModelArgs,
    change: Callable[[Transformer], object],
    cache: Callable[[Transformer], KVCache],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16, at every position up to the last; an answer is not overwritten by the next; idle rows stay as they
    are, bit by bit."""
    monkeypatch.setattr("llama.fast.compiled.EXACT_ROWS", 2)
    monkeypatch.setattr("llama.fast.compiled.FEWEST_SLOTS", 64)
    torch._dynamo.reset()
    tiny.max_batch_size = 6
    plain, _ = on_gpu(tiny, torch.bfloat16)
    quick = copy.deepcopy(plain)
    change(quick)
    plain.cache, quick.cache = cache(plain), cache(quick)
    compile_(quick, 32, progress=False)
    tokens = torch.randint(tiny.vocab_size, (6, 160), device="cuda")
    with torch.inference_mode():
        right, found = (model(tokens[:, :100], 0) for model in (plain, quick))
        assert off(found, right) < 5e-2  # both are rounded to bfloat16, in another order
        idle = [store[3:].clone() for store in (*quick.cache.keys, *quick.cache.values)]
        answers = [[model(tokens[:3, i : i + 1], i) for i in range(100, 160)] for model in (plain, quick)]
        assert off(torch.cat(answers[1], 1), torch.cat(answers[0], 1)) < 5e-2
        for store, was in zip((*quick.cache.keys, *quick.cache.values), idle, strict=True):
            assert torch.equal(store[3:], was)


# Several GPUs --------------------------------------------------------------------------------------------------------

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, max_seq_len=64, max_batch_size=4)


def on_a_rank(init_method: str, compiled: bool) -> Tensor:
    ranks = parallel.start(init_method=init_method, timeout=120)
    with ranks.all_ranks():
        torch.manual_seed(0)
        model = Transformer(ARGS).requires_grad_(False).to(ranks.device)
        speed_up_(model)
        if compiled:
            with ranks.patience():
                compile_(model, 16, progress=False)
        tokens = torch.arange(3, 83).view(2, 40) % 96
        with torch.inference_mode():
            return steps(model, model.own_cache(), tokens).cpu()


@pytest.mark.slow
@pytest.mark.skipif(GPUS < 2, reason="fewer than two CUDA GPUs here")
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_two_gpus_compute_what_a_cpu_does(compiled: bool) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        right = Transformer(ARGS)(torch.arange(3, 83).view(2, 40) % 96)
    for found in on_ranks(on_a_rank, 2, compiled, limit=600):
        assert off(found, right) < 1e-4
