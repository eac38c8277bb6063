"""A picture of a run: the losses of its log, and the learning rate, by the tokens trained on."""

from __future__ import annotations

import csv
from pathlib import Path

from llama.system import replacing

_WINDOW = 20
"""Steps that a point of the training loss is the mean of."""


def draw(log: Path, out: Path, title: str) -> None:
    """Draws a log.csv as a PNG. Raises ImportError, with what to do, where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves are drawn by matplotlib: pip install 'codellama[plot]'") from error
    with open(log, newline="", encoding="utf-8") as file:
        entries = list(csv.DictReader(file))
    tokens, losses = ([float(entry[name]) for entry in entries] for name in ("tokens", "loss"))
    smooth = [sum(losses[max(0, i - _WINDOW + 1) : i + 1]) / min(i + 1, _WINDOW) for i in range(len(losses))]
    held_out = [(float(e["tokens"]), float(e["held_out_loss"])) for e in entries if e["held_out_loss"]]
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot(tokens, losses, color="0.8", linewidth=0.7)
    above.plot(tokens, smooth, label=f"training, mean of {_WINDOW} steps")
    above.plot(*zip(*held_out, strict=True), "o-", label="held out") if held_out else None
    above.set(title=title, ylabel="nats a token")
    above.legend()
    below.plot(tokens, [float(entry["lr"]) for entry in entries])
    below.set(xlabel="tokens", ylabel="learning rate", ylim=(0, None))
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
