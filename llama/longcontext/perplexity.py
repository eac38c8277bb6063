"""What context is worth, asked twice: the loss by a token's place, and perplexity by the length of the window.

The loss by position comes from one pass over each document, which gives every length at once: the token at position p
has seen p tokens. Sliding windows answer another question: the same tokens, each scored once, with no more than a
window of `length` tokens before them; so two lengths differ in what the model could see, and in nothing else.

Three mistakes are common in such figures, and none can be made here. Windows are never averaged: losses are summed
over all tokens and divided by their number, since a mean of windows gives the tokens of a short one more weight. All
lengths have the same documents, those that are long enough for the longest. And as most tokens need no long context,
plain perplexity hardly tells a model that uses it from one that can't: so the tokens that do need it are measured by
themselves too (LongPPL, arXiv 2410.23771).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from llama.config import ModelArgs
from llama.evals.cli import read_sources
from llama.evals.compression import Losses, default_stride, losses_of
from llama.evals.intervals import Estimate, ratio
from llama.evals.positions import Positions, long_documents, loss_by_position
from llama.evals.record import Record, begin, save_record, tell
from llama.evals.sources import File, Source
from llama.evals.table import number, render
from llama.front import load as build
from llama.generation import Llama
from llama.options import Count, Lengths, Loading, MaybeCount, MaybeSources, Out, existing, spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAIN, CEILING = 2.0, 2.0
"""A key token's loss is this much lower with the long context than with the short one, and below this ceiling."""

ENOUGH = 5
"""Documents that longer windows must be worse on before anyone is warned: fewer agree by chance too often."""


@dataclass(frozen=True)
class Window:
    """Perplexity with windows of `length` tokens, bos included, that begin `stride` tokens apart. Intervals are over
    documents, with the same draws at every length."""

    length: int
    stride: int
    nats_per_token: Estimate
    saved: Estimate
    """Nats per token less than with the shortest window, of the same tokens."""
    key_nats_per_token: Estimate | None
    """Of the key tokens alone; None where there are none."""

    @property
    def perplexity(self) -> Estimate:
        return _exponential(self.nats_per_token)

    @property
    def key_perplexity(self) -> Estimate | None:
        """LongPPL."""
        return None if self.key_nats_per_token is None else _exponential(self.key_nats_per_token)


@dataclass(frozen=True)
class Perplexity:
    documents: tuple[str, ...]
    tokens: int
    """Of all documents: each is scored once at every length."""
    key_tokens: int
    windows: tuple[Window, ...]
    positions: Positions
    """The loss by position, up to the longest length."""


