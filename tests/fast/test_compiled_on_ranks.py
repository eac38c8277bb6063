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
from llama.quantize.layers import quantize_
from parallel.ranks import on_ranks

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, max_seq_len=64, max_batch_size=2)


def read(model: Transformer) -> Tensor:
    """A prompt in two chunks, then tokens of rows at positions of their own."""
    tokens = torch.arange(3, 83).view(2, 40)
    with torch.inference_mode():
        found = [model(tokens[:, :16], 0), model(tokens[:, 16:37], 16)]
        found += [model(tokens[:, 37:38], 37), model(tokens[:, 38:39], [38, 20])]
        return torch.cat(found, dim=1)


def check(init_method: str, fused: bool, scheme: str | None) -> tuple[Tensor, Tensor]:
    ranks = parallel.start(init_method=init_method, timeout=60)
    torch.manual_seed(0)
    model = Transformer(ARGS).requires_grad_(False)
    with ranks.all_ranks():
        if scheme:
            quantize_(model, scheme)
        if fused:
            speed_up_(model)
        expected = read(model)
        torch._dynamo.reset()
        compile_(model, chunk=16, progress=False, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            return expected, read(model)


@pytest.mark.parametrize(
    ("fused", "scheme"),
    [*(pytest.param(fused, None, marks=pytest.mark.slow) for fused in (False, True)), (True, "int8")],
)
def test_two_ranks_compute_compiled_what_they_do_without(fused: bool, scheme: str | None) -> None:
    for expected, found in on_ranks(check, 2, fused, scheme, limit=240):
        assert expected.abs().max() > 0.1
        # By quantised weights x has 16 bits: what is a little off may be rounded the other way.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if scheme else 1e-5)
