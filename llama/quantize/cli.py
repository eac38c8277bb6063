"""The room's command: `codellama quantize SRC DST --scheme int4`, and `codellama quantize --report [CKPT …]`.

The first writes a checkpoint in fewer bits, the second measures what that loses and prints a table for people and, as
its last line, JSON for programs. Under torchrun every rank measures; rank 0 prints and writes.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fire.decorators import SetParseFns

from llama.checkpoint import open_checkpoint
from llama.evals.cli import read_sources
from llama.evals.record import Record, save_record
from llama.evals.sources import choose_files
from llama.evals.table import render
from llama.front import load as build
from llama.generation import EMBEDDED
from llama.quantize.report import Loss, draw, losses, possible, read_texts
from llama.quantize.saved import quantize_checkpoint
from llama.quantize.schemes import scheme_of

MEASURED = ("int8", "int8-dynamic", "int4:32", "int4:64", "int4:128", "int4-dynamic:32", "nf4")


@SetParseFns(str, scheme=str, report=str, schemes=str, sources=str, out=str)  # type: ignore[untyped-decorator]
def command(
    *paths: str,
    scheme: str = "int4",
    group: int | None = None,
    report: str | None = None,
    schemes: str | None = None,
    sources: str | None = None,
    files: int = 64,
    tokens: int | None = None,
    out: str | None = None,
    **options: Any,
) -> None:
    """Writes the checkpoint SRC, of any format, in 8 or 4 bits as a new folder DST: codellama quantize SRC DST.
    Or measures what each scheme loses: codellama quantize --report [CKPT …].

    Args:
        paths: SRC and DST; with --report the checkpoints (default: the embedded one).
        scheme: int8, int4 or nf4 (needs bitsandbytes).
        group: weights of a row that share a scale, with int4: 32 (default), 64 or 128.
        report: measure instead of writing.
        schemes: which to measure: int8,int4:64 (default: all that can be).
        sources: a folder of .py files, or a corpus (default: held-out files of the standard library).
        files: how many of them, chosen by a hash of their paths.
        tokens: of each file, from its beginning (default: all).
        out: a folder for quantize.csv, .json and .png.
        options: with --report, those of Llama.build: --max_seq_len --max_batch_size --device …
    """
    paths = tuple(map(str, paths))  # fire takes 2 for a number
    if report is None:
        _write(paths, scheme, group, {"schemes": schemes, "sources": sources, "out": out, **options})
        return
    # fire takes the first checkpoint for the flag's value.
    first = () if report == "True" else (report,)
    words = MEASURED if schemes is None else schemes.split(",")
    _report([*first, *paths] or [str(EMBEDDED)], words, schemes is None, sources, files, tokens, out, options)


def _write(paths: tuple[str, ...], scheme: str, group: int | None, others: dict[str, Any]) -> None:
    unknown = [name for name, value in others.items() if value is not None]
    if unknown:
        raise ValueError(f"--{unknown[0]} goes with --report; to write there are --scheme and --group")
    if len(paths) != 2:
        raise ValueError(f"{len(paths)} paths; give SRC and DST, or --report and checkpoints to measure")
    chosen = scheme_of(scheme, group)
    quantize_checkpoint(*paths, chosen, progress=True)
    size = sum(path.stat().st_size for path in Path(paths[1]).glob("*.pth"))
    print(f"{paths[1]}: written as {chosen}, {size:,} bytes; run it with --ckpt_dir {paths[1]}")


def _report(
    paths: list[str],
    words: tuple[str, ...] | list[str],
    only_possible: bool,
    sources: str | None,
    files: int,
    tokens: int | None,
    out: str | None,
    options: dict[str, Any],
) -> None:
    started = time.monotonic()
    chosen = [scheme_of(word) for word in words]
    rows: list[dict[str, Any]] = []
    for path in paths:
        llama = build(**{**options, "ckpt_dir": path, "dtype": "bfloat16"})
        texts = read_texts(llama, choose_files(read_sources(sources), files), most=tokens)
        able = [scheme for scheme in chosen if not only_possible or possible(scheme, llama.model)]
        found = losses(llama, open_checkpoint(path), able, texts, progress=True)
        rows += [_row(path, loss, sum(map(len, texts.sequences))) for loss in found]
        if llama.ranks.leads:
            print(f"{path}: {len(texts.sequences)} files, {rows[-1]['tokens']:,} tokens")
            print(_table(found))
    if llama.ranks.leads:
        asked = {"sources": sources, "files": files, "tokens": tokens, **options}
        if out is not None:
            save_record(Record("quantize", rows, asked), out, started, llama, partial(draw, rows=rows))
        print(json.dumps({"measure": "quantize", **asked, "rows": rows}, default=str))


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
