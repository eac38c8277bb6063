"""Which theta, which factor, which scheme? Every combination is tried at every length, on one loaded checkpoint.

A spectrum is no weight: it is a few numbers from which the rotation's tables are made. So nothing is loaded again
between two cells; the model is handed another spectrum, and its tables are made anew.

A cell's figure is the loss of the last tokens of each document's beginning, seen through a window of the cell's length
that ends there. So every cell scores the very same tokens, and two cells differ in the rotation and in how far back
the model could see: a scheme that makes use of its context gets better from the left of a row to the right, and one
that breaks beyond the trained length gets worse. Every finished cell is on disk at once, and a sweep that was
interrupted goes on where it stood.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from tqdm import tqdm
from typing_extensions import Unpack

from llama.config import RopeScaling
from llama.evals.batches import batches
from llama.evals.intervals import Estimate, ratio
from llama.evals.positions import long_documents
from llama.evals.record import Record, begin
from llama.evals.sources import Source
from llama.evals.table import number, render
from llama.front import load as build
from llama.generation import Llama
from llama.longcontext.perplexity import (
    checked_lengths,
    metric,
    read_texts,
    report,
    trained_length,
)
from llama.longcontext.spectra import named, parameters
from llama.model import Transformer
from llama.options import Bases, Lengths, Loading, MaybeCount, MaybeSources, Numbers, Out, Scalings, unset
from llama.rope import Spectrum, spectrum
from llama.system import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = "sweep.cells.jsonl"
"""Of the folder of the results: what was asked, then a line for each finished cell."""
UNKNOWN = 1
"""In place of the trained context where nobody said it."""


@dataclass(frozen=True)
class Cell:
    scheme: str
    theta: float
    factor: float | None
    """None for a scheme that takes none."""
    length: int
    scaling: RopeScaling
    """The `rope_scaling` that makes it: to use the same in `Llama.build`."""
    nats_per_token: Estimate | None
    """None where the combination can't be."""
    skipped: str = ""
    """Why it can't."""


@dataclass(frozen=True)
class Sweep:
    """Intervals are over documents; all cells have the same ones, and the same draws."""

    documents: tuple[str, ...]
    last: int
    """How many tokens of each document are scored."""
    lengths: tuple[int, ...]
    cells: tuple[Cell, ...]

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        """Those of a table: the cells of each combination, one for each length."""
        n = len(self.lengths)
        return [self.cells[first : first + n] for first in range(0, len(self.cells), n)]

    def best(self, length: int) -> Cell | None:
        """The cell with the lowest loss at a length."""
        measured = [(c.nats_per_token.value, c) for c in self.cells if c.length == length and c.nats_per_token]
        return min(measured, key=lambda pair: pair[0])[1] if measured else None


@contextmanager
def with_rope(model: Transformer, theta: float, scaling: RopeScaling | None) -> Iterator[None]:
    """Within the block, `model` rotates by another theta and scheme; after it, by its own again, whatever happened.

    No weight is touched. Keys that stand in the cache were rotated by the spectrum before, so the cache forgets them on
    both sides of the border; a stream that runs across it reads its tokens again. Raises ValueError, and changes
    nothing, for a scheme that can't be.
    """
    args = model.args
    spectrum(args.head_dim, theta, scaling, args.max_seq_len)
    own = args.rope_theta, args.rope_scaling
    try:
        _set_rope(model, theta, scaling)
        yield
    finally:
        _set_rope(model, *own)


def _set_rope(model: Transformer, theta: float, scaling: RopeScaling | None) -> None:
    model.args.rope_theta, model.args.rope_scaling, model._tables = theta, scaling, None
    if model.cache is not None:
        model.cache.forget()


@contextmanager
def with_slots(model: Transformer, slots: int) -> Iterator[None]:
    """Within the block, the model's own cache has `slots` slots. A dynamic spectrum is made for the slots of the
    cache, so a cell of 512 tokens must not be measured in a cache of 2,048."""
    own, model.cache = model.cache, model.new_cache(model.args.max_batch_size, slots)
    try:
        yield
    finally:
        model.cache = own


