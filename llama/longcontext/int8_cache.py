"""A KV cache of one byte a number: twice the context in the memory that bfloat16 takes.

At 100,000 tokens the cache is what fills the memory, not the weights. Here each key and each value of each head is D
whole numbers from -127 to 127 and one scale, the largest absolute value / 127, so that no number is off by more than
half a scale. The scale is a bfloat16, which has the range of float32: what any model writes can be stored. It lies in
the two bytes behind its D numbers, so that a slot is D + 2 bytes, and all that the plain cache does with slots (write
them before they are visible, copy a row, count bytes) is done with these by the same code:

    number       0    1    2   ...  D-1  |  scale
    int8       -31  127    6   ...  -90  |  0x3c23

The model is not changed, and is not told: it is handed floats, those of one layer at a time, which are gone before the
next layer's are made. That costs time where one token is read (every byte is turned into a float first, and attention
then reads the floats), and next to none in prefill, where hundreds of tokens share the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from llama.cache import KVCache, Span
from llama.model import Transformer

SCALE = torch.bfloat16
LARGEST = 127
"""-128 is not used, so that a number and its negative are stored alike."""


def quantize(x: Tensor) -> Tensor:
    """(..., D) to (..., D + 2) int8: D numbers, each off by at most half the scale, and the scale's bytes."""
    wide = x.detach().float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).to(SCALE)
    scale = scale.clamp_min(torch.finfo(SCALE).tiny)  # of zeros, whose scale would be 0
    # bfloat16 may round the scale down, by a 257th at most: then the largest number is 127.496, which rounds to 127.
    steps = (wide / scale).round().to(torch.int8)
    return torch.cat((steps, scale.view(torch.int8)), -1)


def dequantize(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: (..., D + 2) int8 to (..., D) in `dtype`."""
    width = stored.shape[-1] - SCALE.itemsize
    return stored[..., :width].to(dtype).mul_(stored[..., width:].view(SCALE))


class Int8Cache(KVCache):
    """A KVCache whose `keys` and `values` are (rows, K, slots, D + 2) int8. `dtype` is that of the model, in which it
    takes and gives them."""

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        rows: int,
        slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bucket: int = 128,
    ) -> None:
        width = head_dim + SCALE.itemsize
        super().__init__(n_layers, n_kv_heads, width, rows, slots, dtype=torch.int8, device=device, bucket=bucket)
        self.dtype = dtype

    def span(
        self, start_pos: int | Sequence[int] | Tensor, B: int, T: int, row: int = 0, given: Tensor | None = None
    ) -> Span:
        return dataclasses.replace(super().span(start_pos, B, T, row, given), dtype=self.dtype)

    def pack(self, x: Tensor) -> Tensor:
        """The new tokens see each other as later ones will see them: quantised. So it makes no difference in which
        chunks a text is read."""
        return quantize(x)

    def unpack(self, stored: Tensor) -> Tensor:
        """A copy."""
        return dequantize(stored, self.dtype)


def int8_cache(model: Transformer, rows: int | None = None, slots: int | None = None, bucket: int = 128) -> Int8Cache:
    """An empty one for this model, by default of max_batch_size rows and max_seq_len slots:
    `llama.model.cache = int8_cache(llama.model)`, before the first prompt is read."""
    like, args = model.norm.weight, model.args
    return Int8Cache(
        args.n_layers,
        model.kv_heads,
        args.head_dim,
        args.max_batch_size if rows is None else rows,
        args.max_seq_len if slots is None else slots,
        dtype=like.dtype,
        device=like.device,
        bucket=bucket,
    )
