"""Intervals against published values, their own definitions, and each other."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.evals.intervals import Z, ratio, share


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (9, 10, 0.5958, 0.9821),
        (64, 64, 0.9434, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval_has_its_published_values(hits: int, n: int, low: float, high: float) -> None:
    found = share(hits, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_the_rates_from_which_the_hits_are_z_deviations_away(case: tuple[int, int]) -> None:
    found = share(*case)
    assert 0 <= found.low <= found.rate <= found.high <= 1
    for bound in (found.low, found.high):
        if 0 < bound < 1:
            assert abs(found.rate - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / found.n), rel=1e-6)


def test_ratio_is_of_sums_and_not_the_mean_of_ratios() -> None:
    assert ratio([1, 90], [1, 10]).value == pytest.approx(91 / 11)


def test_bootstrap_of_equal_units_is_as_wide_as_the_normal_interval_of_a_mean() -> None:
    rng = random.Random(0)
    values = [rng.gauss(5, 1) for _ in range(200)]
    found = ratio(values, [1] * 200)
    mean = sum(values) / 200
    reach = Z * math.sqrt(sum((v - mean) ** 2 for v in values) / 200 / 200)
    assert found.low == pytest.approx(mean - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(mean + reach, abs=0.1 * reach)


def test_bootstrap_draws_whole_units_however_many_tokens_they_have() -> None:
    few, many = ratio([2, 4, 3, 6], [1, 1, 1, 1]), ratio([2000, 4000, 3000, 6000], [1000] * 4)
    assert (many.low, many.high) == pytest.approx((few.low, few.high))
    assert many.low < 3 < 4 < many.high, "a thousand tokens of four files are four units"


def test_bootstrap_is_the_same_each_time_and_another_with_another_seed() -> None:
    top, bottom = [3.0, 1.0, 4.0, 1.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ratio(top, bottom) == ratio(top, bottom) != ratio(top, bottom, seed=1)


def test_bootstrap_survives_units_of_nothing() -> None:
    found = ratio([0.0, 2.0], [0.0, 1.0])
    assert found.value == found.low == found.high == 2.0


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_share_that_is_none_is_refused(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        share(hits, n)


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], []), ([1.0], [0.0])])
def test_ratio_over_nothing_is_refused(top: list[float], bottom: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        ratio(top, bottom)
