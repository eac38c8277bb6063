"""What the paper found, as statements that a program can check against figures of one's own.

Each names what the paper reports (arXiv 2308.12950, appendix G, table 18, the 7B model; perplexity as the authors of
YaRN measured it), computes the same of the miniature, and says yes or no. Lengths are told in fine-tuned lengths T,
16,384 tokens in the paper: its columns 8k, 16k and 24k are T/2, T and 1.5 T. Rates are means over seeds; where a
statement speaks of several depths, each of them must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

PAPER = {
    "start": ("95 / 100 / 100", "0 / 0 / 0", "0 / 0 / 0", "0 / 0"),
    "start-raised": ("95 / 100 / 100", "0 / 0 / 0", "0 / 0 / 0", "0 / 0"),
    "kept": ("34 / 93 / 98", "0 / 1 / 59", "0 / 0 / 0", "0 / 0"),
    "linear": ("100 / 100 / 100", "100 / 99 / 99", "2 / 99 / 100", "0 / 0"),
    "raised": ("95 / 95 / 100", "100 / 95 / 100", "55 / 100 / 98", "3 / 86"),
}
"""Table 18, 7B: keys found at 4k, 8k, 16k and 24k, in percent, at depths 0, 0.2 and 0.4 (at 24k 0 and 0.2)."""
PAPER_LENGTHS = ("4k", "8k", "16k", "24k")
ENDS = (0.0, 0.4)
"""The depths of the aims."""
FOUND, LOST = 0.8, 0.1


@dataclass(frozen=True)
class Findings:
    """What was measured, by the names of conditions."""

    base_length: int
    tuned_length: int
    keys: Mapping[str, Mapping[tuple[int, float], Sequence[float]]]
    """The share of keys found at each length and depth, one for each seed."""
    nats: Mapping[str, Sequence[Sequence[float]]]
    """For each seed, the loss in each of `bins`."""
    bins: Sequence[tuple[int, int]]
    """Positions from the first up to, without, the second."""

    def rate(self, condition: str, lengths: float, depth: float) -> float:
        """At so many fine-tuned lengths, the mean over seeds. Raises KeyError where that was not measured."""
        return fmean(self.keys[condition][round(lengths * self.tuned_length), depth])

    def loss(self, condition: str, after: float, up_to: float) -> float:
        """Nats a token at positions within these fine-tuned lengths, the mean over bins and seeds. KeyError where no
        bin lies in them."""
        low, high = after * self.tuned_length, up_to * self.tuned_length
        inside = [i for i, (start, end) in enumerate(self.bins) if low <= (start + end) / 2 <= high]
        if not inside:
            raise KeyError((condition, after, up_to))
        return fmean(seed[i] for seed in self.nats[condition] for i in inside)


@dataclass(frozen=True)
class Statement:
    text: str
    paper: str
    """What it reports; empty for what is only an aim of ours."""
    check: Callable[[Findings], tuple[str, bool]]
    """Our figures, and whether it holds."""


@dataclass(frozen=True)
class Verdict:
    text: str
    paper: str
    here: str
    holds: bool | None
    """None where what it needs was not measured."""

    @property
    def word(self) -> str:
        return "not measured" if self.holds is None else "yes" if self.holds else "**no**"


def judge(findings: Findings, statements: Sequence[Statement]) -> list[Verdict]:
    """Every statement with what it comes to."""
    found = []
    for statement in statements:
        try:
            here, holds = statement.check(findings)
            found.append(Verdict(statement.text, statement.paper, here, holds))
        except KeyError:
            found.append(Verdict(statement.text, statement.paper, "", None))
    return found


def at_least(bar: float, condition: str, lengths: float, depths: Sequence[float]) -> Callable[..., tuple[str, bool]]:
    """Keys are found, at each of these depths."""

    def check(findings: Findings) -> tuple[str, bool]:
        rates = [findings.rate(condition, lengths, depth) for depth in depths]
        return percents(rates), min(rates) >= bar

    return check


def at_most(bar: float, condition: str, lengths: float, depths: Sequence[float]) -> Callable[..., tuple[str, bool]]:
    """Keys are lost, at each of these depths."""

    def check(findings: Findings) -> tuple[str, bool]:
        rates = [findings.rate(condition, lengths, depth) for depth in depths]
        return percents(rates), max(rates) <= bar

    return check


def percents(rates: Sequence[float]) -> str:
    """As table 18 has them: 55 / 100 / 98."""
    return " / ".join(f"{100 * rate:.0f}" for rate in rates)


def _order_at_tuned_length(findings: Findings) -> tuple[str, bool]:
    rates = [fmean(findings.rate(name, 1, depth) for depth in (0.0, 0.2, 0.4)) for name in ("raised", "linear", "kept")]
    return " > ".join(f"{100 * rate:.0f}" for rate in rates), rates[0] > rates[1] > rates[2]


def _linear_loses_the_front(findings: Findings) -> tuple[str, bool]:
    front, middle = findings.rate("linear", 1, 0.0), findings.rate("linear", 1, 0.4)
    return percents([front, middle]), middle >= 0.5 and front <= middle / 2


def _raised_keeps_the_front(findings: Findings) -> tuple[str, bool]:
    raised, linear = findings.rate("raised", 1, 0.0), findings.rate("linear", 1, 0.0)
    return percents([raised, linear]), raised > linear


def _raised_breaks_last(findings: Findings) -> tuple[str, bool]:
    rates = [findings.rate(name, 1.5, 0.2) for name in ("raised", "linear", "kept")]
    return percents(rates), rates[0] > max(rates[1:])


def _perplexity_says_little(findings: Findings) -> tuple[str, bool]:
    losses = [findings.loss(name, 0.5, 1) for name in ("kept", "raised")]
    keys = [fmean(findings.rate(name, 1, depth) for depth in ENDS) for name in ("kept", "raised")]
    words = f"{losses[0]:.2f} and {losses[1]:.2f} nats; {percents(keys)}"
    return words, abs(losses[1] - losses[0]) <= 0.1 and keys[1] - keys[0] >= 0.5


def _perplexity_goes_on_falling(findings: Findings) -> tuple[str, bool]:
    within, beyond = findings.loss("raised", 0.5, 1), findings.loss("raised", 1, 2)
    return f"{within:.2f}, then {beyond:.2f} nats", beyond <= within


AIMS = (
    Statement("θ kept: at T at most 10 % of the keys are found at depths 0 and 0.4", "", at_most(0.1, "kept", 1, ENDS)),
    Statement("θ raised: at T at least 85 %, at the same depths", "", at_least(0.85, "raised", 1, ENDS)),
    Statement("θ raised: at 2 T at least 80 %, at the same depths", "", at_least(0.8, "raised", 2, ENDS)),
    Statement("linear: at 2 T at most 10 %, at the same depths", "", at_most(0.1, "linear", 2, ENDS)),
)
"""What the miniature was made to reach."""
ORDERINGS = (
    Statement(
        "The start finds keys within its own length (T/4; at least 80 %)",
        PAPER["start"][0],
        at_least(FOUND, "start", 0.25, (0.0, 0.2, 0.4)),
    ),
    Statement(
        "Without fine-tuning there is nothing at T/2 (at most 10 %)",
        PAPER["start"][1],
        at_most(LOST, "start", 0.5, (0.0, 0.2, 0.4)),
    ),
    Statement(
        "Raising θ without fine-tuning changes nothing at T/2 (at most 10 %)",
        PAPER["start-raised"][1],
        at_most(LOST, "start-raised", 0.5, (0.0, 0.2, 0.4)),
    ),
    Statement(
        "Fine-tuning with θ kept does not help at T (at most 10 %)",
        PAPER["kept"][2],
        at_most(LOST, "kept", 1, (0.0, 0.2, 0.4)),
    ),
    Statement("At T: θ raised > linear > θ kept, means over depths", "84 > 67 > 0", _order_at_tuned_length),
    Statement(
        "Linear loses the front at T: depth 0 against 0.4, which is at least 50 %, half of it or less",
        "2 / 100",
        _linear_loses_the_front,
    ),
    Statement("At T and depth 0, θ raised finds more than linear", "55 / 2", _raised_keeps_the_front),
    Statement(
        "At 1.5 T and depth 0.2, θ raised finds more than linear and than θ kept", "86 / 0 / 0", _raised_breaks_last
    ),
    Statement(
        "Linear finds nothing at 1.5 T (at most 10 %)", PAPER["linear"][3], at_most(LOST, "linear", 1.5, (0.0, 0.2))
    ),
    Statement(
        "Loss hardly tells θ kept from θ raised at T/2 to T (0.1 nats at most), and keys do (50 points at least)",
        "not reported",
        _perplexity_says_little,
    ),
    Statement(
        "With θ raised the loss goes on falling: T to 2 T against T/2 to T",
        "perplexity 3.11 at 16k, 2.75 at 32k",
        _perplexity_goes_on_falling,
    ),
)
"""What the paper found, in its order."""
