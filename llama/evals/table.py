"""Figures as a person reads them: a value with its interval, and columns that stand under each other."""

from __future__ import annotations

from collections.abc import Sequence

from llama.evals.intervals import Estimate, Share


def percent(value: Share) -> str:
    return f"{value.rate:.1%} ({value.low:.1%}–{value.high:.1%})"


def number(value: Estimate) -> str:
    return f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})"


def render(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text columns as wide as their widest cell; the first is aligned left, the others right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]))
    return "\n".join(lines)
