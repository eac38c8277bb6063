"""How numbers become codes: rounding to 8 bits, and a search for the best 16 levels of a group.

A weight's row is rounded to a grid and kept as the whole numbers of its grid points, the codes. With 8 bits there are
255 points from minus the row's largest weight to plus it, and rounding loses next to nothing. With 4 bits there are
16, so each group of neighbouring weights has a grid of its own, from a zero point in steps of a scale, and where that
grid lies matters. Spanned from the least to the largest weight it spends points on what is rare. So grids that are
narrower by some factor are tried as well. Each is then moved to where its own rounding wants it (given the codes,
scale and zero point that lose least are a straight line's fit; given these, codes are the nearest points), and the one
whose squared error is least is kept.

Scales and zero points are rounded to bfloat16 before the codes are chosen, since so they are multiplied by: their own
rounding is then part of what the codes make up for.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIDDLE = 8
"""The 4-bit code of the zero point: a weight is (code - 8) x scale + zero."""
NARROWER = (1.0, 0.92, 0.84, 0.76)
"""Of the span between a group's least and largest weight, what the grids that are tried begin with."""
FITS = 2
"""How often each of them is fitted to its codes."""


def to_int8(rows: Tensor) -> dict[str, Tensor]:
    """Float32 rows (N, K) to codes -127 to 127, int8 (N, K), and each row's scale, bfloat16 (N, 1)."""
    # A scale that bfloat16 rounds down by 1/256 makes the largest code 127.5: still 127.
    scale = _not_zero(rows.abs().amax(1, keepdim=True) / 127)
    codes = (rows / scale.float()).round_().clamp_(-127, 127)
    return {"codes": codes.to(torch.int8), "scale": scale}


def from_int8(stored: dict[str, Tensor]) -> Tensor:
    return stored["codes"].float() * stored["scale"].float()


def to_int4(rows: Tensor, group: int) -> dict[str, Tensor]:
    """Float32 rows (N, K) to codes 0 to 15, two in a byte (N, K/2), and scale and zero point of each `group` columns,
    bfloat16 (N, K/group)."""
    grouped = rows.view(len(rows), -1, group)  # (N, K/group, group)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    best: tuple[Tensor, ...] = ()
    for share in NARROWER:
        scale = share * (high - low) / 15
        zero = (low + high + scale) / 2  # codes run from 8 below to 7 above
        for _ in range(FITS):
            scale, zero = _fit(grouped, _nearest(grouped, scale, zero))
        scale, zero = _not_zero(scale), zero.bfloat16()
        codes = _nearest(grouped, scale.float(), zero.float())
        lost = torch.addcmul(zero.float(), codes, scale.float()).sub_(grouped).square_().sum(-1, keepdim=True)
        found = (lost, codes.to(torch.int8), scale, zero)
        better = lost < best[0] if best else None
        best = found if better is None else tuple(torch.where(better, *both) for both in zip(found, best, strict=True))
    _, codes, scale, zero = best
    return {
        "codes": two_in_a_byte((codes + MIDDLE).to(torch.uint8).flatten(1)),
        "scale": scale.squeeze(-1),
        "zero": zero.squeeze(-1),
    }


def _nearest(grouped: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes from -8 to 7, as floats. A scale of 0 gives 0 or an end of the range, never NaN."""
    return ((grouped - zero) / scale).nan_to_num_(0.0).round_().clamp_(-MIDDLE, 15 - MIDDLE)


def _fit(grouped: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (N, K/group, 1) for which codes x scale + zero comes nearest to the weights."""
    code, weight = codes.mean(-1, keepdim=True), grouped.mean(-1, keepdim=True)
    off = codes - code
    scale = (off * grouped).sum(-1, keepdim=True) / off.square().sum(-1, keepdim=True)
    scale = scale.nan_to_num_(0.0)  # all codes are one: all weights are
    return scale, weight - scale * code


def _not_zero(scale: Tensor) -> Tensor:
    """In bfloat16; 1 where it is 0, since there all weights are, whatever the scale."""
    rounded = scale.bfloat16()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def from_int4(stored: dict[str, Tensor]) -> Tensor:
    scale, zero = stored["scale"].float().unsqueeze(-1), stored["zero"].float().unsqueeze(-1)
    codes = one_in_a_byte(stored["codes"]).float().sub_(MIDDLE).view(*scale.shape[:2], -1)
    return torch.addcmul(zero, codes, scale).flatten(1)


def two_in_a_byte(codes: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 (N, K), to (N, K/2): the first of a pair in the upper half, as CUDA's operators and
    bitsandbytes have it."""
    return (codes[:, ::2] << 4) | codes[:, 1::2]


def one_in_a_byte(pairs: Tensor) -> Tensor:
    """The inverse of `two_in_a_byte`."""
    return torch.stack((pairs >> 4, pairs & 15), -1).flatten(1)
