"""Compiled on several ranks: the sums over them are part of the graph."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import Tensor

from llama import parallel
from llama.config import ModelArgs
from llama.fast import speed_up_
from llama.fast.compiled import compile_
from llama.model import Transformer
from llama.quantize.layers import linears, quantize_
from parallel.ranks import on_ranks
from parallel.shards import whole
from reference import llama

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, max_seq_len=64, max_batch_size=2)


TOKENS = torch.arange(3, 83).view(2, 40)


def read(model: Transformer) -> Tensor:
    """A prompt in two chunks, then tokens of rows at positions of their own."""
    with torch.inference_mode():
        found = [model(TOKENS[:, :16], 0), model(TOKENS[:, 16:37], 16)]
        found += [model(TOKENS[:, 37:38], 37), model(TOKENS[:, 38:39], [38, 20])]
        return torch.cat(found, dim=1)


def right(weights: dict[str, Tensor]) -> Tensor:
    """The same in float64: the second row's last token follows its first 20."""
    logits = llama(ARGS, weights, TOKENS[:, :39])
    logits[1, 38] = llama(ARGS, weights, torch.cat((TOKENS[1:, :20], TOKENS[1:, 38:39]), 1))[0, -1]
    return logits


def check(init_method: str, fused: bool, scheme: str | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    ranks = parallel.start(init_method=init_method, timeout=60)
    torch.manual_seed(0)
    model = Transformer(ARGS).requires_grad_(False)
    weights = dict(model.state_dict())
    with ranks.all_ranks():
        if scheme:
            quantize_(model, scheme)
            products = {name: layer.product for name, layer in linears(model).items()}
            weights |= {name: product.scheme.dequantize(product.stored) for name, product in products.items()}
        if fused:
            speed_up_(model)
        plain = read(model)
        torch._dynamo.reset()
        compile_(model, chunk=16, progress=False, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            return plain, read(model), weights


@pytest.mark.parametrize(
    ("fused", "scheme"),
    [*(pytest.param(fused, None, marks=pytest.mark.slow) for fused in (False, True)), (True, "int8")],
)
def test_two_ranks_compute_compiled_what_they_do_without(fused: bool, scheme: str | None) -> None:
    """Both are near what float64 computes by the same weights, and the compiled one is not farther from it."""
    results = on_ranks(check, 2, fused, scheme, limit=240)
    parts = [weights for _, _, weights in results]
    expected = right({name: whole(name, [part[name] for part in parts]) for name in parts[0]})
    for plain, compiled, _ in results:
        error, of_compiled = (
            float((found - expected).square().mean().sqrt() / expected.std()) for found in (plain, compiled)
        )
        # Where a processor multiplies in bfloat16, each product by quantised weights is off by up to 2^-9 of itself.
        assert error < (2**-7 if scheme else 1e-6)
        assert of_compiled < 3 * error
