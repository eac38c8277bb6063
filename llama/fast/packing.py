"""Matrices read the way that is fastest here, and one product for those that read the same vector.

A decode step multiplies one row by every weight of the model, so it takes as long as the weights take to be read.
PyTorch's `F.linear` on a CPU reads a plain bfloat16 matrix at less than half of what the memory gives, or, where the
processor doesn't know bfloat16, a third. The kernels of llama/kernels read it as it lies, at the speed of memory. Where
there is no compiler to make them, a matrix is laid out once in the blocks that oneDNN's kernels walk through; the
operator that does it is private to PyTorch, so it is used here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.kernels.library import available
from llama.kernels.matrix import PLAIN, Matrix
from llama.kernels.memory import joined
from llama.parallel import ColumnParallelLinear, RowParallelLinear

Product = Callable[[Tensor], Tensor]
"""x (..., in) to (..., out)."""
Linear = ColumnParallelLinear | RowParallelLinear


def packed(weight: Tensor) -> Product:
    """x to x·weightᵀ, for a weight (out, in): by the kernels, by oneDNN, which keeps a copy of its own, or plain where
    it can't be better: on a GPU, and in a dtype that neither takes."""
    if weight.device.type == "cpu" and weight.dtype in PLAIN and available():
        return Matrix.of(weight)
    if weight.device.type != "cpu" or not _can_reorder(weight.dtype):
        return lambda x: F.linear(x, weight)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        out: Tensor = multiply(x, reordered, None, "none", [], "")
        return out

    return product


def _can_reorder(dtype: torch.dtype) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def matrix_of(product: Product) -> Matrix | None:
    """What the kernels can read of a product: its weight, if they multiply by it."""
    if isinstance(product, Matrix):
        return product
    return product.matrix if isinstance(product, Joinable) else None


@runtime_checkable
class Joinable(Protocol):
    """What has taken a weight's place, as quantised codes have: it knows how to be one with others of its kind."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def joined(self, others: Sequence[Any]) -> Product: ...

    @property
    def matrix(self) -> Matrix | None: ...


def join(linears: Sequence[Linear]) -> Product:
    """One product for layers that read the same x: their outputs one after the other. It takes over what the layers
    have: a plain weight is packed and freed, and what stands in a weight's place joins itself."""
    if linears[0].weight is None:
        first: Joinable = linears[0].product
        return first if len(linears) == 1 else first.joined([linear.product for linear in linears[1:]])
    product = packed(joined([linear.weight.detach() for linear in linears]))
    for linear in linears:
        linear.weight = None  # type: ignore[assignment]
    return product


def put_(linear: Linear, product: Product) -> None:
    """Makes `product` the multiplication of a parallel layer."""
    linear.product = product  # type: ignore[assignment]


# For a compiler ------------------------------------------------------------------------------------------------------

_KNOWN: WeakValueDictionary[int, Closed] = WeakValueDictionary()
_NUMBERS = count()


class Closed:
    """A product that a compiler calls and doesn't look into: packed and quantised weights are nothing that it knows.
    It has to have been called once, to know how wide its result is."""

    def __init__(self, product: Product) -> None:
        self.product, self.features, self.number = product, 0, next(_NUMBERS)
        _KNOWN[self.number] = self

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            closed: Tensor = _closed(x, self.number, self.features)
            return closed
        out = self.product(x)
        self.features = out.shape[-1]
        return out


@torch.library.custom_op("codellama::product", mutates_args=())
def _closed(x: Tensor, number: int, features: int) -> Tensor:
    return _KNOWN[number].product(x)


@_closed.register_fake
def _(x: Tensor, number: int, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features)


def close_(model: nn.Module) -> None:
    """Closes all products that were put into a model: those of layers, and of blocks that have them themselves."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name in ("product", "wqkv", "wo", "w13", "w2") and not isinstance(value, Closed):
                setattr(module, name, Closed(value))
