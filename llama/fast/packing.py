"""Matrices laid out for the way they are read.

A decode step multiplies one row by every weight of the model, so it takes as long as the weights take to be read.
PyTorch's `F.linear` on a CPU reads a plain bfloat16 matrix at less than half of what the memory gives; the same library
(oneDNN) comes close to all of it on a matrix that was *reordered* once, into the blocks that its kernels walk through.
The reordering operator is private to PyTorch (it is there for its compiler), so it is used here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.parallel import ColumnParallelLinear, RowParallelLinear

Product = Callable[[Tensor], Tensor]
"""x (..., in) to (..., out)."""
Linear = ColumnParallelLinear | RowParallelLinear


def packed(weight: Tensor) -> Product:
    """x to x·weightᵀ, for a weight (out, in); its own storage is not needed any more. Plain where it can't be better:
    on a GPU, in a dtype that oneDNN doesn't pack, or in a PyTorch without the operator."""
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and _can_reorder():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        multiply = torch.ops.mkldnn._linear_pointwise.default

        def product(x: Tensor) -> Tensor:
            out: Tensor = multiply(x, reordered, None, "none", [], "")
            return out

        return product
    return lambda x: F.linear(x, weight)


def _can_reorder() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class Joinable(Protocol):
    """What has taken a weight's place, as quantised codes have: it knows how to be one with others of its kind."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def joined(self, others: Sequence[Any]) -> Product: ...


def join(linears: Sequence[Linear]) -> Product:
    """One product for layers that read the same x: their outputs one after the other. It takes over what the layers
    have: a plain weight is packed and freed, and what stands in a weight's place joins itself."""
    if linears[0].weight is None:
        first: Joinable = linears[0].product
        return first if len(linears) == 1 else first.joined([linear.product for linear in linears[1:]])
    weights = [linear.weight.detach() for linear in linears]
    product = packed(torch.cat(weights) if len(weights) > 1 else weights[0])
    for linear in linears:
        linear.weight = None  # type: ignore[assignment]
    return product


def put_(linear: Linear, product: Product) -> None:
    """Makes `product` the multiplication of a parallel layer."""
    linear.product = product  # type: ignore[assignment]
