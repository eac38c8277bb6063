"""Attention as plain matrix products, over no more slots than are seen.

PyTorch's fused kernel is made for many queries and pays for it with one: in bfloat16 on a CPU, a decode step against a
long cache takes it several times as long as two products and a softmax, though one against a short cache less
(docs/LOG.md). For a prompt, queries are taken in blocks, each with the slots up to its own end, so that half of the
scores that a mask would hide are never made; blocks are as large as a fixed amount of scores allows, so memory does not
grow with the prompt. Query heads that share a kv head are rows of one product: keys and values are read where they lie,
once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import Span
from llama.model import scaled_dot_product

SCORES = 1 << 24
"""Scores that a block may have, of all heads and rows, as long as it has 16 queries: 32 MB in bfloat16."""
BLOCK = 256
"""Queries that it has at most: more make more scores in vain."""
SHORT = 1 << 13
"""Slots of all rows' kv heads up to which, for one query on a CPU, the fused kernel is faster after all."""


def attend(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """softmax(q·k / sqrt(D))·v: q (B, H, T, D), keys and values (B, K, S, D) to (B, H, T, D)."""
    if span.start is None:  # rows at positions of their own
        return _decode(q, keys, values, span.mask) if q.shape[2] == 1 else scaled_dot_product(q, keys, values, span)
    end = span.start + q.shape[2]
    keys, values = keys[:, :, :end], values[:, :, :end]
    return _decode(q, keys, values, None) if q.shape[2] == 1 else _prefill(q, keys, values, span.start)


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
    # Keys first: with few queries PyTorch multiplies so several times faster where rows are slices of a longer cache.
    scores = _scores(keys.flatten(0, 1), grouped).transpose(1, 2)  # (B * K, H / K, S)
    if mask is not None:
        scores = (scores.reshape(B, H, 1, -1) + mask).view_as(scores)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(B, H, 1, D)


def _prefill(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """T queries a row from position `start` on, each of which sees the slots up to its own."""
    B, H, T, D = q.shape
    K = keys.shape[1]
    k, v = keys.flatten(0, 1), values.flatten(0, 1)  # (B * K, S, D)
    size = min(BLOCK, max(16, SCORES // (B * H * k.shape[1])))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, T, size):
        last = min(first + size, T)
        end = start + last
        block = q[:, :, first:last].reshape(B * K, -1, D)  # (B * K, H / K * block, D)
        scores = _scores(block, k[:, :end])
        hidden = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu_(1)
        own = scores.view(B * H, last - first, end)[:, :, start + first :]  # the block's own slots
        own.masked_fill_(hidden, -torch.inf)
        out[:, :, first:last] = torch.bmm(scores.softmax(-1), v[:, :end]).view(B, H, last - first, D)
    return out


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """q·k / sqrt(D): (N, R, D) and (N, S, D) to (N, R, S)."""
    return torch.bmm(q, keys.transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
