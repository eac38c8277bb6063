"""The report's pictures, as PNG, by matplotlib (extra `[plot]`)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama.system import replacing
from llama.train.report.measurements import Figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW = 50
"""Steps that a point of the training loss is the mean of."""


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the report's plots are drawn by matplotlib: pip install 'codellama[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def losses(logs: dict[str, Path], path: Path) -> None:
    """The loss of every stage by the tokens read, one stage after the other. They read different mixtures, so the
    training losses jump between stages; held-out text is plain files for all, in rows as long as the stage's."""
    figure = _figure(9, 4.5)
    axes = figure.subplots()
    before = 0.0
    for color, (stage, log) in enumerate(logs.items()):
        with open(log, newline="", encoding="utf-8") as file:
            entries = list(csv.DictReader(file))
        tokens = [before + float(entry["tokens"]) for entry in entries]
        values = [float(entry["loss"]) for entry in entries]
        smooth = [sum(values[max(0, i - _WINDOW + 1) : i + 1]) / min(i + 1, _WINDOW) for i in range(len(values))]
        held = [(at, float(e["held_out_loss"])) for at, e in zip(tokens, entries, strict=True) if e["held_out_loss"]]
        axes.plot(tokens, smooth, color=f"C{color}", linewidth=1, label=f"{stage}, training")
        if held:
            axes.plot(*zip(*held, strict=True), ".-", color=f"C{color}", alpha=0.5, label=f"{stage}, held out")
        before = tokens[-1]
    axes.set(xlabel="tokens", ylabel="nats a token", title="Loss")
    axes.legend(ncols=len(logs))
    _save(figure, path)


def positions(stages: dict[str, Figures], base_length: int, path: Path) -> None:
    """Bits a byte by position in the document, a line for each stage, with its interval over documents."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    for color, (stage, found) in enumerate(stages.items()):
        middles = [(bin_["start"] + bin_["end"]) / 2 for bin_ in found["bins"]]
        bits = [bin_["bits_per_byte"] for bin_ in found["bins"]]
        axes.plot(middles, [bit["value"] for bit in bits], ".-", color=f"C{color}", label=f"after {stage}")
        low, high = [bit["low"] for bit in bits], [bit["high"] for bit in bits]
        axes.fill_between(middles, low, high, color=f"C{color}", alpha=0.15)
    axes.axvline(base_length, color="0.5", linestyle=":", label="length in base")
    axes.set(xlabel="position", ylabel="bits a byte", title="What context is worth, before and after the long stage")
    axes.legend()
    _save(figure, path)


def retrieval(stages: dict[str, Figures], path: Path) -> None:
    """Heat maps of found keys, length by depth, one for each stage."""
    figure = _figure(3.2 * len(stages) + 0.8, 2.8)
    maps: Sequence[Figures] = list(stages.values())
    all_axes = figure.subplots(1, len(stages), squeeze=False)[0]
    image = None
    for axes, stage, found in zip(all_axes, stages, maps, strict=True):
        rates = {(cell["length"], cell["depth"]): cell["found"]["rate"] for cell in found["cells"]}
        grid = [[rates[length, depth] for depth in found["depths"]] for length in found["lengths"]]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set(title=f"after {stage}", xlabel="depth")
        axes.set_xticks(range(len(found["depths"])), [f"{depth:g}" for depth in found["depths"]])
        axes.set_yticks(range(len(found["lengths"])), [f"{length:,}" for length in found["lengths"]])
        for y, row in enumerate(grid):
            for x, rate in enumerate(row):
                axes.text(x, y, f"{rate:.0%}", ha="center", va="center", color="black" if rate > 0.6 else "white")
    all_axes[0].set_ylabel("tokens")
    if image is not None:
        figure.colorbar(image, ax=list(all_axes), label="keys found")
    _save(figure, path)


def packages(compression: Figures, path: Path) -> None:
    """Bits a byte by package, model beside xz."""
    figure = _figure(9, 4)
    axes = figure.subplots()
    found = [*compression["packages"], compression["total"]]
    for shift, (key, label) in enumerate(
        (("xz_bits", "xz -9e, file by file"), ("solid_xz_bits", "xz -9e, one archive"), ("model_bits", "this model"))
    ):
        heights = [package[key] / package["bytes"] for package in found]
        axes.bar([at + 0.27 * (shift - 1) for at in range(len(found))], heights, width=0.26, label=label)
    axes.set_xticks(range(len(found)), [package["name"] for package in found], rotation=30, ha="right")
    axes.set(ylabel="bits a byte", title="Packages that were held out")
    axes.legend()
    _save(figure, path)
