"""Attention the way that is quickest for what is asked, over no more slots than are seen.

PyTorch's fused kernel is made for many queries and pays for it with one: in bfloat16 on a CPU, a decode step against a
long cache takes it several times as long as two products and a softmax, though one against a short cache less. And a
prompt, on a processor with vectors of 512 bits, longer than those of llama/kernels (docs/LOG.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import Span
from llama.kernels import prompt
from llama.kernels.matrix import multiplies_bfloat16
from llama.model import scaled_dot_product

SHORT = 1 << 13
"""Slots of all rows' kv heads up to which, for one query on a CPU, the fused kernel is faster after all."""
GIVES_FLOAT32 = hasattr(torch.ops.aten.bmm, "dtype")
"""Whether CUDA's product of 16-bit numbers gives its float32 sums as they are (PyTorch 2.8)."""


def attend(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """softmax(q·k / sqrt(D))·v: q (B, H, T, D), keys and values (B, K, S, D) to (B, H, T, D)."""
    B, _, T, _ = q.shape
    compiling = torch.compiler.is_compiling()  # which can't look into what asks for the processor's features
    if T > 1 and not compiling and prompt.quickest(q):
        return prompt.attend(q, keys, values, span.positions[:, 0].expand(B))
    if T > 1 or (q.is_cpu and q.dtype == torch.bfloat16 and (compiling or not multiplies_bfloat16())):
        return scaled_dot_product(q, keys, values, span)
    if span.start is None:  # rows at positions of their own
        return _decode(q, keys, values, span.mask)
    return _decode(q, keys[:, :, : span.start + 1], values[:, :, : span.start + 1], None)


def _decode(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """One query a row, which sees all slots, or those where `mask` (B or 1, 1, 1, S) is 0."""
    H = q.shape[1]
    B, K, S, D = keys.shape
    if q.is_cpu and B * K * S <= SHORT:
        grouped = q.reshape(B, K, -1, D)
        if H == K:  # a product in bfloat16 begins as slowly for one query as for many
            grouped, keys, values = grouped.float(), keys.float(), values.float()
        mask = None if mask is None else mask.type_as(grouped)
        return F.scaled_dot_product_attention(grouped, keys, values, mask).type_as(q).view(B, H, 1, D)
    grouped = q.reshape(B * K, -1, D)  # (B * K, H / K, D)
    scores = _scores(grouped, keys.flatten(0, 1))  # (B * K, H / K, S)
    if mask is not None:
        scores = (scores.reshape(B, H, 1, -1) + mask).view_as(scores)
    weights = scores.softmax(-1).type_as(values)
    return torch.bmm(weights, values.flatten(0, 1)).view(B, H, 1, D)


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """q·k / sqrt(D), float32: (N, R, D) and (N, S, D) to (N, R, S). A score of some tens has no room in bfloat16: its
    rounding would be a factor of the softmax's weight. Where the root is a power of 2, the queries are divided instead
    of the scores: it is exact, and they are fewer. Keys first: with few queries PyTorch multiplies so several times
    faster where rows are slices of a longer cache."""
    scale = q.shape[-1] ** -0.5
    exact = math.frexp(scale)[0] == 0.5
    q = (q * scale if exact else q).mT
    if q.is_cuda and q.dtype != torch.float32 and GIVES_FLOAT32:
        scores = torch.bmm(keys, q, out_dtype=torch.float32).mT
    else:
        scores = torch.bmm(keys.float(), q.float()).mT
    return scores if exact else scores.mul_(scale)
