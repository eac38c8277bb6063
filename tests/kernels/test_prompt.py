"""A prompt's attention in C++ against float64 arithmetic.

What these guard against: a token that sees one slot too many or too few, above all where blocks of slots begin; a query
head that reads another's keys; sums that a later, larger score does not scale down; slots read that nobody wrote.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama.kernels.prompt import attend, gated, turn_

pytestmark = pytest.mark.usefixtures("lanes")
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SHAPES = [  # B, H, K, T, D, starts
    (1, 2, 2, 5, 16, [0]),
    (2, 4, 2, 37, 64, [0, 5]),
    (1, 8, 8, 300, 32, [77]),
    (2, 8, 2, 70, 128, [130, 3]),
    (3, 6, 1, 9, 80, [63, 64, 56]),
    (1, 1, 1, 2, 48, [127]),
]


def exact(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    (_, H, T, D), (_, K, S, _) = q.shape, keys.shape
    hidden = torch.arange(S) > (starts[:, None] + torch.arange(T))[:, None, :, None]
    k, v = (t.double().nan_to_num().repeat_interleave(H // K, 1) for t in (keys, values))
    return (q.double() @ k.mT / D**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def inputs(B: int, H: int, K: int, T: int, D: int, starts: list[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As a block and its cache have them: q is a part of a wider tensor, and a row's slots go on behind those that are
    seen, where there may be anything."""
    torch.manual_seed(0)
    q = torch.randn(B, T, H + 2, D).to(dtype)[:, :, :H].transpose(1, 2)
    keys, values = (torch.randn(B + 1, K, 400, D).to(dtype)[:B] for _ in range(2))
    for row, start in enumerate(starts):
        for store in (keys, values):
            store[row, :, start + T :] = torch.nan
    return q, keys, values, torch.tensor(starts)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", PRECISION)
def test_it_is_that_in_float64(dtype: torch.dtype, shape: tuple[int, int, int, int, int, list[int]]) -> None:
    given = inputs(*shape, dtype)
    found, right = attend(*given), exact(*given)
    assert found.shape == right.shape
    assert found.dtype == dtype
    assert right.abs().max() > 0.5
    torch.testing.assert_close(found.double(), right, rtol=PRECISION[dtype], atol=PRECISION[dtype])


@pytest.mark.parametrize("dtype", PRECISION)
def test_scores_of_hundreds_are_no_trouble(dtype: torch.dtype) -> None:
    """The highest stands first, last, or between, so that what was added up before it fades to nothing; and all may be
    far below 0. A score of a thousand is known to 6e-5, and so is its weight."""
    q, keys, values, starts = inputs(1, 2, 1, 200, 64, [0], dtype)
    q[:] = q.abs() * 20
    for slot in (0, 100, 170):
        keys[:, :, slot] = keys[:, :, slot].abs() + 1
    for given in ((q, keys, values, starts), (q, -keys.abs(), values, starts)):
        right = exact(*given)
        torch.testing.assert_close(attend(*given).double(), right, rtol=1e-2, atol=max(2 * PRECISION[dtype], 2e-4))


@pytest.mark.parametrize("dtype", PRECISION)
def test_what_is_no_number_stays_with_those_who_see_it(dtype: torch.dtype) -> None:
    q, keys, values, starts = inputs(2, 4, 2, 70, 32, [0, 0], dtype)
    values[0, 1, 66] = torch.nan
    keys[1, 0, 5] = torch.inf
    q[1, 1, 40] = torch.nan
    lost = ~attend(q, keys, values, starts).isfinite().all(-1)
    for row, head, first in ((0, 2, 66), (0, 3, 66), (1, 0, 5), (1, 1, 5)):
        assert lost[row, head, first:].all()
        lost[row, head, first // 64 * 64 :] = False  # whose weight is 0 for a token before it in its block: 0 x NaN
    assert not lost.any()


@pytest.mark.parametrize("dtype", PRECISION)
def test_what_a_token_sees_does_not_depend_on_those_beside_it(dtype: torch.dtype) -> None:
    """A prompt in parts, whose blocks of slots and tiles of queries begin elsewhere; what later tokens hold is huge."""
    q, keys, values, starts = inputs(2, 4, 2, 150, 32, [0, 9], dtype)
    whole = attend(q, keys, values, starts)
    for first, last in ((0, 150), (0, 1), (3, 64), (61, 66), (100, 149)):
        own_keys, own_values = keys.clone(), values.clone()
        for row, start in enumerate((0, 9)):
            own_values[row, :, start + last :] = torch.inf
            own_keys[row, :, start + last :] = 1e30
        assert torch.equal(attend(q[:, :, first:last], own_keys, own_values, starts + first), whole[:, :, first:last])
    mixed = values.clone()
    mixed[:, :, 130:] = 1e30
    assert torch.equal(attend(q, keys, mixed, starts)[:, :, :120], whole[:, :, :120])


def test_dtypes_are_one() -> None:
    q, keys, values, starts = inputs(1, 2, 1, 5, 16, [0], torch.float32)
    with pytest.raises(ValueError, match=r"keys torch\.bfloat16 .* must be of one dtype"):
        attend(q, keys.bfloat16(), values, starts)


def test_threads_share_the_work_and_change_nothing() -> None:
    given = inputs(2, 8, 2, 150, 64, [30, 0], torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attend(*given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_any_strides_will_do() -> None:
    q, keys, values, starts = inputs(2, 4, 2, 20, 32, [3, 0], torch.float32)
    right = attend(q, keys, values, starts)
    for made in (lambda t: t.mT.contiguous().mT, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        for which in range(3):
            given = [made(t) if at == which else t for at, t in enumerate((q, keys, values))]
            torch.testing.assert_close(attend(*given, starts), right)


@pytest.mark.parametrize("rows_of_angles", [1, 2])
def test_pairs_are_turned_in_place(rows_of_angles: int) -> None:
    """And nothing beside them."""
    every = torch.randn(2, 5, 7, 96).bfloat16()
    angles = torch.randn(rows_of_angles, 5, 1, 48) * 3
    pairs = torch.view_as_complex(every[:, :, :4].double().unflatten(-1, (48, 2))) * torch.polar(
        torch.ones_like(angles).double(), angles.double()
    )
    right, beside = torch.view_as_real(pairs).flatten(-2), every[:, :, 4:].clone()
    found = turn_(every[:, :, :4], angles.cos(), angles.sin())
    torch.testing.assert_close(found.double(), right, rtol=2**-8, atol=1e-6)
    assert found.data_ptr() == every.data_ptr()
    assert torch.equal(every[:, :, 4:], beside)


def test_the_first_half_gates_the_second() -> None:
    x = (torch.randn(2, 3, 192) * 20).bfloat16()
    x[0, 0, :4] = torch.tensor([0.0, 300.0, -300.0, torch.nan])
    gate, proposal = x.double().chunk(2, -1)
    right = gate / (1 + torch.exp(-gate)) * proposal
    torch.testing.assert_close(gated(x).double(), right, rtol=2**-8, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(gated(x.transpose(0, 1)), gated(x).transpose(0, 1), rtol=0, atol=0, equal_nan=True)