def perplexity(
    llama: Llama,
    sources: Sequence[Source],
    lengths: Sequence[int],
    *,
    stride: int | None = None,
    bins: int = 16,
    documents: int | None = None,
    tokens: int | None = None,
    trained: int | None = None,
    evaluator: Llama | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of the documents that have as many tokens as the longest of `lengths`, and their loss by position.

    Windows begin `stride` tokens apart (default: half a window). `documents` takes that many, by a hash of their
    paths, and `tokens` no more than so many of each (default: whole documents). Key tokens are those that the longest
    window helps against the shortest, by the judgement of `evaluator`, a model with the same tokenizer. By default it
    is this one with its best window, which flatters it at that length: compare models by one evaluator.

    Warns where a length is beyond `trained` (default: what `trained_length` knows), and where longer windows are
    worse. Raises ValueError where no document is long enough, and for lengths and strides that can't be.
    """
    asked = checked_lengths(lengths, llama.model.args.max_seq_len)
    trained = trained_length(llama.model.args) if trained is None else trained
    if tokens is not None and tokens < asked[-1]:
        raise ValueError(f"{tokens} tokens of each document; give at least the longest length, {asked[-1]}")
    read = long_documents(llama.tokenizer, sources, asked[-1], documents)
    texts = [ids[1:tokens] for ids in read.values()]  # without bos: each window has its own
    warn_beyond(asked[-1], trained)
    found = {length: losses_of(llama, texts, length, stride, progress) for length in asked}
    keys = _keys_by(llama if evaluator is None else evaluator, llama, texts, asked, stride, found, progress)
    chosen = [source for source in sources if source.path in read]
    return Perplexity(
        tuple(read),
        sum(map(len, texts)),
        int(sum(mask.sum() for mask in keys)),
        _windows(found, stride, keys, trained),
        loss_by_position(llama, chosen, asked[-1], bins, progress=progress),
    )


def key_tokens(long: Losses, short: Losses) -> NDArray[np.bool_]:
    """Which tokens need a long context, by their losses with a long and a short one: those that gain more than 2 nats
    by it and cost less than 2 with it (arXiv 2410.23771, alpha = 2 and beta = -2)."""
    return (short - long > GAIN) & (long < CEILING)


def _keys_by(
    evaluator: Llama,
    llama: Llama,
    texts: Sequence[list[int]],
    asked: Sequence[int],
    stride: int | None,
    found: Mapping[int, Sequence[Losses]],
    progress: bool,
) -> list[NDArray[np.bool_]]:
    """The key tokens of each text. The evaluated model's own losses are there already."""
    short, long = asked[0], asked[-1]
    if evaluator is llama:
        # Its longest window may be beyond what it was trained on: what that one helps, it helps by chance.
        long = min(found, key=lambda length: math.fsum(map(math.fsum, found[length])))
        return [key_tokens(*pair) for pair in zip(found[long], found[short], strict=True)]
    own, others = (one.tokenizer.sp_model.serialized_model_proto() for one in (llama, evaluator))
    if own != others:
        raise ValueError("the evaluator has another tokenizer, so its key tokens are none of this model's: give one")
    longs, shorts = (losses_of(evaluator, texts, length, stride, progress) for length in (long, short))
    return [key_tokens(*pair) for pair in zip(longs, shorts, strict=True)]


def _windows(
    found: Mapping[int, Sequence[Losses]],
    stride: int | None,
    keys: Sequence[NDArray[np.bool_]],
    trained: int | None,
) -> tuple[Window, ...]:
    sums = {length: [math.fsum(loss) for loss in losses] for length, losses in found.items()}
    shortest, best = min(sums), min(sums, key=lambda length: math.fsum(sums[length]))
    counts, key_counts = [len(mask) for mask in keys], [int(mask.sum()) for mask in keys]

    def saved(length: int, before: int) -> Estimate:
        return ratio([b - a for a, b in zip(sums[length], sums[before], strict=True)], counts)

    worse = [length for length in sums if length > best and saved(length, best).high < 0]
    if worse and trained is None and len(counts) >= ENOUGH:
        warnings.warn(
            f"the same tokens cost more with a context of {worse[0]} than with one of {best}, the best of these: the "
            f"model seems to have been trained on less. {advice(worse[-1], best)}",
            stacklevel=3,
        )
    results = []
    for length, losses in found.items():
        of_keys = [math.fsum(loss[mask]) for loss, mask in zip(losses, keys, strict=True)]
        per_key = ratio(of_keys, key_counts) if sum(key_counts) else None
        per_token = ratio(sums[length], counts)
        results.append(Window(length, default_stride(length, stride), per_token, saved(length, shortest), per_key))
    return tuple(results)


def _exponential(nats: Estimate) -> Estimate:
    return Estimate(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high), nats.n)


# Documents and lengths -----------------------------------------------------------------------------------------------


def read_texts(sources: str | None = None, glob: str = "*.py") -> list[Source]:
    """A file, whatever its name; every file of a folder whose name matches `glob`, at any depth; the held-out packages
    of a corpus; by default the files that `codellama train` holds out of the standard library.

    Files that are not UTF-8, or empty, are left out. Raises ValueError where none is left.
    """
    if sources is None or Path(sources, "corpus.json").is_file():
        return list(read_sources(sources))
    root = Path(sources)
    if not root.exists():
        raise ValueError(f"there is no file or folder {root}; give a text file, or a folder with texts in it")
    found: list[Source] = []
    for path in [root] if root.is_file() else sorted(path for path in root.rglob(glob) if path.is_file()):
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            found.append(File(path.name if path == root else path.relative_to(root).as_posix(), text))
    if not found:
        raise ValueError(f"{root} holds no text in UTF-8 in files that match {glob}; give others, or another --glob")
    return found


