"""The room's command: `codellama quantize SRC DST --scheme int4`, and `codellama quantize --report [CKPT …]`.

The first writes a checkpoint in fewer bits, the second measures what that loses and prints a table for people or, with
--json, JSON for programs. Under torchrun every rank measures; rank 0 prints and writes.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Unpack

from llama.checkpoint import open_checkpoint
from llama.evals.cli import read_sources
from llama.evals.record import Record, begin, save_record, tell
from llama.evals.sources import choose_files
from llama.evals.table import render
from llama.front import load as build
from llama.generation import EMBEDDED
from llama.options import (
    Count,
    Loading,
    MaybeCount,
    MaybeOut,
    MaybeSources,
    Positional,
    Quantize,
    Schemes,
    unset,
)
from llama.quantize.report import Loss, draw, losses, possible, read_texts
from llama.quantize.saved import quantize_checkpoint
from llama.quantize.schemes import scheme_of

MEASURED = ("int8", "int8-dynamic", "int4:32", "int4:64", "int4:128", "int4-dynamic:32", "nf4")


def command(
    paths: Annotated[Positional[tuple[str, ...]], unset("with --report the embedded checkpoint")] = (),
    *,
    scheme: Quantize = "int4",
    group: MaybeCount = None,
    report: bool = False,
    schemes: Annotated[Schemes, unset("all that can be")] = (),
    sources: MaybeSources = None,
    files: Count = 64,
    tokens: MaybeCount = None,
    out: MaybeOut = None,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Writes the checkpoint SRC, of any format, in 8 or 4 bits as a new folder DST: codellama quantize SRC DST.
    Or measures what each scheme loses: codellama quantize --report [CKPT …].

    Args:
        paths: SRC and DST; with --report the checkpoints.
        scheme: int8, int4 or nf4 (needs bitsandbytes).
        group: weights of a row that share a scale, with int4: 32 (as with none), 64 or 128.
        report: measure instead of writing.
        schemes: which to measure: int8,int4:64.
        sources: a folder of .py files, or a corpus.
        files: how many of them, chosen by a hash of their paths.
        tokens: of each file, from its beginning (none: all).
        out: a folder for quantize.csv, .json and .png.
        json: print JSON instead of the tables.
    """
    if not report:
        measuring = {"schemes": schemes or None, "sources": sources, "out": out, "tokens": tokens, **loading}
        _write(paths, scheme, group, [name for name, value in measuring.items() if value is not None])
        return
    taken = [name for name in ("ckpt_dir", "dtype", "quantize") if name in loading]
    if taken:
        raise ValueError(f"--{taken[0]} with --report: give checkpoints as CKPT …, and --schemes; they are in bfloat16")
    chosen = [scheme_of(word) for word in schemes or MEASURED]
    started, sample = begin(out), choose_files(read_sources(sources), files)
    rows: list[dict[str, Any]] = []
    shown: list[str] = []
    for path in paths or (str(EMBEDDED),):
        given: Loading = {**loading, "ckpt_dir": path, "dtype": "bfloat16"}
        llama = build(**given)
        texts = read_texts(llama, sample, most=tokens)
        able = [one for one in chosen if schemes or possible(one, llama.model)]
        found = losses(llama, open_checkpoint(path), able, texts, progress=True)
        rows += [_row(path, loss, sum(map(len, texts.sequences))) for loss in found]
        shown.append(f"{path}: {len(texts.sequences)} files, {rows[-1]['tokens']:,} tokens\n{_table(found)}")
    if llama.ranks.leads:
        asked = {"sources": sources, "files": files, "tokens": tokens, **loading}
        if out is not None:
            save_record(Record("quantize", rows, asked), out, started, llama, partial(draw, rows=rows))
        tell("\n".join(shown), {"measure": "quantize", **asked, "rows": rows}, json)


def _write(paths: tuple[str, ...], scheme: str, group: int | None, others: list[str]) -> None:
    if others:
        raise ValueError(f"--{others[0]} goes with --report; to write there are --scheme and --group")
    if len(paths) != 2:
        raise ValueError(f"{len(paths)} paths; give SRC and DST, or --report and checkpoints to measure")
    chosen = scheme_of(scheme, group)
    quantize_checkpoint(*paths, chosen, progress=True)
    size = sum(path.stat().st_size for path in Path(paths[1]).glob("*.pth"))
    print(f"{paths[1]}: written as {chosen}, {size:,} bytes; run it with --ckpt_dir {paths[1]}")


def _row(path: str, loss: Loss, tokens: int) -> dict[str, Any]:
    values = asdict(loss)
    change = values.pop("change")
    interval = {"change": change["value"], "low": change["low"], "high": change["high"]}
    return {"checkpoint": path, **values, **interval, "files": change["n"], "tokens": tokens}


def _table(found: list[Loss]) -> str:
    header = ("", "bytes", "bits a weight", "perplexity", "against bfloat16", "largest logit error")
    rows = []
    for loss in found:
        change = f"{loss.change.value:+.3%} ({loss.change.low:+.3%} to {loss.change.high:+.3%})"
        cells = f"{loss.size:,}", f"{loss.bits:.2f}", f"{loss.perplexity:.4f}", change, f"{loss.logit_error:.3f}"
        rows.append((loss.scheme, *cells))
    return render(header, rows)
