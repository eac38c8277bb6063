"""Attention of a step in C++ against float64 arithmetic, by vectors of every width and by tiles.

What these guard against: slots read that nobody wrote, or one too few, above all where slots are taken together; a
query head that meets another's keys; pairs turned by another position's angles; sums that a later, larger score does
not scale down; numbers that depend on the tokens and the rows beside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llama.kernels import library
from llama.kernels.matrix import PLAIN, Matrix

pytestmark = pytest.mark.usefixtures("lanes")
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SLOTS = 599
SHAPES = [  # B, T, H, K, D, starts
    (1, 1, 2, 2, 32, [0]),
    (2, 1, 4, 1, 64, [31, 300]),
    (3, 1, 8, 1, 64, [256, 63, 255]),
    (2, 4, 16, 2, 32, [30, 61]),
    (1, 9, 4, 4, 64, [59]),
    (2, 5, 6, 1, 96, [510, 0]),
    (1, 3, 24, 2, 128, [64]),
    (1, 2, 8, 8, 64, [127]),
    (1, 2, 6, 2, 64, [40]),
]


@dataclass
class Inputs:
    """A block's, all of it random: what stands in slots that nobody has written yet is no number."""

    x: Tensor  # (B, T, dim)
    weight: Tensor  # ((H + 2K)·D, dim): wq, wk and wv
    keys: Tensor  # (B, K, S, D)
    values: Tensor
    starts: list[int]
    angles: Tensor  # (S, D/2)
    heads: int

    @classmethod
    def of(cls, B: int, T: int, H: int, K: int, D: int, starts: list[int], dtype: torch.dtype) -> Inputs:
        torch.manual_seed(0)
        keys, values = (torch.randn(B, K, SLOTS, D).to(dtype) for _ in range(2))
        for row, start in enumerate(starts):
            keys[row, :, start:] = values[row, :, start:] = torch.nan
        x, weight = torch.randn(B, T, H * D), torch.randn((H + 2 * K) * D, H * D) * (H * D) ** -0.5
        return cls(x, weight, keys, values, starts, torch.rand(SLOTS, D // 2) * 7, H)

    def found(self, rows: slice = slice(None), first: int = 0, last: int | None = None, threads: int = 2) -> Tensor:
        """What the kernels make of some rows and tokens (B, T, dim), and write to the cache."""
        x = self.x[rows, first:last].contiguous()
        (B, T, dim), (_, K, S, D) = x.shape, self.keys.shape
        ones, whole = torch.ones(dim), torch.eye(dim)
        qkv, mixed, out = (torch.empty(B * T, width) for width in (len(self.weight), dim, dim))
        cos, sin = self.angles.cos(), self.angles.sin()
        starts = (ctypes.c_int64 * B)(*(start + first for start in self.starts[rows]))
        block = library.Block(ones.data_ptr(), ones.data_ptr(), Matrix.of(self.weight).struct, Matrix.of(whole).struct)
        block.keys, block.values = (store[rows].data_ptr() for store in (self.keys, self.values))
        step = library.Step(rows=B, tokens=T, dim=dim, heads=self.heads, kv_heads=K, head_dim=D, hidden=0, slots=S)
        step.cache_kind, step.threads, step.eps = PLAIN[self.keys.dtype], threads, 1e-5
        step.starts, step.cos, step.sin = ctypes.addressof(starts), cos.data_ptr(), sin.data_ptr()
        step.qkv, step.mixed = qkv.data_ptr(), mixed.data_ptr()
        library.load().run_half(ctypes.byref(block), 1, ctypes.byref(step), x.data_ptr(), out.data_ptr())
        return out.view(B, T, dim)

    def exact(self) -> Tensor:
        (B, T, dim), (_, K, S, D), H = self.x.shape, self.keys.shape, self.heads
        x = self.x.double()
        qkv = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() @ self.weight.double().T
        q, k, v = (part.unflatten(-1, (-1, D)) for part in qkv.split((H * D, K * D, K * D), -1))
        position = torch.tensor(self.starts)[:, None] + torch.arange(T)  # (B, T)
        turn = torch.polar(torch.ones(B, T, D // 2, dtype=torch.float64), self.angles.double()[position])[:, :, None]
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
        keys, values = (store.double().nan_to_num() for store in (self.keys, self.values))
        for row, start in enumerate(self.starts):
            keys[row, :, start : start + T] = k[row].transpose(0, 1)
            values[row, :, start : start + T] = v[row].transpose(0, 1)
        scores = torch.einsum("btkgd,bksd->bkgts", q.unflatten(2, (K, -1)), keys) / D**0.5
        weights = scores.masked_fill(torch.arange(S) > position[:, None, None, :, None], -torch.inf).softmax(-1)
        return torch.einsum("bkgts,bksd->btkgd", weights, values).reshape(B, T, dim)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", PRECISION)
def test_it_is_that_in_float64(dtype: torch.dtype, shape: tuple[int, int, int, int, int, list[int]]) -> None:
    given = Inputs.of(*shape, dtype)
    right, found = given.exact(), given.found()
    assert right.abs().max() > 0.4
    torch.testing.assert_close(found.double(), right, rtol=PRECISION[dtype], atol=PRECISION[dtype])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (16, 2)])
@pytest.mark.parametrize("dtype", PRECISION)
def test_a_token_does_not_depend_on_those_beside_it(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """Bit by bit: by itself or with others of its row, in one row or beside others, by any number of threads. Of the
    last row each token's own key is the highest for the first head; for the other heads one of the first slots' is."""

    def inputs() -> Inputs:
        made = Inputs.of(3, 6, heads, kv_heads, 64, [20, 61, 300], dtype)
        made.weight[heads * 64 : (heads + 1) * 64] = made.weight[:64] * 3
        made.keys[2, :, :250] *= 4
        return made

    together, alone = inputs(), inputs()
    right = together.found()
    for row in range(3):
        for first, last in ((0, 1), (1, 2), (2, 6)):
            found = alone.found(slice(row, row + 1), first, last, threads=1 + 4 * row)
            assert torch.equal(found, right[row : row + 1, first:last])
    assert torch.equal(alone.keys.nan_to_num(), together.keys.nan_to_num())
    assert torch.equal(alone.values.nan_to_num(), together.values.nan_to_num())


@pytest.mark.parametrize("heads", [2, 16])
@pytest.mark.parametrize("dtype", PRECISION)
def test_nothing_is_read_behind_the_last_slot(
    dtype: torch.dtype, heads: int, before_a_wall: Callable[[Tensor], Tensor]
) -> None:
    for start in (SLOTS - 1, SLOTS - 3):
        given = Inputs.of(1, SLOTS - start, heads, 2, 64, [start], dtype)
        given.keys, given.values = before_a_wall(given.keys), before_a_wall(given.values)
        right = given.exact()
        torch.testing.assert_close(given.found().double(), right, rtol=PRECISION[dtype], atol=PRECISION[dtype])


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("dtype", PRECISION)
def test_scores_of_hundreds_are_no_trouble(dtype: torch.dtype, heads: int) -> None:
    """The highest comes first, last or between, so that what was added up before it fades to nothing; for some heads
    all are far below 0. A score of hundreds is known to 3e-5 in float32, and so is its weight; in bfloat16 to 1."""
    given = Inputs.of(1, 2, heads, 1, 64, [500], dtype)
    given.weight[: heads * 64] *= 40
    given.keys[:, :, :500] *= torch.linspace(0.2, 1, 500)[:, None].to(dtype)
    for slot in (0, 100, 300, 499):
        given.keys[:, :, slot] *= 8
    right, found = given.exact(), given.found()
    assert found.isfinite().all()
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=1e-3)
    else:
        assert (found - right).abs().max() < 0.5
