"""The page: tables and pictures laid out as the paper's, with every figure computed.

What a table is written with is given (`Table`), so that this file knows of figures only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from llama.evals.record import picture
from llama.evals.retrieval import Retrieval
from llama.longcontext.reproduce.conditions import PAPER_BASE, PAPER_TUNED, Condition, conditions
from llama.longcontext.reproduce.statements import PAPER, PAPER_LENGTHS, Findings, Verdict, percents
from llama.longcontext.retrieval import EFFECTIVE, heat_map
from llama.longcontext.spectra import expectation, turning_share
from llama.rope import spectrum

_PAPERS = conditions(PAPER_BASE[0], PAPER_TUNED[0] // PAPER_BASE[0], PAPER_BASE[1], PAPER_TUNED[1])
_HEAD_DIM = 1024
"""Of figure 9a: with few pairs a curve is all waves."""
_POINTS = 2048
"""Of a curve of attention expectation."""
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
"""Header and rows to Markdown."""

TEMPLATE = """\
# The paper's long-context ablation, in miniature

Written by `codellama longcontext reproduce --preset {preset}` (commit {commit}); nobody typed a figure. {origin}

Code Llama was fine-tuned from 4,096 to 16,384 tokens with θ raised from 1e4 to 1e6 (arXiv 2308.12950, sections 2.4, 3.3
and G). Is that why it finds what stands far back? Here a model of {parameters:,} parameters goes from {base_length:,}
to {tuned_length:,} tokens under {conditions} conditions: from the same start, on the same rows, {tuned_steps:,} steps
of {tokens:,} tokens each. There are {seeds} seeds{of_start}; all figures are means over them. Training took
{training:.0f} minutes and measuring {measuring:.0f}, summed over processes.

{sizes}

## What comes out again

T is the length fine-tuned on.

{aims}

{orderings}

## Keys found, laid out as table 18

In percent, at depths {depths}, {samples} samples a cell and seed.

{table_18}

The paper's (7B), whose 4k, 8k, 16k and 24k are T/4, T/2, T and 1.5 T:

{paper_18}

![Keys found, by length and depth]({folder}/retrieval.png)

## Keys found with θ raised, laid out as table 17

The mean over seeds, with the lowest and the highest.

{table_17}

Effective length (the largest at which 85.6 % of the keys are found, all depths and seeds together):

{effective}

## Perplexity by position, as figure 4a

![Loss by position]({folder}/perplexity.png)

{losses}

## Attention expectation, as figure 9a

What a query and a key that are alike score at a distance, by the spectrum alone, as a part of distance 0. The upper
panel has the θ and lengths of this page, the lower the paper's; heads have 1,024 numbers in both, as in the paper's
figure, for with as few as the model has, every curve is all waves. The fine-tuned length is dashed.

![Attention expectation]({folder}/expectation.png)

## What this does not say

A model of this size learns to find keys because half of what it reads are texts with keys, and how well depends on the
seed: table 17 has the lowest and the highest. The prompts are of
held-out functions; their number is small at short lengths, so samples resemble each other more than their intervals
know. Depth 0.2 of {base_length} tokens is the nearest place between two functions. Lengths beyond the base's need not
fail at once: a spectrum whose slowest pairs have all come round in training goes on for a while.
"""


def summary(findings: Findings, listed: Sequence[Condition], table: Table) -> dict[str, str]:
    """The blocks of the page that are tables of figures."""
    some = next(iter(findings.keys.values()))
    lengths, depths = sorted({length for length, _ in some}), sorted({depth for _, depth in some})

    def cells(name: str) -> list[str]:
        found = findings.keys[name]
        return [percents([fmean(found[length, depth]) for depth in depths]) for length in lengths]

    raised = findings.keys["raised"]
    quarters = [(i / 4, (i + 1) / 4) for i in range(4)] + [(1, 1.5), (1.5, 2), (2, 4)]
    shown = [edges for edges in quarters if _has(findings, *edges)]
    return {
        "table_18": table(
            ["", *(_in_tuned(length, findings) for length in lengths)],
            [[condition.title, *cells(condition.name)] for condition in listed],
        ),
        "paper_18": table(
            ["", *PAPER_LENGTHS], [[c.title, *PAPER[c.name]] for c in _PAPERS if c.name in PAPER]
        ),
        "table_17": table(
            ["tokens \\ depth", *(f"{depth:g}" for depth in depths)],
            [[f"{length:,}", *(_spread(raised[length, depth]) for depth in depths)] for length in lengths],
        ),
        "effective": table(
            ["", "tokens"], [[c.title, _effective(findings, c.name, lengths, depths)] for c in listed]
        ),
        "losses": table(
            ["nats a token at", *(f"{low:g}–{high:g} T" for low, high in shown)],
            [[c.title, *(f"{findings.loss(c.name, *edges):.3f}" for edges in shown)] for c in listed],
        ),
        "depths": ", ".join(f"{depth:g}" for depth in depths),
    }  # fmt: skip


def _in_tuned(length: int, findings: Findings) -> str:
    return f"{length:,} ({length / findings.tuned_length:g} T)"


def _spread(rates: Sequence[float]) -> str:
    return f"{100 * fmean(rates):.0f} ({100 * min(rates):.0f} to {100 * max(rates):.0f})"


def _has(findings: Findings, after: float, up_to: float) -> bool:
    try:
        findings.loss("raised", after, up_to)
    except KeyError:
        return False
    return True


def _effective(findings: Findings, name: str, lengths: Sequence[int], depths: Sequence[float]) -> str:
    found = findings.keys[name]
    reached = [n for n in lengths if fmean(rate for depth in depths for rate in found[n, depth]) >= EFFECTIVE]
    return f"{max(reached):,}" if reached else "none"


def sizes(findings: Findings, theta: float, raised: float, table: Table) -> str:
    """The miniature beside the paper's."""
    pairs = ((PAPER_BASE, (findings.base_length, theta)), (PAPER_TUNED, (findings.tuned_length, raised)))
    rows = [
        [stage, *(f"{length:,} tokens, θ {base:,.4g}: {turning_share(base, length):.1%} turn" for length, base in pair)]
        for stage, pair in zip(("start", "fine-tuned, θ raised"), pairs, strict=True)
    ]
    return table(["length, θ, and the share of pairs that come round within it", "the paper", "here"], rows)