def sweep(
    llama: Llama,
    sources: Sequence[Source],
    lengths: Sequence[int],
    thetas: Sequence[float] | None = None,
    factors: Sequence[float] = (1, 2, 4),
    schemes: Sequence[str | RopeScaling] = ("default", "linear", "yarn"),
    *,
    documents: int | None = None,
    last: int | None = None,
    trained: int | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> Sweep:
    """The loss of the `last` tokens (default: half the shortest length) of the first max(lengths) tokens of each of
    `documents` (None: all that have as many), by theta (default: the model's own), factor, scheme and length.

    A scheme is a name in `llama.rope.SPECTRA`, which is tried with every factor if it takes one and gets what else it
    needs from `trained` (default: what `trained_length` knows) and `llama.longcontext.spectra.parameters`; or a whole
    `rope_scaling` such as LongRoPE's lists, taken as it is. What can't be is skipped, with the reason. The same
    spectrum under two names is measured once.

    With `out`, finished cells are kept in a file in that folder, and found there by a later call. That call may ask
    for other thetas, factors, schemes and lengths up to the longest; ValueError where it has other documents, other
    weights, or anything else that makes its cells incomparable with those kept. Raises ValueError, too, where no
    document is long enough, and where no combination can be.
    """
    model = llama.model
    asked = checked_lengths(lengths, model.args.max_seq_len)
    last = max(1, asked[0] // 2) if last is None else last
    if not 1 <= last < asked[0]:
        raise ValueError(f"the last {last} tokens, with a shortest length of {asked[0]}; give 1 to {asked[0] - 1}")
    trained = trained_length(model.args) if trained is None else trained
    bases = [model.args.rope_theta] if thetas is None else [float(theta) for theta in thetas]
    by = [float(factor) for factor in factors]
    if not (bases and by and schemes) or not all(1 < theta < math.inf for theta in bases) or min(by) <= 0:
        raise ValueError(
            f"thetas {bases}, factors {by} and schemes {list(schemes)}; give at least one of each, thetas above 1 and "
            "factors above 0"
        )
    grid = list(_grid(model, bases, by, schemes, asked, trained))
    if all(cell.skipped for cell in grid):
        raise ValueError(f"none of {len(grid)} combinations can be; the first: {grid[0].skipped}")
    read = long_documents(llama.tokenizer, sources, asked[-1], documents)
    rows = [ids[: asked[-1]] for ids in read.values()]
    kept = _Kept(llama, None if out is None else Path(out, CELLS), {"last": last, "documents": _digest(rows)})
    show = progress and llama.ranks.leads
    with tqdm(total=len(grid), desc="cells", leave=False, disable=not show) as bar:
        for length in asked:
            with with_slots(model, length):
                for cell in (cell for cell in grid if cell.length == length):
                    if not cell.skipped:
                        name = _name_of(model, cell)
                        if name not in kept.cells:
                            kept.add(name, cell, _measure(llama, cell, rows, last))
                    bar.update()
    cells = [cell if cell.skipped else replace(cell, nats_per_token=kept.cells[_name_of(model, cell)]) for cell in grid]
    return Sweep(tuple(read), last, tuple(asked), tuple(cells))


def _grid(
    model: Transformer,
    thetas: Sequence[float],
    factors: Sequence[float],
    schemes: Sequence[str | RopeScaling],
    lengths: Sequence[int],
    trained: int | None,
) -> Iterator[Cell]:
    """All cells, none of them measured. A name that isn't in the table is an error, not a cell to skip."""
    for theta in thetas:
        for scheme in schemes:
            for name, factor, scaling in _scalings(model.args.head_dim, theta, factors, scheme, trained):
                for length in lengths:
                    cell = Cell(name, theta, factor, length, scaling, None)
                    yield replace(cell, skipped=_obstacle(model, cell, trained))


def _obstacle(model: Transformer, cell: Cell, trained: int | None) -> str:
    """Why a cell can't be; "" if it can."""
    if trained is None and cell.scaling.get("original_max_position_embeddings") == UNKNOWN:
        return f"{cell.scheme} needs the trained context: give trained (--trained)"
    try:
        _spectrum_of(model, cell)
    except ValueError as error:
        return str(error)
    return ""


def _scalings(
    head_dim: int, theta: float, factors: Sequence[float], scheme: str | RopeScaling, trained: int | None
) -> Iterator[tuple[str, float | None, RopeScaling]]:
    """Name, factor and `rope_scaling`, for each factor where the scheme takes one."""
    if not isinstance(scheme, str):
        yield str(scheme.get("rope_type", scheme.get("type", "default"))), scheme.get("factor"), scheme
        return
    for factor in factors:
        scaling = parameters(scheme, head_dim, theta, factor, trained or UNKNOWN)
        if "factor" not in scaling:
            yield scheme, None, scaling
            return
        yield scheme, factor, scaling


def _spectrum_of(model: Transformer, cell: Cell) -> Spectrum:
    return spectrum(model.args.head_dim, cell.theta, cell.scaling, cell.length)


def _name_of(model: Transformer, cell: Cell) -> str:
    """What a cell is known by. Two that rotate alike have one name, whatever their schemes are called."""
    scheme = _spectrum_of(model, cell)
    numbers = [cell.length, scheme.attention_scale, *scheme.inv_freq.tolist()]
    return hashlib.blake2b(dumps(numbers).encode(), digest_size=12).hexdigest()


def _measure(llama: Llama, cell: Cell, rows: Sequence[list[int]], last: int) -> Estimate:
    """A window that ends where every cell's window ends, and begins with bos."""
    nats: list[float] = []
    ends = [[llama.tokenizer.bos_id, *ids[len(ids) - cell.length + 1 :]] for ids in rows]
    with with_rope(llama.model, cell.theta, cell.scaling):
        for batch in batches(llama, ends, "documents", progress=False):
            for details in llama.score(batch):
                nats.append(math.fsum(-p for p in details["logprobs"][-last:] if p is not None))
    return ratio(nats, [last] * len(nats))


# What is kept --------------------------------------------------------------------------------------------------------


class _Kept:
    """Finished cells, in a file where a path is given. Rank 0 reads and writes it."""

    def __init__(self, llama: Llama, path: Path | None, request: dict[str, Any]) -> None:
        request = {**request, "dtype": str(llama.model.norm.weight.dtype), "weights": _fingerprint(llama.model)}
        self.path = path if llama.ranks.leads else None
        self.cells: dict[str, Estimate] = {}
        with llama.ranks.all_ranks():
            if self.path is not None:
                lines = _read_lines(self.path, request)
                self.cells = {line["cell"]: Estimate(**line["nats_per_token"]) for line in lines}
                with replacing(self.path) as temporary:  # without a line that was torn
                    temporary.write_text("".join(dumps(line) + "\n" for line in (request, *lines)), "utf-8")
        self.cells = llama.ranks.broadcast_object(self.cells)

    def add(self, name: str, cell: Cell, found: Estimate) -> None:
        self.cells[name] = found
        if self.path is not None:
            line = {"cell": name, **asdict(cell), "nats_per_token": asdict(found)}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _read_lines(path: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished cells in a file that was made for the same request; none where there is no file."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(loads(text))
        except ValueError:
            break  # the line that was being written when the sweep was ended
    before = lines[0] if lines else {}
    differs = [key for key in request if before.get(key) != request[key]]
    if differs:
        said = ", ".join(f"{key} {before.get(key)} there, {request[key]} now" for key in differs)
        raise ValueError(
            f"{path} holds the cells of another sweep ({said}), which can't stand in one table with these: give "
            "another --out, or delete that file"
        )
    return lines[1:]


def _digest(rows: Sequence[list[int]]) -> str:
    return hashlib.blake2b(dumps(rows).encode(), digest_size=12).hexdigest()


def _fingerprint(model: Transformer) -> str:
    """Of the weights: the first numbers of each, which training changes."""
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.flatten()[:16].to('cpu', torch.float64).tolist()}".encode())
    return digest.hexdigest()


# What is written -----------------------------------------------------------------------------------------------------


def rows_of(found: Sweep) -> Iterator[dict[str, Any]]:
    """One row a cell; `n` counts documents, the units of the intervals. Skipped cells have a reason and no value."""
    for cell in found.cells:
        place = {
            "scheme": cell.scheme,
            "theta": cell.theta,
            "factor": "" if cell.factor is None else cell.factor,
            "length": cell.length,
            "last": found.last,
        }
        empty = {"metric": "nats_per_token", "n": 0, "value": "", "low": "", "high": ""}
        values = empty if cell.nats_per_token is None else metric("nats_per_token", cell.nats_per_token)
        yield {**place, **values, "rope_scaling": dumps(cell.scaling), "skipped": cell.skipped}


def label(cell: Cell) -> str:
    return f"{cell.scheme} θ {cell.theta:g}" + ("" if cell.factor is None else f" ×{cell.factor:g}")


def draw(found: Sweep, figure: Figure) -> None:
    """The heat map: a row for each combination, a column for each length; dark is good, and a dash was skipped."""
    rows = found.rows
    figure.set_size_inches(3.5 + 1.1 * len(found.lengths), 1.5 + 0.3 * len(rows))
    axes = figure.subplots()
    values = [[cell.nats_per_token.value if cell.nats_per_token else math.nan for cell in row] for row in rows]
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    middle = sum(image.get_clim()) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if value < middle else "black"
            axes.text(x, y, "–" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(found.lengths)), [str(length) for length in found.lengths])
    axes.set_yticks(range(len(rows)), [label(row[0]) for row in rows])
    axes.set_xlabel("tokens of context")
    axes.set_title(f"nats per token, the last {found.last} of {len(found.documents)} documents", fontsize="medium")
    figure.colorbar(image, ax=axes)


def _table(found: Sweep) -> list[tuple[str, ...]]:
    """A star stands behind the best of each length."""
    best = [found.best(length) for length in found.lengths]

    def shown(cell: Cell) -> str:
        if cell.nats_per_token is None:
            return "–"
        return number(cell.nats_per_token) + ("*" if any(cell is one for one in best) else " ")

    return [(label(row[0]), *(shown(cell) for cell in row)) for row in found.rows]


def command(
    *,
    sources: MaybeSources = None,
    glob: str = "*.py",
    thetas: Annotated[Bases, unset("the checkpoint's")] = (),
    factors: Numbers = (1, 2, 4),
    schemes: Scalings = ("default", "linear", "yarn"),
    lengths: Lengths = (128, 256, 512),
    documents: MaybeCount = 16,
    last: MaybeCount = None,
    trained: MaybeCount = None,
    out: Out = "longcontext",
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """The loss by theta, factor, scheme and length, in one run: OUT/sweep.csv, .json and .png.

    Finished cells are kept in OUT/sweep.cells.jsonl, so after Ctrl-C the same command goes on where it stood. More
    thetas, factors and schemes may be added; other documents or weights want another OUT.

    Args:
        sources: a text file, a folder, or a corpus.
        glob: the files of a folder that are read: *.md, say.
        thetas: bases: 1e4,1e5,1e6.
        factors: by how much the schemes stretch: 1,2,4.
        schemes: names of the table in rope.py, FILE.py:FUNCTION for one of your own, or a whole rope_scaling.
        lengths: tokens of context: 256,512,2048.
        documents: how many of those that are long enough, chosen by a hash of their paths (none: all).
        last: how many tokens of each are scored (none: half the shortest length).
        trained: the context the model was trained on, which yarn and others need (none: what its files say).
        out: the folder of the results.
        json: print JSON instead of the table.
    """
    started, names, texts = begin(out), named(schemes), read_texts(sources, glob)
    options: Loading = {"max_seq_len": max(lengths, default=2), **loading}
    llama = build(**options)
    limits: dict[str, Any] = {"documents": documents, "last": last, "trained": trained, "out": out, "progress": True}
    try:
        found = sweep(llama, texts, lengths, thetas or None, factors, names, **limits)
    except KeyboardInterrupt:
        if llama.ranks.leads:
            print(f"stopped; the same command goes on from {Path(out, CELLS)}", file=sys.stderr)
        raise
    made_of: dict[str, Any] = {"sources": sources, "glob": glob, "trained": trained, "last": found.last}
    made_of |= {"documents": found.documents, "options": loading}
    record = Record("sweep", list(rows_of(found)), {**made_of, "cells": CELLS})
    header = ("nats per token (* the best)", *(str(length) for length in found.lengths))
    table = render(header, _table(found))
    report(llama, record, out, started, table, lambda figure: draw(found, figure), json)
