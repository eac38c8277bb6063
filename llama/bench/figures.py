"""From rounds to figures: medians and spreads, ratios within rounds, the share of what the machine allows.

All of it is arithmetic on `Measured`s; nothing is measured here. A ratio above 1 is always the faster one's, also where
the figure itself is a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llama.bench.measures import Measured, Unit
from llama.bench.rounds import Spread, ratios, spread
from llama.evals.table import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture


@dataclass(frozen=True)
class Figure:
    """One measure of one model."""

    measure: str
    variant: str
    rows: int
    tokens: int
    extrapolated_to: int | None
    """Layers, where it was not measured with all of them."""
    unit: Unit
    value: Spread
    limit: str
    of_limit: Spread | None
    """The share of the rate that the machine allows."""
    over: Mapping[str, Spread]
    """How many times as fast as others it is, by their names."""

    def row(self) -> dict[str, Any]:
        """As a row of a table that all figures fit in."""
        flat: dict[str, Any] = {
            "measure": self.measure,
            "variant": self.variant,
            "rows": self.rows,
            "tokens": self.tokens,
            "extrapolated_to": self.extrapolated_to,
            "unit": self.unit,
            **asdict(self.value),
            "limit": self.limit,
            "of_limit": self.of_limit and self.of_limit.median,
        }
        for name, ratio in self.over.items():
            flat |= {f"x_{name}": ratio.median, f"x_{name}_low": ratio.low, f"x_{name}_high": ratio.high}
        return flat


def figures(measured: Measured, baselines: Sequence[str]) -> list[Figure]:
    """A figure for each model; ratios over those of `baselines` that took part."""
    found = []
    for name, rates in measured.rates.items():
        limits = measured.limits.get(name)
        found.append(
            Figure(
                measured.measure,
                name,
                measured.rows,
                measured.tokens,
                measured.layers,
                measured.unit,
                spread([1 / rate for rate in rates] if measured.unit == "s" else rates),
                measured.limit if limits else "",
                spread(ratios(rates, limits)) if limits else None,
                {
                    base: spread(ratios(rates, measured.rates[base]))
                    for base in baselines
                    if base in measured.rates and base != name
                },
            )
        )
    return found


def rows_of(found: Sequence[Figure]) -> list[dict[str, Any]]:
    """`Figure.row` of all, each with the same keys."""
    rows = [figure.row() for figure in found]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def title(figure: Figure) -> str:
    """What is measured, in words: decode, batch 8."""
    words = figure.measure
    if figure.measure.startswith("decode"):
        words += f", batch {figure.rows}"
    elif figure.tokens:
        words += f" {figure.tokens:,}"
    return words if figure.extrapolated_to is None else f"{words}, extrapolated to {figure.extrapolated_to} layers"


def table(found: Sequence[Figure], baselines: Sequence[str]) -> str:
    """For people: the median and in brackets the lowest and the highest round."""
    used = [base for base in baselines if any(base in figure.over for figure in found)]
    header = ["", "", "median (lowest–highest)", "", "of the limit", *(f"× {base}" for base in used)]
    rows: list[list[str]] = []
    before = ""
    for figure in found:
        name = title(figure)
        share = f"{_percent(figure.of_limit.median)} of {figure.limit}" if figure.of_limit else ""
        over = [_ratio(figure.over[base]) if base in figure.over else "" for base in used]
        rows.append([name if name != before else "", figure.variant, _value(figure.value), figure.unit, share, *over])
        before = name
    return render(header, rows)


def _value(value: Spread) -> str:
    middle = _number(value.median)
    return middle if value.rounds == 1 else f"{middle} ({_number(value.low)}–{_number(value.high)})"


def _ratio(value: Spread) -> str:
    return f"{value.median:.2f} ({value.low:.2f}–{value.high:.2f})"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.3g}"


def draw(found: Sequence[Figure], picture: Picture) -> None:
    """Bars of tokens a second, a group for each measure, with the spread of the rounds and a dash at the limit."""
    shown = [figure for figure in found if figure.unit == "tokens/s"]
    groups = list(dict.fromkeys(title(figure) for figure in shown))
    variants = list(dict.fromkeys(figure.variant for figure in shown))
    axes = picture.subplots()
    width = 0.8 / max(len(variants), 1)
    for i, variant in enumerate(variants):
        own = [figure for figure in shown if figure.variant == variant]
        places = [groups.index(title(figure)) + (i + 0.5) * width - 0.4 for figure in own]
        heights = [figure.value.median for figure in own]
        below = [figure.value.median - figure.value.low for figure in own]
        above = [figure.value.high - figure.value.median for figure in own]
        axes.bar(places, heights, width, yerr=[below, above], capsize=2, label=variant)
        for place, figure in zip(places, own, strict=True):
            if figure.of_limit:
                limit = figure.value.median / figure.of_limit.median
                axes.hlines(limit, place - width / 2, place + width / 2, colors="black", linestyles="dashed")
    axes.set_yscale("log")
    axes.set_ylabel("tokens/s")
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    picture.legend(title="dashed: the limit", loc="outside right upper")  # where no bar can be
