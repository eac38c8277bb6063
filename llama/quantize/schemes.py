"""Schemes: how a linear layer's weight is kept in fewer bits, and how it is multiplied by. One table, SCHEMES.

A scheme turns a weight (N, K) into stored tensors with N rows each, row by row: so several layers' are joined, and one
layer's cut, between any two rows. Between columns they can be cut where no group is: groups lie within a row, one
after the other, and each has numbers of its own. What belongs to a whole row (int8's scale) stays whole on
both sides of a cut between columns. With 4 bits, the output layer is int8.

| scheme | stored | bits a weight | arithmetic |
|---|---|---|---|
| int8 | codes int8 (N, K), scale bfloat16 (N, 1) | 8 + 16/K | float32, or bfloat16 |
| int8-dynamic | the same | 8 + 16/K | whole numbers; the activations of each token are rounded to 8 bits too |
| int4 | codes (N, K/2), scale and zero bfloat16 (N, K/group) | 4 + 32/group | float32, or bfloat16 |
| int4-dynamic | the same | 4 + 32/group | that of int4; each group of a token's activations is rounded to 8 bits too |
| nf4 | codes (N, K/2), absmax bfloat16 (N, K/64) | 4.25 | float32, or bfloat16 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama.kernels.matrix import Matrix
from llama.kernels.memory import joined
from llama.quantize import nf4
from llama.quantize.codes import from_int4, from_int8, to_int4, to_int8
from llama.quantize.operators import (
    INT8,
    INT8_DYNAMIC_KERNEL,
    INT8_KERNEL,
    INT_MM,
    Operator,
    Stored,
    int4,
    int4_dynamic,
    plain,
)

AT_ONCE = 2**18
"""About so many weights are quantised together: in float32 they stay in a processor's cache while they are searched."""


