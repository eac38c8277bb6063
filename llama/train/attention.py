"""Attention written out, for training on a CPU.

PyTorch's fused kernel saves the memory of the scores, which matters for long rows and on a GPU. On a CPU its backward
pass takes a third of a training step, and two plain matrix products are faster. Queries are taken in blocks, each
with the keys up to its own end: so half of the scores that the mask would hide are never made (the README has the
figures).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.cache import Span

BLOCK = 256
"""Queries at a time: larger ones make more scores in vain, and smaller ones more, smaller products."""


def causal_attention(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """softmax(q·k / sqrt(D))·v of whole sequences: q (B, H, T, D), keys and values (B, K, T, D) to (B, H, T, D)."""
    assert span.is_square, "for training, where the new tokens are all there is"
    T, D = q.shape[2:]
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)  # (B, H, T, D)
    blocks = []
    for start, block in zip(range(0, T, BLOCK), (q * D**-0.5).split(BLOCK, dim=2), strict=True):
        end = start + block.shape[2]
        scores = block @ keys[:, :, :end].transpose(-1, -2)  # (B, H, end - start, end)
        future = torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu_(start + 1)
        blocks.append((scores + future).softmax(-1).to(values.dtype) @ values[:, :, :end])
    return torch.cat(blocks, dim=2)
