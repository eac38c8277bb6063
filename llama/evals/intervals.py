"""How sure a figure is: 95 % intervals for shares and for ratios of sums.

A share (85 of 100 functions parse) gets Wilson's interval, which stays within 0 and 1 and is honest at 0 and 100 %,
where the textbook's plus-minus collapses to a point. A ratio of sums (bits over bytes, of many files) gets a bootstrap
interval whose units are whole files: the tokens of one file resemble each other, and an interval that took them for
independent would be far too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # 95 % of a normal distribution lies within this many standard deviations


@dataclass(frozen=True)
class Share:
    """`hits` of `n`, and the Wilson interval of the rate."""

    hits: int
    n: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums, and its bootstrap interval over `n` units."""

    value: float
    low: float
    high: float
    n: int


def share(hits: int, n: int) -> Share:
    """Wilson's interval (1927): the rates from which `hits` is no further than Z standard deviations."""
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n} is no share; give n of at least 1, and hits between 0 and n")
    rate = hits / n
    centre = (rate + Z * Z / (2 * n)) / (1 + Z * Z / n)
    reach = Z / (1 + Z * Z / n) * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    # At 0 and n the bound is 0 or 1 exactly, which rounding may miss.
    return Share(hits, n, rate, 0.0 if hits == 0 else centre - reach, 1.0 if hits == n else centre + reach)


def ratio(numerators: Sequence[float], denominators: Sequence[float], samples: int = 2000, seed: int = 0) -> Estimate:
    """sum(numerators) / sum(denominators), one of each per unit, so that large units weigh more.

    The interval is the percentile bootstrap's: units drawn with replacement, `samples` times. With one seed, ratios
    over the same units see the same draws. A single unit says nothing about others: its interval is a point.
    """
    if len(numerators) != len(denominators) or not len(numerators) or not sum(denominators) > 0:
        raise ValueError(
            f"{len(numerators)} numerators over {len(denominators)} denominators that sum to {sum(denominators)}; "
            "give one of each per unit, at least one unit, and a positive sum"
        )
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    rng, n = np.random.default_rng(seed), len(top)
    drawn: list[float] = []
    while len(drawn) < samples:
        times = rng.multinomial(n, np.full(n, 1 / n))  # how often each unit is drawn
        weight = times @ bottom
        if weight > 0:  # a draw of empty units alone has no ratio
            drawn.append(float(times @ top / weight))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), n)
