"""The report's tables, in Markdown, from figures alone.

Shares are given with their 95 % interval. Of what was not measured the cell is a dash: a run may lack a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llama.train.report.measurements import Figures
from llama.train.stages import STAGES, Result

Stages = dict[str, dict[str, Figures]]
"""Figures by stage and by the measurement's name."""
MISSING = "–"


@dataclass(frozen=True)
class Target:
    """A figure of the last stage that a small Code Llama worth having reaches."""

    what: str
    of: tuple[str, ...]
    """Where it stands: the measurement's name, then the keys."""
    must: float | None
    """None where there is no bar to pass, only one to aim at."""
    aim: float
    smaller: bool = False
    percent: bool = True

    def words(self, value: float) -> str:
        return f"{'≤' if self.smaller else '≥'} {value:.0%}" if self.percent else f"≤ {value:.2f}"

    def verdict(self, value: float) -> str:
        def reaches(bar: float) -> bool:
            return value <= bar if self.smaller else value >= bar

        if self.must is not None and not reaches(self.must):
            return "**missed**"
        return "aim" if reaches(self.aim) else "must"


TARGETS = (
    Target("bits a byte / `xz -9e` file by file", ("compression", "of_xz"), 0.7, 0.7, smaller=True, percent=False),
    Target(
        "bits a byte / `xz -9e` of all as one", ("compression", "of_solid_xz"), None, 0.75, smaller=True, percent=False
    ),
    Target("completed functions that parse", ("functions", "parsed"), 0.85, 0.97),
    Target("single lines filled in exactly, PSM", ("lines-psm", "exact"), 0.10, 0.25),
    Target("keys found at the long length, all depths", ("retrieval", "long"), None, 0.90),
    Target("answers that stop by themselves", ("instructions", "stopped"), 0.90, 0.99),
    Target("answers whose code parses", ("instructions", "parsed"), 0.80, 0.95),
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def share(value: Figures) -> str:
    return f"{value['rate']:.1%} ({value['low']:.0%} to {value['high']:.0%} of {value['n']})"


def estimate(value: Figures, digits: int = 3) -> str:
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def targets(last: dict[str, Figures]) -> str:
    rows = []
    for target in TARGETS:
        value = find(last, target.of)
        must = MISSING if target.must is None else target.words(target.must)
        if value is None:
            rows.append([target.what, MISSING, must, target.words(target.aim), MISSING])
        else:
            rate, words = (value["rate"], share(value)) if "rate" in value else (value["value"], estimate(value))
            rows.append([target.what, words, must, target.words(target.aim), target.verdict(rate)])
    return table(["on packages that were held out", "measured", "must", "aim", "reached"], rows)


def find(figures: dict[str, Figures], path: tuple[str, ...]) -> Any:
    found: Any = figures
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def run(results: Sequence[Result]) -> str:
    """What each stage read, and for how long."""
    rows = []
    for result in results:
        mixture = STAGES[result.stage].mixture
        rows.append(
            [
                result.stage, f"{result.tokens:,}", f"{result.steps:,}", f"{result.minutes:.0f}", f"{result.length:,}",
                f"{result.rope_theta:,.0f}", f"{mixture.infilling:.0%}", f"{mixture.keys:.0%}",
                f"{mixture.dialogs:.0%}", f"{result.loss:.3f}", f"{result.bits_per_byte:.3f}",
            ]
        )  # fmt: skip
    header = "stage, tokens, steps, minutes, length, theta, with a gap, keys, dialogs, loss, bits a byte"
    return table(header.split(", "), rows)


def by_stage(stages: Stages) -> str:
    """What each stage can do."""
    cells: tuple[tuple[str, tuple[str, ...], Callable[[Figures], str]], ...] = (
        ("bits a byte of whole files, context as trained", ("sample", "bits_per_byte"), estimate),
        ("functions that parse", ("functions", "parsed"), share),
        ("functions that end within 256 tokens", ("functions", "ended"), share),
        ("lines exact, prefix first", ("lines-psm", "exact"), share),
        ("lines exact, suffix first", ("lines-spm", "exact"), share),
        ("lines exact, as a completion, without a suffix", ("lines-none", "exact"), share),
        ("first line right, prefix first", ("lines-psm", "first_line"), share),
        ("keys found at the base length", ("retrieval", "base"), share),
        ("keys found at the long length", ("retrieval", "long"), share),
        ("answers that stop", ("instructions", "stopped"), share),
        ("answers that parse", ("instructions", "parsed"), share),
    )
    rows = []
    for what, path, words in cells:
        values = [find(stages[stage], path) for stage in stages]
        rows.append([what, *(MISSING if value is None else words(value) for value in values)])
    return table(["after stage", *stages], rows)


def packages(compression: Figures) -> str:
    """Bits a byte by package, beside what xz makes of it."""
    rows = []
    for package in [*compression["packages"], compression["total"]]:
        size = package["bytes"]
        model, alone, solid = (package[key] / size for key in ("model_bits", "xz_bits", "solid_xz_bits"))
        rows.append(
            [package["name"], f"{size:,}", f"{model:.3f}", f"{alone:.3f}", f"{model / alone:.2f}", f"{solid:.3f}",
             f"{model / solid:.2f}"]
        )  # fmt: skip
    header = "package, bytes, model, xz file by file, ratio, xz as one archive, ratio"
    return table(header.split(", "), rows)


def keys(retrieval: Figures) -> str:
    """Found keys by length and depth."""
    cells = {(cell["length"], cell["depth"]): cell["found"] for cell in retrieval["cells"]}
    depths = retrieval["depths"]
    rows = [
        [f"{length:,}", *(f"{cells[length, depth]['rate']:.0%}" for depth in depths)] for length in retrieval["lengths"]
    ]
    return table(["tokens \\ depth", *(f"{depth:g}" for depth in depths)], rows)


def gaps(cost: Figures) -> str:
    """What it costs to learn to fill gaps: two runs that differ in nothing else."""
    rows = [
        [name, f"{figures['steps']:,}", f"{figures['tokens']:,}", estimate(figures["bits_per_byte"])]
        for name, figures in cost["runs"].items()
    ]
    ratio = cost["ratio"]
    rows.append(["with / without", "", "", estimate(ratio, 4)])
    return table(["trained", "steps", "tokens", "bits a byte"], rows)