def verdicts(heading: str, found: Sequence[Verdict], table: Table) -> str:
    """Statements with what they came to; without the paper's column where it has nothing to say."""
    if any(verdict.paper for verdict in found):
        return table([heading, "paper", "here", "holds"], [[v.text, v.paper, v.here, v.word] for v in found])
    return table([heading, "here", "reached"], [[v.text, v.here, v.word] for v in found])


def draw_keys(grids: Mapping[str, Retrieval], path: Path) -> None:
    """A heat map for each title."""
    with picture(path, width=11, height=7) as figure:
        panels = figure.subplots(2, -(-len(grids) // 2), squeeze=False).ravel()
        for axes in panels[len(grids) :]:
            axes.set_axis_off()
        for axes, (title, grid) in zip(panels, grids.items(), strict=False):
            image = heat_map(axes, grid, title)
        panels[0].set_ylabel("tokens")
        figure.colorbar(image, ax=list(panels), label="keys found")


def draw_losses(findings: Findings, listed: Sequence[Condition], path: Path) -> None:
    """Perplexity by position on logarithmic axes, a line for each condition; the fine-tuned length is dashed."""
    with picture(path) as figure:
        axes = figure.subplots()
        middles = [(start + end) / 2 for start, end in findings.bins]
        for condition in listed:
            by_bin = zip(*findings.nats[condition.name], strict=True)
            values = [torch.tensor(fmean(seeds)).exp().item() for seeds in by_bin]
            axes.plot(middles, values, ".-" if condition.tuned else ".:", label=condition.title)
        axes.axvline(findings.tuned_length, color="0.5", linestyle="--", label="fine-tuned length")
        axes.axvline(findings.base_length, color="0.5", linestyle=":", label="the start's length")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("position")
        axes.set_ylabel("perplexity")
        axes.legend(fontsize="small")


def draw_expectation(findings: Findings, listed: Sequence[Condition], path: Path) -> None:
    """g(n) / g(0) of each spectrum once, above for the sizes of the page, below for the paper's."""
    with picture(path, height=7) as figure:
        for axes, shown, tuned_length in zip(
            figure.subplots(2, 1), (listed, _PAPERS), (findings.tuned_length, PAPER_TUNED[0]), strict=True
        ):
            end = 4 * tuned_length
            step = max(1, end // _POINTS)
            # The tuned ones have every spectrum that the others have.
            for condition in (c for c in shown if c.tuned):
                scheme = spectrum(_HEAD_DIM, condition.rope_theta, condition.rope_scaling, end)
                curve = expectation(scheme.inv_freq, 0, end) / len(scheme.inv_freq)
                label = condition.title.partition(", ")[2]
                axes.plot(range(0, end, step), curve[::step].tolist(), linewidth=1, label=label)
            axes.axvline(tuned_length, color="0.5", linestyle="--")
            axes.axhline(0, color="0.5", linewidth=0.8)
            axes.set_xlabel("distance")
            axes.legend(fontsize="small")


def write(path: Path, blocks: Mapping[str, Any]) -> None:
    """The page with its blocks filled in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEMPLATE.format(**blocks), encoding="utf-8")
