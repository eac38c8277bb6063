"""Which part of each parameter a rank holds, written from the table of the published format and not from ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.config import ModelArgs


def part(name: str, whole: Tensor, rank: int, n: int, n_kv_heads: int) -> Tensor:
    """Rank `rank`'s part of a parameter, by the table of the published format."""
    if "norm" in name:
        return whole
    if ("wk" in name or "wv" in name) and n > n_kv_heads:
        heads = whole.unflatten(0, (n_kv_heads, -1)).repeat_interleave(n // n_kv_heads, 0)
        return heads[rank]
    return whole.tensor_split(n, _cut(name))[rank]


def whole(name: str, parts: Sequence[Tensor]) -> Tensor:
    """A parameter from all ranks' parts of it, which are no more than there are kv heads."""
    return parts[0] if "norm" in name else torch.cat([*parts], _cut(name))


def _cut(name: str) -> int:
    return int(any(short in name for short in ("tok_embeddings", "wo", "w2")))


def shard(weights: dict[str, Tensor], args: ModelArgs, rank: int, n: int) -> dict[str, Tensor]:
    return {name: part(name, w, rank, n, args.n_kv_heads) for name, w in weights.items()}
