"""A weight that the kernels multiply by: plain, or quantised.

Up to FEW vectors at a time are multiplied in C++, straight from the weight's own bytes: nothing is packed, nothing is
kept twice, and sums are in float32. 8 and 4 bits meet the vectors in 16, bfloat16 in bfloat16 where the processor
multiplies in it. More, as a prompt has, are multiplied by matrix tiles where the processor has them (AMX), and are else
an ordinary matrix product of PyTorch's: in bfloat16 where the processor multiplies in it, else in float32, with as many
rows of the weight at a time made wide as stay in a processor's cache. INT8_DYNAMIC is INT8 that meets vectors of 8
bits: in whole numbers, where the processor multiplies bytes. INT4_DYNAMIC is INT4 that meets vectors of which each
group's numbers are rounded to 8 bits.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels import library

FLOAT32, BFLOAT16, INT8, INT8_DYNAMIC, INT4, INT4_DYNAMIC, NF4 = range(7)
"""kernels.cpp's kinds."""
PLAIN = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
FEW = 32
"""Vectors up to which the kernels are used. In float32 a matrix product is quicker from 32 on; for narrower
weights, which it needs widened, not yet with 64 (docs/LOG.md)."""
WIDENED = 1 << 20
"""Numbers of a weight that are made wide at a time: 4 MB."""


class Matrix:
    """x (..., C) to x·weightᵀ (..., N), in x's dtype."""

    def __init__(
        self, kind: int, codes: Tensor, columns: int, scale: Tensor | None = None, zero: Tensor | None = None
    ) -> None:
        """`codes` (N, …) are rows of `columns` weights; `scale` and `zero` bfloat16 (N, groups of a row)."""
        self.kind, self.shape = kind, (codes.shape[0], columns)
        self.codes, self.scale, self.zero = (None if t is None else t.contiguous() for t in (codes, scale, zero))
        assert self.codes is not None
        group = 0 if scale is None or kind in (INT8, INT8_DYNAMIC) else columns // scale.shape[1]
        assert not group or (group in (32, 64, 128) and columns % group == 0 and (kind != NF4 or group == 64))
        pointers = (None if t is None else t.data_ptr() for t in (self.codes, self.scale, self.zero))
        self.struct = library.Matrix(*pointers, kind, *self.shape, group)

    @classmethod
    def of(cls, weight: Tensor) -> Matrix:
        """A plain weight (N, C), float32 or bfloat16."""
        return cls(PLAIN[weight.dtype], weight.detach(), weight.shape[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return Matrix, (self.kind, self.codes, self.shape[1], self.scale, self.zero)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            raise ValueError(
                f"a product on {x.device} by a weight that stays on the CPU: load the model on that device"
            )
        rows = x.reshape(-1, self.shape[1])
        out = self._few(rows) if len(rows) <= FEW else self._many(rows)
        return out.to(x.dtype).view(*x.shape[:-1], self.shape[0])

    def _few(self, rows: Tensor) -> Tensor:
        wide = rows.float().contiguous()
        out = torch.empty(len(rows), self.shape[0], **library.EXACT)
        threads = torch.get_num_threads()
        library.load().multiply(ctypes.byref(self.struct), wide.data_ptr(), len(rows), out.data_ptr(), threads)
        return out

    def _many(self, rows: Tensor) -> Tensor:
        assert self.codes is not None
        halves = self.kind != FLOAT32 and (self.kind != INT8_DYNAMIC or rows.dtype == torch.bfloat16)
        if halves and self.shape[1] % 64 == 0 and multiplies_tiles():
            return self._many_by_tiles(rows)
        if self.kind == INT8_DYNAMIC:
            return self._many_of_bytes(rows)
        if self.kind == INT4_DYNAMIC:
            rows = rounded_by_groups(rows, self.struct.group)
        if self.kind == BFLOAT16 and multiplies_bfloat16():
            return F.linear(rows.bfloat16(), self.codes)
        dtype = torch.bfloat16 if multiplies_bfloat16() and self.kind != FLOAT32 else torch.float32
        rows = rows.to(dtype)
        if self.kind == FLOAT32:
            return product(rows, self.codes)
        out = rows.new_empty(len(rows), self.shape[0])
        step = max(1, WIDENED // self.shape[1])
        for first in range(0, self.shape[0], step):
            weight = self.decode(first, min(step, self.shape[0] - first), dtype)
            out[:, first : first + step] = product(rows, weight)
        if self.kind == INT8:
            assert self.scale is not None
            out.mul_(self.scale.to(dtype).squeeze(1))
        return out

    def _many_by_tiles(self, rows: Tensor) -> Tensor:
        rows = rows.bfloat16().contiguous()
        out = rows.new_empty(len(rows), self.shape[0])
        threads = torch.get_num_threads()
        library.load().multiply_many(ctypes.byref(self.struct), rows.data_ptr(), len(rows), out.data_ptr(), threads)
        return out

    def _many_of_bytes(self, rows: Tensor) -> Tensor:
        assert self.codes is not None
        assert self.scale is not None
        codes, scale = rows_to_int8(rows)
        if multiplies_bytes():
            out = torch._int_mm(codes.to(torch.int8), self.codes.t()).float()
        else:  # as floats, which have them exactly
            out = product(codes, self.codes.float())
        return out.mul_(scale).mul_(self.scale.float().squeeze(1))

    def decode(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight (count, C) in `dtype`, but for the scale of a whole row."""
        assert self.codes is not None
        if self.kind not in (INT4, INT4_DYNAMIC, NF4):
            return self.codes[first : first + count].to(dtype)
        out = torch.empty(count, self.shape[1], dtype=dtype, device="cpu")
        kind, threads = PLAIN[dtype], torch.get_num_threads()
        library.load().decode(ctypes.byref(self.struct), first, count, out.data_ptr(), kind, threads)
        return out


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies matrices in bfloat16 quicker than in float32."""
    features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in features)


def multiplies_tiles() -> bool:
    """Whether the kernels multiply matrix tiles (AMX), which prompts are quickest by, whatever the weight's kind."""
    return multiplies_bfloat16() and multiplies_bytes() and bool(library.load().has_tiles())


@cache
def multiplies_bytes() -> bool:
    """Whether PyTorch multiplies matrices of whole numbers of 8 bits, and quickly on this processor."""
    there = hasattr(torch, "_int_mm") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and getattr(torch.cpu, "_is_vnni_supported", bool)())


def rows_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) to codes from -127 to 127, still floats, and each row's scale, float32 (M, 1). A row has its own
    scale, so that what is computed of it does not depend on the rows beside it."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min_(1e-30).mul_(1 / 127)
    return (wide / scale).round_(), scale


def rounded_by_groups(x: Tensor, group: int) -> Tensor:
    """Rows (M, K), in their dtype, of which each `group` numbers are rounded to 8 bits: whole numbers from -127 to 127
    times a scale of their own."""
    codes, scale = rows_to_int8(x.reshape(-1, group))
    return codes.mul_(scale).to(x.dtype).view(x.shape)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x·weightᵀ of many vectors. In float32 by oneDNN, whose operator is private: what PyTorch asks by itself is slower
    (docs/LOG.md)."""
    if x.dtype == torch.float32 and _has_onednn():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.contiguous(), None, "none", [], "")
        return out
    return F.linear(x, weight)


@cache
def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")
