"""Attention as plain matrix products, over no more slots than are seen.

PyTorch's fused kernel is made for many queries and pays for it with one: in bfloat16 on a CPU, a decode step against a
long cache takes it several times as long as two products and a softmax, though one against a short cache less
(docs/LOG.md). For a prompt in bfloat16, queries are taken in blocks, each with the slots up to its own end, so that
half of the scores that a mask would hide are never made; and of so many heads at a time that their scores stay in a
processor's cache, so memory does not grow with the prompt. Query heads that share a kv head are rows of one product:
keys and values are read where they lie, once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import Span
from llama.kernels.matrix import multiplies_bfloat16
from llama.model import scaled_dot_product

SCORES = 1 << 23
"""Scores that are made at a time, as long as they are those of 16 queries of a kv head: 16 MB in bfloat16."""
BLOCK = 256
"""Queries of a block at most: more make more scores in vain, fewer make the products slow."""
BLOCKED = (torch.bfloat16,) if multiplies_bfloat16() else ()
"""In what a prompt is read so on a CPU. In float32, and where the processor doesn't multiply in bfloat16, PyTorch's
fused kernel is faster (docs/LOG.md), and a GPU's, which makes no scores in memory, is taken unmeasured."""
SHORT = 1 << 13
"""Slots of all rows' kv heads up to which, for one query on a CPU, the fused kernel is faster after all."""


def attend(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """softmax(q·k / sqrt(D))·v: q (B, H, T, D), keys and values (B, K, S, D) to (B, H, T, D)."""
    if q.is_cpu and q.dtype == torch.bfloat16 and not multiplies_bfloat16():  # plain products would take minutes
        return scaled_dot_product(q, keys, values, span)
    if span.start is None:  # rows at positions of their own
        return _decode(q, keys, values, span.mask) if q.shape[2] == 1 else scaled_dot_product(q, keys, values, span)
    end = span.start + q.shape[2]
    if q.shape[2] == 1:
        return _decode(q, keys[:, :, :end], values[:, :, :end], None)
    if q.is_cpu and q.dtype in BLOCKED:
        return _prefill(q, keys[:, :, :end], values[:, :, :end], span.start)
    return scaled_dot_product(q, keys, values, span)


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
    scores = _scores(grouped, keys.flatten(0, 1), keys_first=True)  # (B * K, H / K, S)
    if mask is not None:
        scores = (scores.reshape(B, H, 1, -1) + mask).view_as(scores)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(B, H, 1, D)


def _prefill(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """T queries a row from position `start` on, each of which sees the slots up to its own."""
    B, H, T, D = q.shape
    k, v = keys.flatten(0, 1), values.flatten(0, 1)  # (B * K, S, D)
    grouped = q.reshape(len(k), -1, T, D)  # (B * K, H / K, T, D)
    group = grouped.shape[1]
    out = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    size = min(BLOCK, max(16, SCORES // (group * k.shape[1])))
    for first in range(0, T, size):
        last = min(first + size, T)
        end = start + last
        hidden = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu_(1)
        heads = max(1, SCORES // (group * (last - first) * end))
        for head in range(0, len(k), heads):
            here = slice(head, head + heads)
            scores = _scores(grouped[here, :, first:last].flatten(1, 2), k[here, :end])
            own = scores.view(-1, last - first, end)[:, :, start + first :]  # the block's own slots
            own.masked_fill_(hidden, -torch.inf)
            out[here, :, first:last] = torch.bmm(scores.softmax(-1), v[here, :end]).view(-1, group, last - first, D)
    return out.view(B, H, T, D)


def _scores(q: Tensor, keys: Tensor, keys_first: bool = False) -> Tensor:
    """q·k / sqrt(D): (N, R, D) and (N, S, D) to (N, R, S). Where the root is a power of 2, the queries are divided
    instead of the scores: it is exact, and they are fewer. `keys_first`: with few queries PyTorch multiplies so several
    times faster where rows are slices of a longer cache."""
    scale = q.shape[-1] ** -0.5
    exact = math.frexp(scale)[0] == 0.5
    if exact:
        q = q * scale
    scores = torch.bmm(keys, q.mT).mT if keys_first else torch.bmm(q, keys.mT)
    return scores if exact else scores.mul_(scale)
