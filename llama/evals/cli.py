"""The room's commands: `codellama evals compression`, `positions`, `functions`, `lines` and `retrieval`.

Each builds a Llama, measures it on a folder of Python files, and prints a table for people or, with --json, one line of
JSON for programs. Under torchrun every rank measures; rank 0 prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from llama.evals.compression import compression
from llama.evals.functions import complete_functions
from llama.evals.lines import Order, infill_lines
from llama.evals.positions import loss_by_position
from llama.evals.record import tell
from llama.evals.retrieval import DEPTHS, retrieval
from llama.evals.sources import Source, choose_files, read_folder
from llama.evals.table import number, percent, render
from llama.front import load as build
from llama.generation import Llama
from llama.options import Amount, Count, Lengths, Loading, MaybeCount, MaybeSources, Seed, Shares
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
    *,
    sources: MaybeSources = None,
    files: MaybeCount = None,
    stride: MaybeCount = None,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Bits per byte of whole files, beside `xz -9e`, in windows of --max_seq_len tokens.

    Args:
        sources: a folder of .py files, or a corpus.
        files: how many of them, chosen by a hash of their paths (none: all).
        stride: how many tokens apart the windows begin (none: half a window).
        json: print JSON instead of the table.
    """
    texts = choose_files(read_sources(sources), files)
    llama = build(**loading)
    found = compression(llama, texts, stride=stride, progress=True)
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
    asked = {"sources": sources, **loading, **{name: sum(sizes[name]) for name in ("bytes", "tokens")}}
    _report(llama, "compression", render(("", f"{len(found.sizes.paths)} files"), rows), {**asked, **values}, json)


def positions_command(
    *,
    sources: MaybeSources = None,
    documents: MaybeCount = None,
    bins: Count = 16,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """The loss by position, up to --max_seq_len, of documents that have as many tokens.

    Args:
        sources: a folder of .py files, or a corpus.
        documents: how many of the documents that are long enough (none: all).
        bins: into how many parts the positions are divided.
        json: print JSON instead of the table.
    """
    texts = read_sources(sources)
    llama = build(**loading)
    found = loss_by_position(llama, texts, bins=bins, documents=documents, progress=True)
    rows = [(f"{b.start}–{b.end - 1}", number(b.nats_per_token), number(b.bits_per_byte)) for b in found.bins]
    header = (f"{len(found.documents)} documents", "nats per token", "bits per byte")
    values = {"sources": sources, **loading, **asdict(found)}
    _report(llama, "positions", render(header, rows), values, json)


def functions_command(
    *,
    sources: MaybeSources = None,
    samples: Count = 200,
    max_gen_len: Count = 256,
    seed: Seed = 0,
    show: Amount = 0,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """The share of held-out function heads that the model completes to something that parses.

    Args:
        sources: a folder of .py files, or a corpus.
        samples: how many functions, chosen by a hash.
        max_gen_len: tokens that a completion may take.
        seed: of the choice.
        show: how many of the completions to print above the table.
        json: print JSON instead of the table.
    """
    texts = read_sources(sources)
    limits: Loading = {"max_seq_len": 2 * max_gen_len, **loading}
    llama = build(**limits)
    found = complete_functions(llama, texts, samples, max_gen_len, seed, progress=True)
    shown = ""
    for sample in found.samples[:show]:
        verdict = "parses" if sample.parses else "does not parse"
        shown += f"# {sample.head.path}: {verdict}\n{sample.head.prompt}{sample.text}\n\n"
    rows = [("parses", percent(found.parsed)), ("comes to its end", percent(found.ended))]
    table = render(("", f"{found.parsed.n} functions"), rows)
    values = {"max_gen_len": max_gen_len, "seed": seed, "parsed": asdict(found.parsed), "ended": asdict(found.ended)}
    _report(llama, "functions", shown + table, {"sources": sources, **loading, **values}, json)


def lines_command(
    *,
    sources: MaybeSources = None,
    samples: Count = 500,
    order: Order = "psm",
    seed: Seed = 0,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """The share of held-out lines that the model fills in exactly, given the file around them.

    Args:
        sources: a folder of .py files, or a corpus.
        samples: how many lines, chosen by a hash.
        order: psm (prefix first), spm (suffix first), or none (a completion that doesn't know of the suffix).
        seed: of the choice.
        json: print JSON instead of the table.
    """
    texts = read_sources(sources)
    llama = build(**loading)
    found = infill_lines(llama, texts, samples, order=order, seed=seed, progress=True)
    rows = [("exact match", percent(found.exact)), ("first line matches", percent(found.first_line))]
    values = {"order": order, "seed": seed, "exact": asdict(found.exact), "first_line": asdict(found.first_line)}
    table = render((order, f"{found.exact.n} lines"), rows)
    _report(llama, "lines", table, {"sources": sources, **loading, **values}, json)


def retrieval_command(
    *,
    sources: MaybeSources = None,
    lengths: Lengths = (512,),
    depths: Shares = DEPTHS,
    samples: Count = 64,
    seed: Seed = 0,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Key retrieval: the share of two-digit numbers found again, by the prompt's length and the number's depth.

    Args:
        sources: a folder of .py files, or a corpus.
        lengths: tokens of prompt and answer: 512,1024,2048.
        depths: where the number stands, from 0 (first) to 1 (last): 0,0.25,0.5.
        samples: prompts for each length and depth.
        seed: of prompts and numbers.
        json: print JSON instead of the table.
    """
    texts = read_sources(sources)
    limits: Loading = {"max_seq_len": max(lengths, default=512), **loading}
    llama = build(**limits)
    found = retrieval(llama, texts, lengths, depths, samples, seed, progress=True)
    cells = {(cell.length, cell.depth): percent(cell.found) for cell in found.cells}
    rows = [(length, *(cells[length, depth] for depth in found.depths)) for length in found.lengths]
    header = ("length \\ depth", *(f"{depth:g}" for depth in found.depths))
    values = {"sources": sources, **loading, "samples": samples, "seed": seed, **asdict(found)}
    _report(llama, "retrieval", render(header, rows), values, json)


def _report(llama: Llama, measure: str, table: str, values: Mapping[str, Any], as_json: bool) -> None:
    if llama.ranks.leads:
        limits = {"max_seq_len": llama.model.args.max_seq_len, "dtype": str(llama.model.norm.weight.dtype)}
        tell(table, {"measure": measure, **limits, **values}, as_json)


COMMANDS: dict[str, Callable[..., None]] = {
    "compression": compression_command,
    "positions": positions_command,
    "functions": functions_command,
    "lines": lines_command,
    "retrieval": retrieval_command,
}
