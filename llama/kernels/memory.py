"""Memory for weights that are put together: in pages of 2 MB, where the system has them.

A processor keeps the addresses of some thousand pages. At 4 kB each those are a few megabytes; a step goes through all
weights of a model, in several places at a time, and has the address of each page looked up anew. In pages of 2 MB there
is little to look up (docs/LOG.md has what it brings). Linux gives such pages to who asks for them before the memory is
first written to (`madvise(2)`, MADV_HUGEPAGE); elsewhere, and where it has none left, nothing changes.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 1 << 21
"""Bytes of a large page."""


def joined(parts: Sequence[Tensor]) -> Tensor:
    """A copy of some tensors of the same dtype and device, one after the other in their first dimension; a single one
    stays where it is."""
    if len(parts) == 1:
        return parts[0]
    if not parts[0].is_cpu or sum(part.nbytes for part in parts) < PAGE:
        return torch.cat(list(parts))
    out = empty((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    first = 0
    for part in parts:
        out[first : first + len(part)] = part  # by all threads; torch.cat would use one
        first += len(part)
    return out


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, in large pages as far as there are whole ones in it."""
    made = torch.empty(tuple(shape), dtype=dtype, device="meta")
    if not made.nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    mapped = mmap.mmap(-1, made.nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    begin = -address % PAGE
    if whole := made.nbytes // PAGE * PAGE:
        with contextlib.suppress(OSError):  # a system that was built without them
            mapped.madvise(mmap.MADV_HUGEPAGE, begin, whole)
    return torch.frombuffer(mapped, dtype=dtype, count=made.numel(), offset=begin).view(made.shape)