def checked_lengths(lengths: Sequence[int], room: int) -> list[int]:
    """Each once, the shortest first. Raises ValueError where there is none, or one that can't be."""
    if not lengths or not all(length == int(length) and 2 <= length <= room for length in lengths):
        raise ValueError(
            f"lengths {list(lengths)}; give at least one, each a whole number of 2 to {room} tokens, or build with a "
            "larger max_seq_len"
        )
    return sorted({int(length) for length in lengths})


# The trained context -------------------------------------------------------------------------------------------------


def trained_length(args: ModelArgs) -> int | None:
    """The context that a checkpoint's own `rope_scaling` says it is for; None where it says nothing, as in Meta's
    files."""
    scaling = args.rope_scaling or {}
    trained = scaling.get("original_max_position_embeddings")
    return None if trained is None else int(trained * scaling.get("factor", 1))


def advice(length: int, trained: int) -> str:
    """What to try for a context of `length` with a model that was trained on `trained` tokens."""
    factor = max(2, math.ceil(length / trained))
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    return (
        f"Try --rope_scaling '{dumps(scaling)}', a larger --rope_theta, or all of them by "
        f"`codellama longcontext sweep --trained {trained}`"
    )


def warn_beyond(length: int, trained: int | None) -> None:
    """A warning, with the scheme to try, where `length` is more than the model was trained on."""
    if trained is not None and length > trained:
        warnings.warn(
            f"a context of {length} tokens is beyond the {trained} that the model was trained on. "
            f"{advice(length, trained)}",
            stacklevel=3,
        )


# What is written -----------------------------------------------------------------------------------------------------


def rope_of(args: ModelArgs) -> dict[str, Any]:
    """The columns that every table of this room begins with: scheme, theta, factor."""
    scaling = args.rope_scaling or {}
    name = scaling.get("rope_type", scaling.get("type", "default"))
    return {"scheme": name, "theta": args.rope_theta, "factor": scaling.get("factor", "")}


def metric(name: str, found: Estimate) -> dict[str, Any]:
    """The columns that every row ends with."""
    return {"metric": name, "n": found.n, "value": found.value, "low": found.low, "high": found.high}


def rows_of(found: Perplexity, args: ModelArgs) -> Iterator[dict[str, Any]]:
    """One row a figure; `n` counts documents, the units of the intervals. Rows of windows have no start and end, rows
    of positions no stride."""
    for window in found.windows:
        place = {**rope_of(args), "length": window.length, "stride": window.stride, "start": "", "end": ""}
        yield {**place, "tokens": found.tokens, **metric("nats_per_token", window.nats_per_token)}
        yield {**place, "tokens": found.tokens, **metric("perplexity", window.perplexity)}
        yield {**place, "tokens": found.tokens, **metric("nats_saved_per_token", window.saved)}
        if window.key_perplexity is not None:
            yield {**place, "tokens": found.key_tokens, **metric("longppl", window.key_perplexity)}
    for b in found.positions.bins:
        place = {**rope_of(args), "length": found.positions.length, "stride": "", "start": b.start, "end": b.end}
        place["tokens"] = (b.end - b.start) * len(found.documents)
        yield {**place, **metric("nats_per_token", b.nats_per_token)}
        yield {**place, **metric("bits_per_byte", b.bits_per_byte)}


