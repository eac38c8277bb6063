"""Multiplying by codes: PyTorch's private operators, each in one place, and plain arithmetic.

An operator wants the stored tensors in an order of its own, made for its processor. So each is four functions: whether
it can be used for these tensors here, to its order, the multiplication, and back. Nothing is kept twice: the stored
tensors are gone once they are in an operator's order, and come back from it bit by bit. The operators are private and
may change or vanish; where one does, or a shape is not one it takes, `plain` multiplies by the dequantised weight.

Decoding one token reads every weight to multiply it by one row: then the bytes read are what takes the time, and fewer
bits are faster. A prompt's many rows are limited by arithmetic instead. Above FEW rows the operators made for a
few of them are slower than an ordinary product by weights that were dequantised for it: that is where to tune. On a CPU
the kernels of llama/kernels come first, which read the stored tensors as they are; PyTorch's stand in where there is no
compiler to make them.

N is the rows of a weight (outputs), K its columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels.library import available
from llama.kernels.matrix import INT4 as KIND_INT4
from llama.kernels.matrix import INT4_DYNAMIC as KIND_INT4_DYNAMIC
from llama.kernels.matrix import INT8 as KIND_INT8
from llama.kernels.matrix import INT8_DYNAMIC as KIND_INT8_DYNAMIC
from llama.kernels.matrix import NF4 as KIND_NF4
from llama.kernels.matrix import Matrix, multiplies_bytes, rounded_by_groups, rows_to_int8
from llama.quantize.codes import MIDDLE, from_int4, one_in_a_byte, two_in_a_byte

Stored = dict[str, Tensor]
"""What is kept of a weight: tensors with N rows each."""
Packed = dict[str, Any]
"""The same in the order that an operator wants: tensors, or what it calls packed."""
Decode = Callable[[Stored], Tensor]
"""Stored tensors to the float32 weight (N, K)."""

FEW = 16
"""Rows up to which the operators for a few rows are used on a CPU."""


@dataclass(frozen=True)
class Operator:
    """A way to multiply by stored tensors."""

    takes: Callable[[Stored], bool]
    """Whether it can be used for these, where they are."""
    pack: Callable[[Stored], Packed]
    multiply: Callable[[Packed, Tensor], Tensor]
    """Rows (M, K) in `dtype` to (M, N)."""
    unpack: Callable[[Packed], Stored]
    """The inverse of `pack`, bit by bit."""
    dtype: torch.dtype | None = torch.bfloat16
    """Of the arithmetic; None: whatever the rows are in."""
    matrix: Callable[[Packed], Matrix | None] = lambda _: None
    """What llama/kernels multiply by, where the product is that by it and nothing else: so they may do whole steps."""


def plain(decode: Decode) -> Operator:
    """Dequantises the weight for every product: slow, in little memory, and right for every shape and device."""

    def multiply(packed: Packed, x: Tensor) -> Tensor:
        return F.linear(x, decode(packed).to(x.dtype))

    return Operator(lambda _: True, lambda stored: stored, multiply, lambda packed: packed, None)


@cache
def has(operator: str, device: str) -> bool:
    """Whether this build of PyTorch has `operator` ("aten::_int_mm") for a type of device ("cpu", "cuda")."""
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper()))
    except RuntimeError:  # there is no such operator, or no such device
        return False


def _device(stored: Stored) -> str:
    return stored["codes"].device.type


# The kernels: every scheme's stored tensors as they lie, activations in 16 bits or 8, float32 sums --------------------


def _takes_kernels(stored: Stored) -> bool:
    return _device(stored) == "cpu" and available()


def of_kernels(kind: int, *numbers: str) -> Operator:
    """Multiplying by codes of a kind of llama/kernels, and by a group's `numbers`: its scale and zero point."""

    def pack(stored: Stored) -> Packed:
        columns = stored["codes"].shape[1] * (1 if stored["codes"].dtype == torch.int8 else 2)
        return {"matrix": Matrix(kind, stored["codes"], columns, *(stored[key] for key in numbers))}

    def unpack(packed: Packed) -> Stored:
        matrix = packed["matrix"]
        return dict(zip(("codes", *numbers), (matrix.codes, matrix.scale, matrix.zero), strict=False))

    return Operator(
        _takes_kernels, pack, lambda packed, x: packed["matrix"](x), unpack, None, lambda packed: packed["matrix"]
    )


INT8_KERNEL, INT8_DYNAMIC_KERNEL = of_kernels(KIND_INT8, "scale"), of_kernels(KIND_INT8_DYNAMIC, "scale")
INT4_KERNEL = of_kernels(KIND_INT4, "scale", "zero")
INT4_DYNAMIC_KERNEL = of_kernels(KIND_INT4_DYNAMIC, "scale", "zero")
NF4_KERNEL = of_kernels(KIND_NF4, "absmax")


