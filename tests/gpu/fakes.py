"""A device that isn't there: tensors with its name and no numbers, by PyTorch's FakeTensorMode.

An operator on fake tensors checks shapes, dtypes and devices as the real one would: what mixes devices, or is missing
where it should be, fails here as it would fail there. A few of PyTorch's methods ask for the device's runtime before
they come to the operators, and a build without it ends there. These methods are written here in operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@contextmanager
def fake_device(name: str) -> Iterator[torch.device]:
    """Where tensors are made by default, in this block: on a fake "cuda" or "mps"."""
    with FakeTensorMode(), torch.device(name), _WithoutRuntime(name):
        yield torch.device(name, 0)


class Crossings(TorchDispatchMode):
    """Counts what a GPU would have to wait for: numbers read by the host, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.copied = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.read += 1
        elif func is aten._to_copy.default:
            self.copied += args[0].device != out.device
        elif func is aten.copy_.default:
            self.copied += args[0].device != args[1].device
        return out


class _WithoutRuntime(TorchFunctionMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            device = kwargs.pop("device", None) or self.device
            return _to(func(*args, **kwargs, device="cpu"), device)
        if func is Tensor.copy_:
            return aten.copy_.default(*args[:2])
        if func is Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is Tensor.__getitem__:
            return _get(*args)
        if func is Tensor.__setitem__:
            return _set(*args)
        if func is F.scaled_dot_product_attention and args[0].device.type == "mps":  # chooses by the runtime
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _to(x: Tensor, *args: Any, copy: bool = False, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    for given in args:
        if isinstance(given, Tensor):
            kwargs |= {"dtype": given.dtype, "device": given.device}
        else:
            kwargs["dtype" if isinstance(given, torch.dtype) else "device"] = given
    dtype = kwargs.get("dtype") or x.dtype
    device = torch.device(kwargs.get("device") or x.device)
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, 0)
    if isinstance(x, FakeTensor):
        x.constant = None  # the numbers of torch.tensor(...) are kept, and would be copied to what isn't there
    same = x.dtype == dtype and x.device == device and not copy
    return x if same else aten._to_copy.default(x, dtype=dtype, device=device)


def _indexed(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """x with the slices of an index taken, and the tensors that are left of it."""
    index = index if isinstance(index, tuple) else (index,)
    tensors: list[Tensor | None] = []
    for part in index:
        dim = len(tensors)
        if isinstance(part, Tensor):
            tensors.append(part)
        elif part is None:
            x = aten.unsqueeze.default(x, dim)
            tensors.append(None)
        elif isinstance(part, slice):
            start, stop, step = part.indices(x.shape[dim])
            x = aten.slice.Tensor(x, dim, start, stop, step)
            tensors.append(None)
        elif part is ...:
            raise NotImplementedError("an ellipsis")
        else:
            x = aten.select.int(x, dim, part)
    return x, tensors


def _get(x: Tensor, index: Any) -> Tensor:
    if index is ... or (isinstance(index, tuple) and index[0] is ...):
        rest = index[1:] if isinstance(index, tuple) else ()
        index = (slice(None),) * (x.dim() - sum(part is not None for part in rest)) + tuple(rest)
    x, tensors = _indexed(x, index)
    return x if all(t is None for t in tensors) else aten.index.Tensor(x, tensors)


def _set(x: Tensor, index: Any, value: Any) -> None:
    view, tensors = _indexed(x, index)
    value = value if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype, device=x.device)
    if all(t is None for t in tensors):
        aten.copy_.default(view, value)
    else:
        aten.index_put_.default(view, tensors, value)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if attn_mask is not None:
        assert attn_mask.device == q.device
        assert attn_mask.dtype == q.dtype
        scores = scores + attn_mask
    return scores.softmax(-1) @ v