@dataclass(frozen=True)
class Scheme:
    name: str
    layout: str
    """Of the stored tensors. Schemes with one layout and group read each other's."""
    keys: tuple[str, ...]
    """The stored tensors' names."""
    group: int
    """Columns with common numbers; 0: all of a row."""
    groups: tuple[int, ...]
    """What `group` may be."""
    encode: Callable[[Tensor, int], Stored]
    """Float32 rows and the group to stored tensors."""
    decode: Callable[[Stored], Tensor]
    """Back to float32."""
    operators: Callable[[int], Sequence[Operator]]
    """For a group; the first that takes stored tensors multiplies by them, and where none does, plain arithmetic."""

    def __str__(self) -> str:
        return f"{self.name}:{self.group}" if len(self.groups) > 1 else self.name

    @torch.no_grad()
    def quantize(self, weight: Tensor, name: str = "the weight") -> Stored:
        """The stored tensors of a weight (N, K), on its device. `name` is for messages.

        Raises ValueError for what is no matrix of finite numbers, and where its columns are no whole number of groups.
        """
        if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
            raise ValueError(
                f"{name} is {weight.dtype} of the shape {tuple(weight.shape)}; only matrices of floating-point numbers "
                "can be quantised: give plain weights"
            )
        self._whole_groups(weight.shape[1], name)
        parts = []
        for rows in torch.split(weight, max(1, AT_ONCE // weight.shape[1])):
            wide = rows.float()
            if not wide.isfinite().all():
                raise ValueError(f"{name} has NaN or infinity in it, which have no code: take another checkpoint")
            parts.append(self.encode(wide, self.group))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _whole_groups(self, columns: int, name: str) -> None:
        if self.group and columns % self.group:
            smaller = [f"--group {group}" for group in self.groups if columns % group == 0]
            others = " or ".join([*smaller, "int8"])
            raise ValueError(
                f"{name} has {columns} columns, no whole number of groups of {self.group}: choose {others}, or fewer "
                "ranks where several share it"
            )

    def check(self, stored: Stored, name: str) -> None:
        """Raises ValueError, naming the weight, where these are not the tensors that the scheme stores of one."""
        absent = [key for key in self.keys if key not in stored]
        if absent:
            raise ValueError(f"{name} lacks {', '.join(absent)}, which {self} stores: the file is not whole")
        N, K = self.shape(stored)
        parts = K // self.group if self.group else 1
        for key in self.keys[1:]:
            if tuple(stored[key].shape) != (N, parts):
                raise ValueError(
                    f"{name}.{key} is {tuple(stored[key].shape)} instead of {(N, parts)}, which {self} stores of "
                    f"{N} x {K} weights: its scheme and group are those of another checkpoint"
                )

    def dequantize(self, stored: Stored) -> Tensor:
        """The weight (N, K), float32, that products multiply by."""
        return self.decode(stored)

    def columns(self, stored: Stored, start: int, size: int, name: str = "the weight") -> Stored:
        """Those of `size` columns from `start` on. ValueError, naming the weight, where that cuts a group."""
        whole = self.shape(stored)[1]
        if size < whole:
            self._whole_groups(size, f"a part of {name}")
        part = {}
        for key, tensor in stored.items():
            unit = whole // tensor.shape[1]
            of_row = not self.group and key != "codes"
            part[key] = tensor if of_row else tensor.narrow(1, start // unit, size // unit)
        return part

    def shape(self, stored: Stored) -> tuple[int, int]:
        """(N, K) of the weight."""
        codes = stored["codes"]
        return codes.shape[0], codes.shape[1] * (1 if codes.dtype == torch.int8 else 2)

    def bits(self, stored: Stored) -> float:
        """That are stored for each weight, all of its group's numbers included."""
        N, K = self.shape(stored)
        return 8 * sum(tensor.nbytes for tensor in stored.values()) / (N * K)

    def product(self, stored: Stored, dtype: torch.dtype = torch.bfloat16) -> Quantized:
        """What multiplies activations in `dtype` by it. ValueError for float16 on a CPU, where there is no fast way."""
        device = stored["codes"].device
        if dtype == torch.float16 and device.type == "cpu":
            raise ValueError(f"{self} in float16 is too slow to use on a CPU: choose --dtype bfloat16, or float32")
        return Quantized(self, stored)


class Quantized:
    """A product by a quantised weight: (..., K) to (..., N) in the activations' dtype. It takes a layer's `product`.

    What it was given is kept in the order of the operator that it uses; `stored` makes the tensors from it again.
    """

    def __init__(self, scheme: Scheme, stored: Stored) -> None:
        self.scheme = scheme
        self.operator = next(
            (found for found in scheme.operators(scheme.group) if found.takes(stored)), plain(scheme.decode)
        )
        self.shape = scheme.shape(stored)
        self._packed = self.operator.pack(stored)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():  # some operators divide by the number of rows
            return x.new_empty(*x.shape[:-1], self.shape[0])
        rows = x.reshape(-1, x.shape[-1])
        if self.operator.dtype is not None:
            rows = rows.to(self.operator.dtype)
        return self.operator.multiply(self._packed, rows).to(x.dtype).view(*x.shape[:-1], self.shape[0])

    def joined(self, others: Sequence[Quantized]) -> Quantized:
        """One product by this weight and others for the same input: their outputs one after the other. What each
        keeps is copied. Raises ValueError where they are not of one scheme and width."""
        kinds = {(product.scheme, product.shape[1]) for product in (self, *others)}
        if len(kinds) > 1:
            described = ", ".join(sorted(f"{scheme} of {columns} columns" for scheme, columns in kinds))
            raise ValueError(
                f"layers of {described} can't be joined: join those of one scheme that read the same input"
            )
        every = [product.stored for product in (self, *others)]
        return Quantized(self.scheme, {key: joined([stored[key] for stored in every]) for key in every[0]})

    @property
    def matrix(self) -> Matrix | None:
        """What the kernels need of it to multiply by it themselves; None where they can't."""
        return self.operator.matrix(self._packed)

    @property
    def stored(self) -> Stored:
        """The stored tensors, bit by bit. Some of them may be this product's own: don't write into them."""
        return self.operator.unpack(self._packed)


def _int8(rows: Tensor, group: int) -> Stored:
    return to_int8(rows)


def _nf4(rows: Tensor, group: int) -> Stored:
    return nf4.to_nf4(rows)


_OF_INT8 = ("codes", "scale")
_OF_INT4 = ("codes", "scale", "zero")
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "int8", _OF_INT8, 0, (0,), _int8, from_int8, lambda _: (INT8_KERNEL, INT8)),
        Scheme("int8-dynamic", "int8", _OF_INT8, 0, (0,), _int8, from_int8, lambda _: (INT8_DYNAMIC_KERNEL, INT_MM)),
        Scheme("int4", "int4", _OF_INT4, 32, (32, 64, 128), to_int4, from_int4, int4),
        Scheme("int4-dynamic", "int4", _OF_INT4, 32, (32, 64, 128), to_int4, from_int4, int4_dynamic),
        Scheme("nf4", "nf4", ("codes", "absmax"), nf4.GROUP, (nf4.GROUP,), _nf4, nf4.from_nf4, lambda _: nf4.OPERATORS),
    )
}
"""By the word for --quantize and --scheme."""


def scheme_of(word: str | Scheme, group: int | None = None) -> Scheme:
    """A scheme by its name, with groups of another size where `group` is given or the word says so: "int4:128".

    Raises ValueError for an unknown one, and for a group that it can't have.
    """
    if isinstance(word, Scheme):
        return word
    name, _, size = word.partition(":")
    if name not in SCHEMES or (size and not size.isdecimal()):
        raise ValueError(f"there is no scheme {word!r}; choose {', '.join(SCHEMES)}, or int4:64 for groups of 64")
    scheme = SCHEMES[name]
    asked = int(size) if size else group
    if asked is not None and asked not in scheme.groups:
        choice = "has no groups" if scheme.groups == (0,) else f"has groups of {', '.join(map(str, scheme.groups))}"
        raise ValueError(f"groups of {asked} with {name}, which {choice}")
    return scheme if asked is None else replace(scheme, group=asked)


def for_weight(scheme: Scheme, name: str) -> Scheme:
    """The scheme that `scheme` has for one weight: int8 for the output layer with 4 bits, else itself.

    The output's rounding falls on the scores themselves: in 4 bits it lost as much as all other layers together, and
    of a large model it is a fiftieth.
    """
    return SCHEMES["int8"] if name == "output.weight" and scheme.layout != "int8" else scheme