# int8: codes times scales, bfloat16 activations ----------------------------------------------------------------------


def _takes_int8(stored: Stored) -> bool:
    # Other numbers of columns it multiplies wrongly on a CPU, or reads beyond the end of (PyTorch 2.13).
    return has("aten::_weight_int8pack_mm", _device(stored)) and stored["codes"].shape[1] % 16 == 0


def _int8(packed: Packed, x: Tensor) -> Tensor:
    codes, scale = packed["codes"], packed["scale"].squeeze(1)
    if len(x) <= FEW:
        return torch._weight_int8pack_mm(x, codes, scale)
    # Codes are whole numbers below 256, which bfloat16 has exactly.
    return F.linear(x, codes.to(x.dtype)).mul_(scale)


def _contiguous(stored: Stored) -> Stored:
    return {key: tensor.contiguous() for key, tensor in stored.items()}


INT8 = Operator(_takes_int8, _contiguous, _int8, lambda packed: packed)


# int8 with activations quantised as well -----------------------------------------------------------------------------


def _takes_int_mm(stored: Stored) -> bool:
    codes = stored["codes"]
    if _device(stored) == "cpu":
        return multiplies_bytes()
    return _device(stored) == "cuda" and has("aten::_int_mm", "cuda") and not (len(codes) % 8 or codes.shape[1] % 8)


