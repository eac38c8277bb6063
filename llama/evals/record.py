"""What a measurement leaves: a tidy table, all that made it, and a picture.

Every figure stands in one row of one CSV, so that results of many runs can be joined and plotted by anything. The JSON
beside it says what made them: the model's numbers, the options, the seed, the dtype, the commit, the wall time. What
people would rather see than read is drawn, by matplotlib (extra `[plot]`), on a figure of its own: no global state.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llama.generation import Llama
from llama.options import folder
from llama.system import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL = "pip install matplotlib"


@dataclass(frozen=True)
class Record:
    """A finished measurement. Every row has the same keys, in the same order: the columns."""

    name: str
    """Of the files: NAME.csv, NAME.json, NAME.png."""
    rows: Sequence[Mapping[str, Any]]
    made_of: Mapping[str, Any] = field(default_factory=dict)
    """What was asked: options, seeds, sources."""


def origin(llama: Llama | None = None) -> dict[str, Any]:
    """Where figures come from: model, dtype, ranks, versions, commit, time."""
    found: dict[str, Any] = {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if llama is not None:
        weight = llama.model.norm.weight
        found |= {
            "model": asdict(llama.model.args),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "ranks": llama.ranks.world_size,
        }
    return found


def commit() -> str | None:
    """The commit of this package's working tree, with a + where files differ from it; None where it is no such tree."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def begin(out: str | Path | None, draws: bool = True) -> float:
    """The time at which a measurement begins whose results go to OUT (None: nowhere). What would spoil them is said
    now: ValueError where OUT can't be written to, and a warning where there is no matplotlib to draw with."""
    if out is not None:
        folder(str(out))
        if draws and not drawable():
            warnings.warn(f"nothing will be drawn in {out}, since matplotlib is missing: {INSTALL}", stacklevel=2)
    return time.monotonic()


def drawable() -> bool:
    """Whether there is matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


def tell(text: str, values: Mapping[str, Any], as_json: bool) -> None:
    """Prints a table for people, or the same as a line of JSON for programs."""
    print(json.dumps(values, default=str) if as_json else text, flush=True)


def save_record(
    record: Record,
    out: str | Path,
    started: float,
    llama: Llama | None = None,
    draw: Callable[[Figure], None] | None = None,
) -> None:
    """Writes OUT/NAME.csv, .json and, where there is something to draw and matplotlib to draw with, .png. `started` is
    what `begin` returned. Call it on one rank. Raises ValueError for a record without rows."""
    if not record.rows:
        raise ValueError(f"{record.name} has no rows: nothing was measured")
    place = Path(out)
    with (
        replacing(place / f"{record.name}.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(record.rows[0]))
        writer.writeheader()
        writer.writerows(record.rows)
    facts = {**origin(llama), "seconds": round(time.monotonic() - started, 2), **record.made_of}
    with replacing(place / f"{record.name}.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
    if draw is not None and drawable():
        with picture(place / f"{record.name}.png") as figure:
            draw(figure)


@contextmanager
def picture(path: Path, width: float = 8, height: float = 4.5) -> Iterator[Figure]:
    """A matplotlib figure, written as PNG when the block ends. ValueError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"{path.name} is drawn by matplotlib: {INSTALL}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