def draw(found: Perplexity, figure: Figure) -> None:
    """Left, the loss by position; right, perplexity by the window's length; both with their intervals."""
    figure.set_size_inches(10, 4.5)
    left, right = figure.subplots(1, 2)
    middles = [(b.start + b.end - 1) / 2 for b in found.positions.bins]
    losses = [b.nats_per_token for b in found.positions.bins]
    left.plot(middles, [loss.value for loss in losses], marker=".")
    left.fill_between(middles, [loss.low for loss in losses], [loss.high for loss in losses], alpha=0.2)
    left.set_xlabel("position")
    left.set_ylabel("nats per token")
    left.set_title(f"{len(found.documents)} documents, one pass each")
    lengths = [window.length for window in found.windows]
    of_keys = [window.key_perplexity for window in found.windows if window.key_perplexity is not None]
    of_all = [window.perplexity for window in found.windows]
    for label, values in {"all tokens": of_all, f"{found.key_tokens} key tokens": of_keys}.items():
        if values:
            at = [value.value for value in values]
            right.errorbar(lengths, at, error_bars(values), marker="o", capsize=3, label=label)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(lengths, [str(length) for length in lengths])
    right.set_xlabel("tokens of a window")
    right.set_ylabel("perplexity")
    right.set_title("sliding windows, the same tokens")
    right.legend()


def error_bars(values: Sequence[Estimate]) -> list[list[float]]:
    """How far the intervals reach down and up, as matplotlib wants it."""
    return [[max(0.0, v.value - v.low) for v in values], [max(0.0, v.high - v.value) for v in values]]


def report(
    llama: Llama,
    record: Record,
    out: str,
    started: float,
    table: str,
    draw: Callable[[Figure], None],
    as_json: bool = False,
) -> None:
    """Rank 0 writes the record's files, and prints a table for people or a line of JSON for programs."""
    if llama.ranks.leads:
        save_record(record, out, started, llama, draw)
        tell(table, {"measure": record.name, "out": out, **record.made_of, "rows": list(record.rows)}, as_json)


def command(
    *,
    sources: MaybeSources = None,
    glob: str = "*.py",
    lengths: Lengths = (128, 256, 512),
    stride: MaybeCount = None,
    bins: Count = 16,
    documents: MaybeCount = 16,
    tokens: MaybeCount = None,
    trained: MaybeCount = None,
    evaluator: Annotated[str | None, spec("PATH", existing)] = None,
    out: Out = "longcontext",
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Loss by position, and perplexity by the length of a sliding window: OUT/perplexity.csv, .json and .png.

    Args:
        sources: a text file, a folder, or a corpus.
        glob: the files of a folder that are read: *.md, say.
        lengths: tokens of a window: 256,512,2048. Documents have at least as many as the longest.
        stride: how many tokens apart the windows begin (none: half a window).
        bins: into how many parts the positions are divided.
        documents: how many of those that are long enough, chosen by a hash of their paths (none: all).
        tokens: how many of each document's are read (none: all).
        trained: the context the model was trained on, where its files don't say: lengths beyond it are warned of.
        evaluator: a checkpoint whose judgement says which tokens need a long context (none: the model's own).
        out: the folder of the results.
        json: print JSON instead of the table.
    """
    started, texts = begin(out), read_texts(sources, glob)
    options: Loading = {"max_seq_len": max(lengths, default=2), **loading}
    llama = build(**options)
    judging: Loading = options if evaluator is None else {**options, "ckpt_dir": evaluator}
    judge = None if evaluator is None else build(**judging)
    found = perplexity(
        llama,
        texts,
        lengths,
        stride=stride,
        bins=bins,
        documents=documents,
        tokens=tokens,
        trained=trained,
        evaluator=judge,
        progress=True,
    )
    rows: list[tuple[str, ...]] = [
        (
            str(window.length),
            str(window.stride),
            number(window.perplexity),
            number(window.saved),
            "" if window.key_perplexity is None else number(window.key_perplexity),
        )
        for window in found.windows
    ]
    made_of = {
        "sources": sources,
        "glob": glob,
        "tokens": tokens,
        "trained": trained,
        "evaluator": evaluator,
        "documents": found.documents,
        "options": options,
    }
    header = ("window", "stride", "perplexity", "nats per token saved", f"of {found.key_tokens} key tokens")
    record = Record("perplexity", list(rows_of(found, llama.model.args)), made_of)
    report(llama, record, out, started, render(header, rows), lambda figure: draw(found, figure), json)
