"""The room's commands: `codellama evals compression`, `positions`, `functions`, `lines` and `retrieval`.

Each builds a Llama, measures it on a folder of Python files, and prints a table for people and, last, one line of
JSON for programs. Under torchrun every rank measures; rank 0 prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama.evals.compression import compression
from llama.evals.functions import complete_functions
from llama.evals.lines import Order, infill_lines
from llama.evals.positions import loss_by_position
from llama.evals.retrieval import DEPTHS, retrieval
from llama.evals.sources import Source, choose_files, read_folder
from llama.evals.table import number, percent, render
from llama.front import load as build
from llama.generation import Llama
from llama.train.collection import TOTALS, read_documents
from llama.train.corpus import read_corpus


def read_sources(sources: str | None) -> list[Source]:
    """The held-out files of a corpus made by `codellama train corpus`; every .py file of any other folder; by default
    what `codellama train` holds out of the standard library."""
    if sources is None:
        return [source for source in read_corpus() if source.is_held_out]
    if Path(sources, TOTALS).is_file():
        return list(read_documents(sources, "heldout"))
    return list(read_folder(sources))


def compression_command(
    *, sources: str | None = None, files: int | None = None, stride: int | None = None, **options: Any
) -> None:
    """Bits per byte of whole files, beside `xz -9e`, in windows of --max_seq_len tokens.

    Args:
        sources: a folder of .py files, or a corpus (default: held-out files of the standard library).
        files: how many of them, chosen by a hash of their paths (default: all).
        stride: how many tokens apart the windows begin (default: half a window).
        options: those of Llama.build: --ckpt_dir --max_seq_len --max_batch_size --device --dtype …
    """
    llama = build(**options)
    found = compression(llama, choose_files(read_sources(sources), files), stride=stride, progress=True)
    rows = [
        ("model, bits per byte", number(found.bits_per_byte)),
        ("model, nats per token", number(found.nats_per_token)),
        ("xz -9e, bits per byte, each file", number(found.xz_bits_per_byte)),
        ("xz -9e, bits per byte, one archive", f"{found.solid_xz_bits_per_byte:.3f}"),
        ("model / xz, each file", number(found.of_xz)),
        ("model / xz, one archive", number(found.of_solid_xz)),
    ]
    values = asdict(found)
    sizes = values.pop("sizes")
    totals = {name: sum(sizes[name]) for name in ("bytes", "tokens")}
    _report(llama, "compression", sources, options, ("", f"{len(found.sizes.paths)} files"), rows, {**totals, **values})


def positions_command(
    *, sources: str | None = None, documents: int | None = None, bins: int = 16, **options: Any
) -> None:
    """The loss by position, up to --max_seq_len, of documents that have as many tokens.

    Args:
        sources: a folder of .py files, or a corpus (default: held-out files of the standard library).
        documents: how many of the documents that are long enough (default: all).
        bins: into how many parts the positions are divided.
        options: those of Llama.build: --ckpt_dir --max_seq_len --max_batch_size --device --dtype …
    """
    llama = build(**options)
    found = loss_by_position(llama, read_sources(sources), bins=bins, documents=documents, progress=True)
    rows = [(f"{b.start}–{b.end - 1}", number(b.nats_per_token), number(b.bits_per_byte)) for b in found.bins]
    header = (f"{len(found.documents)} documents", "nats per token", "bits per byte")
    _report(llama, "positions", sources, options, header, rows, asdict(found))


def functions_command(
    *,
    sources: str | None = None,
    samples: int = 200,
    max_gen_len: int = 256,
    seed: int = 0,
    show: int = 0,
    **options: Any,
) -> None:
    """The share of held-out function heads that the model completes to something that parses.

    Args:
        sources: a folder of .py files, or a corpus (default: held-out files of the standard library).
        samples: how many functions, chosen by a hash.
        max_gen_len: tokens that a completion may take.
        seed: of the choice.
        show: how many of the completions to print.
        options: those of Llama.build: --ckpt_dir --max_seq_len --max_batch_size --device --dtype …
    """
    llama = build(**{"max_seq_len": 2 * max_gen_len, **options})
    found = complete_functions(llama, read_sources(sources), samples, max_gen_len, seed, progress=True)
    if llama.ranks.leads:
        for sample in found.samples[:show]:
            verdict = "parses" if sample.parses else "does not parse"
            print(f"# {sample.head.path}: {verdict}\n{sample.head.prompt}{sample.text}\n")
    rows = [("parses", percent(found.parsed)), ("comes to its end", percent(found.ended))]
    values = {"max_gen_len": max_gen_len, "seed": seed, "parsed": asdict(found.parsed), "ended": asdict(found.ended)}
    _report(llama, "functions", sources, options, ("", f"{found.parsed.n} functions"), rows, values)


def lines_command(
    *, sources: str | None = None, samples: int = 500, order: Order = "psm", seed: int = 0, **options: Any
) -> None:
    """The share of held-out lines that the model fills in exactly, given the file around them.

    Args:
        sources: a folder of .py files, or a corpus (default: held-out files of the standard library).
        samples: how many lines, chosen by a hash.
        order: psm (prefix first), spm (suffix first), or none (a completion that doesn't know of the suffix).
        seed: of the choice.
        options: those of Llama.build: --ckpt_dir --max_seq_len --max_batch_size --device --dtype …
    """
    llama = build(**options)
    found = infill_lines(llama, read_sources(sources), samples, order=order, seed=seed, progress=True)
    rows = [("exact match", percent(found.exact)), ("first line matches", percent(found.first_line))]
    shares = {"exact": asdict(found.exact), "first_line": asdict(found.first_line)}
    header = (order, f"{found.exact.n} lines")
    _report(llama, "lines", sources, options, header, rows, {"order": order, "seed": seed, **shares})


def retrieval_command(
    *,
    sources: str | None = None,
    lengths: int | Sequence[int] = 512,
    depths: float | Sequence[float] = DEPTHS,
    samples: int = 64,
    seed: int = 0,
    **options: Any,
) -> None:
    """Key retrieval: the share of two-digit numbers found again, by the prompt's length and the number's depth.

    Args:
        sources: a folder of .py files, or a corpus (default: held-out files of the standard library).
        lengths: tokens of prompt and answer: 512,1024,2048.
        depths: where the number stands, from 0 (first) to 1 (last): 0,0.25,0.5.
        samples: prompts for each length and depth.
        seed: of prompts and numbers.
        options: those of Llama.build: --ckpt_dir --max_seq_len --max_batch_size --device --dtype …
    """
    asked = [lengths] if isinstance(lengths, int) else list(lengths)
    places = [depths] if isinstance(depths, int | float) else list(depths)
    llama = build(**{"max_seq_len": max(asked, default=512), **options})
    found = retrieval(llama, read_sources(sources), asked, places, samples, seed, progress=True)
    cells = {(cell.length, cell.depth): percent(cell.found) for cell in found.cells}
    rows = [(length, *(cells[length, depth] for depth in found.depths)) for length in found.lengths]
    header = ("length \\ depth", *(f"{depth:g}" for depth in found.depths))
    _report(llama, "retrieval", sources, options, header, rows, {"samples": samples, "seed": seed, **asdict(found)})


def _report(
    llama: Llama,
    measure: str,
    sources: str | None,
    options: dict[str, Any],
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    values: dict[str, Any],
) -> None:
    if llama.ranks.leads:
        limits = {"max_seq_len": llama.model.args.max_seq_len, "dtype": str(llama.model.norm.weight.dtype)}
        print(render(header, rows))
        print(json.dumps({"measure": measure, "sources": sources, **limits, **options, **values}, default=str))


COMMANDS: dict[str, Callable[..., None]] = {
    "compression": compression_command,
    "positions": positions_command,
    "functions": functions_command,
    "lines": lines_command,
    "retrieval": retrieval_command,
}