def _int_mm(packed: Packed, x: Tensor) -> Tensor:
    codes, scale = rows_to_int8(x)
    rows = max(32, -(-len(x) // 8) * 8)  # cuBLAS wants more than 16 rows
    padded = F.pad(codes.to(torch.int8), (0, 0, 0, rows - len(x)))
    out = torch._int_mm(padded, packed["codes"].t())[: len(x)]
    wide: Tensor = out * scale * packed["scale"].float().t()
    return wide.to(x.dtype)


INT_MM = Operator(_takes_int_mm, _contiguous, _int_mm, lambda packed: packed, None)
"""For CUDA, where its speed has not been measured yet, and for a CPU without a C++ compiler."""


# int4: groups with a scale and a zero point, bfloat16 activations ----------------------------------------------------


def _takes_int4_cpu(group: int, stored: Stored) -> bool:
    both = ("aten::_convert_weight_to_int4pack_for_cpu", "aten::_weight_int4pack_mm_for_cpu")
    return _device(stored) == "cpu" and all(has(name, "cpu") for name in both) and _fits_int4(group, stored, 16)


def _fits_int4(group: int, stored: Stored, rows: int) -> bool:
    return group in (32, 64, 128, 256) and len(stored["codes"]) % rows == 0


def _scale_and_zero(stored: Stored) -> Tensor:
    """(K/group, N, 2), for both processors' operators."""
    return torch.stack((stored["scale"].t(), stored["zero"].t()), -1).contiguous()


def _from_scale_and_zero(both: Tensor) -> Stored:
    scale, zero = both.unbind(-1)
    return {"scale": scale.t().contiguous(), "zero": zero.t().contiguous()}


def _pack_int4_cpu(stored: Stored) -> Packed:
    codes = one_in_a_byte(stored["codes"]).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return {"codes": packed, "both": _scale_and_zero(stored)}


def _int4_cpu(group: int, packed: Packed, x: Tensor) -> Tensor:
    codes, both = packed["codes"], packed["both"]
    if len(x) <= FEW:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, group, both)
        return out
    scale, zero = both.unsqueeze(1).unbind(-1)  # (K/group, 1, N)
    grouped = _columns_of_int4_cpu(codes, x.dtype).view(len(both), group, -1)  # (K/group, group, N)
    return x @ torch.addcmul(zero, grouped, scale).flatten(0, 1)


def _unpack_int4_cpu(packed: Packed) -> Stored:
    codes = _columns_of_int4_cpu(packed["codes"], torch.int8).t() + MIDDLE
    return {"codes": two_in_a_byte(codes.to(torch.uint8)), **_from_scale_and_zero(packed["both"])}


def _columns_of_int4_cpu(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes less MIDDLE (K, N) of the operator's bytes (N, K/2).

    They lie in blocks of rows, the last perhaps smaller; in each block, column after column; and in each column two
    codes to a byte.
    """
    N, K = packed.shape[0], 2 * packed.shape[1]
    block = _block_of_int4_cpu()
    whole = N - N % block
    out = torch.empty(K, N, dtype=dtype, device=packed.device)
    for first, end, size in ((0, whole, block), (whole, N, N % block)):
        if first < end:
            pairs = packed[first:end].reshape(-1, K, size // 2).transpose(0, 1)  # (K, blocks, size / 2)
            rows = out[:, first:end].view(K, -1, size)
            lower, upper = _order_of_int4_cpu(size)
            rows[..., lower] = (pairs & 15).view(torch.int8).sub_(MIDDLE).to(dtype)
            rows[..., upper] = (pairs >> 4).view(torch.int8).sub_(MIDDLE).to(dtype)
    return out


@cache
def _block_of_int4_cpu() -> int:
    """How many rows a block has: 64 with AVX-512, fewer elsewhere. Of columns 0 0 0 … and 15 15 15 …, the first half
    of the first block's bytes are 0."""
    columns = torch.tensor([0, 15], dtype=torch.int32, device="cpu").expand(256, 2).contiguous()
    flat = torch.ops.aten._convert_weight_to_int4pack_for_cpu(columns, 1).flatten()
    return 2 * int(flat.tolist().index(255))


@cache
def _order_of_int4_cpu(size: int) -> tuple[slice | Tensor, slice | Tensor]:
    """Which rows of a block of `size` the lower halves of a column's bytes are, and which the upper: found by packing
    the rows' numbers, since it depends on the processor."""
    numbers = torch.arange(size, dtype=torch.int32, device="cpu").unsqueeze(1).expand(size, 2)
    digits = []
    for digit in (numbers % 16, numbers // 16):
        flat = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit.contiguous(), 1).flatten()
        digits.append(flat[: size // 2].long())
    ones, sixteens = digits
    return _as_slice((ones & 15) + 16 * (sixteens & 15)), _as_slice((ones >> 4) + 16 * (sixteens >> 4))


def _as_slice(places: Tensor) -> slice | Tensor:
    """The same places as a slice, which is faster, if they are evenly spaced."""
    first, step = int(places[0]), int(places[1] - places[0])
    even = torch.arange(first, first + step * len(places), step, device="cpu") if step > 0 else places[:0]
    return slice(first, first + step * len(places), step) if torch.equal(even, places) else places


def _takes_int4_cuda(group: int, stored: Stored) -> bool:
    both = ("aten::_convert_weight_to_int4pack", "aten::_weight_int4pack_mm")
    fits = _fits_int4(group, stored, 8) and stored["codes"].shape[1] % 16 == 0
    if _device(stored) != "cuda" or not fits or not all(has(name, "cuda") for name in both):
        return False
    return torch.cuda.get_device_capability(stored["codes"].device) >= (8, 0)


def _pack_int4_cuda(stored: Stored) -> Packed:
    K = 2 * stored["codes"].shape[1]
    tiles = next(tiles for tiles in (8, 4, 2) if K % (16 * tiles) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack(stored["codes"].contiguous(), tiles)
    return {"codes": packed, "both": _scale_and_zero(stored)}


def _int4_cuda(group: int, packed: Packed, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._weight_int4pack_mm(x.contiguous(), packed["codes"], group, packed["both"])
    return out


def _unpack_int4_cuda(group: int, packed: Packed) -> Stored:
    """Times the identity, with scales of 1 and zero points of 0, the operator's weight is its codes."""
    both = packed["both"]
    ones = torch.stack((torch.ones_like(both[..., 0]), torch.zeros_like(both[..., 1])), -1)
    identity = torch.eye(group * len(both), dtype=both.dtype, device=both.device)
    columns = _int4_cuda(group, {"codes": packed["codes"], "both": ones}, identity)  # (K, N)
    return {"codes": two_in_a_byte((columns.t() + MIDDLE).to(torch.uint8)), **_from_scale_and_zero(both)}


def int4(group: int) -> tuple[Operator, ...]:
    """Those of CPUs and of CUDA (8.0 and later; written from its documentation, not run on such a card yet)."""
    on_cpu = Operator(partial(_takes_int4_cpu, group), _pack_int4_cpu, partial(_int4_cpu, group), _unpack_int4_cpu)
    on_cuda = Operator(
        partial(_takes_int4_cuda, group), _pack_int4_cuda, partial(_int4_cuda, group), partial(_unpack_int4_cuda, group)
    )
    return INT4_KERNEL, on_cpu, on_cuda


def int4_dynamic(group: int) -> tuple[Operator, ...]:
    """Those of int4, by activations of which each group is rounded to 8 bits first."""

    def rounding(operator: Operator) -> Operator:
        def multiply(packed: Packed, x: Tensor) -> Tensor:
            return operator.multiply(packed, rounded_by_groups(x, group))

        return replace(operator, multiply=multiply)

    _, *others = int4(group)
    return INT4_DYNAMIC_KERNEL, *map(rounding, others), rounding(plain(from_int4))
