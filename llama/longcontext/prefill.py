"""100,000 tokens for real: how long a prompt takes to be read, and how much memory, by its length.

Attention looks back at everything, so n tokens take n² / 2 looks: reading gets slower the further it has come, and
nothing can be done about that without another model. Memory is another matter. Read at once, a prompt's activations
are n long in every layer; read in chunks, they are as long as a chunk, and what grows with the prompt is the cache,
the mask of one chunk, and the tables of cos and sin: a straight line, which `codellama plan` knows beforehand.

Each length is read in a process of its own, so that no peak is another's. Its size is what `codellama plan` is
measured by (llama/interop/measure_plan.py): the growth of resident memory over that of a process in which a small
prompt has been read and forgotten, with every page of the weights touched, and an allocator that gives blocks back at
once. transformers reads the same weights as it does by default, the whole prompt in one pass, as far as it gets in the
memory in which the longest prompt was read here.

The prompt is held-out files one after the other, and from the first again where they don't suffice. What is written
after it is written beyond the context that the small checkpoint was trained on, and means nothing: this measures time
and memory. For what such a context is worth there are `perplexity` and `retrieval`.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice, pairwise
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from typing_extensions import Unpack

from llama.checkpoint import open_checkpoint
from llama.cli import run
from llama.config import ModelArgs
from llama.evals.record import Record, begin, save_record, tell
from llama.evals.sources import Source
from llama.evals.table import render
from llama.front import load as build
from llama.generation import EMBEDDED, Llama
from llama.longcontext.perplexity import read_texts
from llama.options import Count, Lengths, Loading, MaybeSources, Out, Positional, choice
from llama.prompts import Prompt
from llama.system import DTYPES
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]  # from where `-m llama…` finds this very package
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
RESET = Path("/proc/self/clear_refs")
"""Linux's: what is written here sets a process's peak back to what is resident now."""
KV_DTYPES = {"int8": torch.int8}
SMALL = 600  # tokens of the prompt that is read first, and doesn't count: more than one chunk
BINS = 8


@dataclass(frozen=True)
class Chunk:
    first: int
    """Position of its first token."""
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Reading:
    """A prompt that was read, and what was written after it, in a process of its own."""

    reader: str
    chunks: tuple[Chunk, ...]
    written: tuple[int, ...]
    writing: float
    """Seconds for what was written."""
    peak: int
    """Bytes by which the process grew at most; the weights are among them."""

    @property
    def length(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def seconds(self) -> float:
        return sum(chunk.seconds for chunk in self.chunks)


Read = Callable[[list[int], int], tuple[list[Chunk], list[int], float]]
"""Reads ids and writes so many: the chunks, what was written, and its seconds."""


@dataclass(frozen=True)
class Line:
    """A straight line through points, by least squares."""

    slope: float
    start: float
    residual: float
    """The largest distance of a point from the line, as a part of the point's value; of two points it is 0."""


def straight_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """ValueError for fewer than two places."""
    if len(set(x)) < 2:
        raise ValueError(f"a line through {len(set(x))} length: give at least two --lengths")
    slope, start = np.polyfit(np.array(x, float), np.array(y, float), 1)
    residual = max(abs(slope * a + start - b) / b for a, b in zip(x, y, strict=True))
    return Line(float(slope), float(start), float(residual))


def joined(tokenizer: Tokenizer, sources: Sequence[Source], n: int) -> list[int]:
    """bos, and n - 1 ids of the sources one after the other, over and over. ValueError where they have no text."""
    texts = (tokenizer.encode(source.text, bos=False, eos=False) for source in cycle(sources))
    if not any(source.text.strip() for source in sources):
        raise ValueError("the sources have no text: give a folder, or a file, that has some")
    return [tokenizer.bos_id, *islice(chain.from_iterable(texts), n - 1)]


# In the process that reads ----------------------------------------------------------------------------------------


@torch.inference_mode()
def read(llama: Llama, tokens: list[int], n: int) -> tuple[list[Chunk], list[int], float]:
    """Reads a prompt chunk by chunk and writes the n likeliest tokens after it, whatever they are."""
    chunks: list[Chunk] = []
    began = time.perf_counter()
    cache = llama.model.own_cache()
    for at in range(0, len(tokens), llama.prefill_chunk):
        piece = tokens[at : at + llama.prefill_chunk]
        llama.model.hidden(torch.tensor([piece]), at, cache)
        now = time.perf_counter()
        chunks.append(Chunk(at, len(piece), now - began))
        began = now
    cache.tokens[0] = list(tokens)
    began = time.perf_counter()
    answer = llama.stream([Prompt(tokens, frozenset())], n, temperature=0)
    written = [token for event in answer for token in event.tokens]
    return chunks, written, time.perf_counter() - began


def reads_here(slots: int, kv_dtype: str | None, options: dict[str, Any]) -> Read:
    llama = build(**options, kv_dtype=kv_dtype, max_seq_len=slots, max_batch_size=1, device="cpu")
    for weight in llama.model.parameters():
        weight.flatten()[::512].sum()  # a number of each page
    return lambda tokens, n: read(llama, tokens, n)


def reads_in_transformers(folder: str, dtype: str) -> Read:
    """The whole prompt in one pass, as its `generate` does by default; then a token at a time."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    for weight in model.parameters():
        weight.detach().flatten()[::512].sum()

    @torch.inference_mode()
    def read_whole(tokens: list[int], n: int) -> tuple[list[Chunk], list[int], float]:
        began = time.perf_counter()
        out = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        seconds, written = time.perf_counter() - began, []
        began = time.perf_counter()
        for i in range(n):
            token = out.logits[:, -1:].argmax(-1)
            written.append(int(token))
            if i < n - 1:
                out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        return [Chunk(0, len(tokens), seconds)], written, time.perf_counter() - began

    return read_whole


def one(job: Positional[str]) -> None:
    """Reads what the file JOB asks for, and prints the Reading as JSON. To be started in a fresh process."""
    asked = loads(Path(job).read_text(encoding="utf-8"))
    tokens, n = asked["tokens"], asked["generate"]

    def reader(slots: int) -> Read:
        if asked["reader"] == "transformers":
            return reads_in_transformers(asked["folder"], asked["dtype"])
        return reads_here(slots, asked["kv_dtype"], asked["options"])

    reader(SMALL + n)(tokens[:SMALL], n)
    gc.collect()
    before = _status("VmRSS")
    big = reader(len(tokens) + n)
    RESET.write_text("5")
    chunks, written, seconds = big(tokens, n)
    print(dumps(asdict(Reading(asked["reader"], tuple(chunks), tuple(written), seconds, _status("VmHWM") - before))))


def _status(name: str) -> int:
    """Bytes, from the kernel's account of this process."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# In the one that compares ---------------------------------------------------------------------------------------------


def reading_of(job: dict[str, Any]) -> Reading:
    """What `one` prints in a fresh process. Raises ValueError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "job.json")
        path.write_text(dumps(job), encoding="utf-8")
        words = [sys.executable, "-m", "llama.longcontext.prefill", str(path)]
        done = subprocess.run(words, env={**os.environ, **STEADY}, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{job['reader']} did not read {len(job['tokens']):,} tokens: {last.removeprefix('error: ')}")
    found = loads(done.stdout.splitlines()[-1])
    chunks = tuple(Chunk(**chunk) for chunk in found.pop("chunks"))
    return Reading(chunks=chunks, written=tuple(found.pop("written")), **found)


def planned_bytes(args: ModelArgs, dtype: torch.dtype, chunk: int, kv_dtype: str | None) -> int:
    """`codellama plan`'s figure. Its room is asked by name, as Llama.build does."""
    memory = importlib.import_module("llama.interop.memory")
    stored = None if kv_dtype is None else KV_DTYPES[kv_dtype]
    settings = memory.Settings(1, dtype, stored, prefill_chunk=chunk, device="cpu")
    return int(memory.plan(args, settings).total)


def by_position(reading: Reading, bins: int = BINS) -> list[tuple[int, float]]:
    """Where each of `bins` groups of chunks begins, and its tokens per second."""
    edges = [len(reading.chunks) * i // bins for i in range(bins + 1)]
    groups = [reading.chunks[a:b] for a, b in pairwise(edges) if a < b]
    return [(group[0].first, sum(c.tokens for c in group) / sum(c.seconds for c in group)) for group in groups]


def row_of(reading: Reading, kv_dtype: str | None, dtype: str, planned: Mapping[int, int]) -> dict[str, Any]:
    """A row of the table; what is not known of transformers (a plan, chunks) stays empty."""
    ours, last = reading.reader != "transformers", reading.chunks[-1]
    return {
        "reader": reading.reader,
        "kv_dtype": kv_dtype if ours and kv_dtype else dtype,
        "length": reading.length,
        "seconds": round(reading.seconds, 3),
        "tokens_per_second": round(reading.length / reading.seconds, 1),
        "last_chunk_tokens_per_second": round(last.tokens / last.seconds, 1) if ours else None,
        "written": len(reading.written),
        "written_per_second": round(len(reading.written) / reading.writing, 2),
        "peak": reading.peak,
        "planned": planned[reading.length] if ours else None,
    }


def draw(figure: Figure, readings: Sequence[Reading], planned: Sequence[int], line: Line | None) -> None:
    """Memory by length, and speed by position."""
    left, right = figure.subplots(1, 2)
    ours = [r for r in readings if r.reader != "transformers"]
    others = [r for r in readings if r.reader == "transformers"]
    lengths = [r.length for r in ours]
    left.plot(lengths, [r.peak / 1e6 for r in ours], "o", label="measured")
    if line is not None:
        left.plot(lengths, [(line.start + line.slope * n) / 1e6 for n in lengths], color="C0", label="straight line")
    left.plot(lengths, [p / 1e6 for p in planned], "--", color="0.5", label="codellama plan")
    if others:
        left.plot([r.length for r in others], [r.peak / 1e6 for r in others], "s", color="C1", label="transformers")
    left.set(xlabel="tokens of the prompt", ylabel="peak memory, MB", xlim=(0, None), ylim=(0, None))
    left.legend()
    chunks = ours[-1].chunks
    middles = [c.first + c.tokens / 2 for c in chunks]
    right.plot(middles, [c.tokens / c.seconds for c in chunks], ".", label=f"chunks of {ours[-1].length:,} tokens")
    if others:
        means = [r.length / r.seconds for r in others]
        right.plot([r.length for r in others], means, "s", color="C1", label="transformers, mean of a prompt")
    right.set(xlabel="position", ylabel="tokens read per second", xlim=(0, None), ylim=(0, None))
    right.legend()


def measure(
    tokens: list[int],
    lengths: Sequence[int],
    folder: str | None = None,
    *,
    generate: int = 32,
    kv_dtype: str | None = None,
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
) -> Iterator[Reading]:
    """Reads the first `lengths` of `tokens`, in rising order; then transformers reads them from the Hugging Face
    `folder`, where one is given, until one took more memory than our longest."""
    job = {"generate": generate, "kv_dtype": kv_dtype, "dtype": dtype, "options": options or {}, "folder": folder}
    room = 0
    for length in sorted(lengths):
        reading = reading_of({**job, "reader": "codellama", "tokens": tokens[:length]})
        room = max(room, reading.peak)
        yield reading
    for length in sorted(lengths) if folder is not None else ():
        reading = reading_of({**job, "reader": "transformers", "tokens": tokens[:length]})
        yield reading
        if reading.peak > room:
            return


def command(
    *,
    lengths: Lengths = (12_500, 25_000, 50_000, 100_000),
    generate: Count = 32,
    against: Annotated[str | None, choice(["transformers"])] = None,
    sources: MaybeSources = None,
    out: Out = "longcontext",
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Time and memory of long prompts on this CPU: OUT/prefill.csv, .json and .png, and prefill_chunks.csv.

    It reads in float32 unless --dtype is bfloat16; --max_seq_len and --max_batch_size follow from --lengths.

    Args:
        lengths: tokens of the prompts.
        generate: tokens that are written after each.
        against: also read the same prompts with the same weights by it, as far as the memory suffices.
        sources: a text file, a folder, or a corpus.
        out: the folder of the results.
        json: print JSON instead of the tables.
    """
    asked, started = sorted(lengths), begin(out)
    _check(asked, loading)
    kv_dtype, dtype = loading.get("kv_dtype"), loading.get("dtype", "float32")
    ckpt_dir, prefill_chunk = loading.get("ckpt_dir"), loading.get("prefill_chunk", 512)
    checkpoint = open_checkpoint(EMBEDDED if ckpt_dir is None else ckpt_dir)
    tokenizer = Tokenizer(loading.get("tokenizer_path") or checkpoint.tokenizer_path)
    tokens = joined(tokenizer, read_texts(sources), asked[-1])
    limits = [checkpoint.args(max_seq_len=n + generate, max_batch_size=1) for n in asked]
    planned = {n: planned_bytes(a, DTYPES[dtype], prefill_chunk, kv_dtype) for n, a in zip(asked, limits, strict=True)}
    options = {"ckpt_dir": ckpt_dir, "prefill_chunk": prefill_chunk, **loading, "dtype": dtype}
    options.pop("kv_dtype", None)  # it has a place of its own, since transformers has none
    readings, rows = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch, "hf")) if against else None
        if folder is not None:
            importlib.import_module("llama.interop.convert").convert(checkpoint.path, folder, "hf")
        settings: dict[str, Any] = {"generate": generate, "kv_dtype": kv_dtype, "dtype": dtype, "options": options}
        for reading in measure(tokens, asked, folder, **settings):
            readings.append(reading)
            rows.append(row_of(reading, kv_dtype, dtype, planned))
            print(f"{reading.reader}: {reading.length:,} tokens in {reading.seconds:,.1f} s", file=sys.stderr)
    ours = readings[: len(asked)]
    line = straight_line(asked, [r.peak for r in ours]) if len(asked) > 1 else None
    made_of = {
        "lengths": asked,
        "generate": generate,
        "sources": sources,
        **options,
        "params": limits[0].to_params(),
        "line": None if line is None else asdict(line),
    }
    name = "prefill" if kv_dtype is None else f"prefill_{kv_dtype}"
    by_chunk = [{"reader": r.reader, "length": r.length, **asdict(c)} for r in readings for c in r.chunks]
    save_record(Record(f"{name}_chunks", by_chunk, made_of), out, started)
    record = Record(name, rows, made_of)
    save_record(record, out, started, draw=lambda figure: draw(figure, readings, list(planned.values()), line))
    tell(_described(readings, rows, line), {"measure": "prefill", "out": out, **made_of, "rows": rows}, json)


def _check(lengths: list[int], loading: Loading) -> None:
    """Raises ValueError for what can't be measured, before anything is read."""
    if not RESET.exists():
        raise ValueError("peaks of memory are read from Linux's /proc, which is not here")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("prefill measures a single process: start it without torchrun")
    if not lengths or len(set(lengths)) < len(lengths):
        raise ValueError(f"--lengths {lengths}: give one or several, each another")
    if loading.get("dtype") == "float16":
        raise ValueError("--dtype float16 is not for a CPU: choose float32 or bfloat16")
    taken = [name for name in ("max_seq_len", "max_batch_size", "device") if name in loading]
    if taken:
        raise ValueError(
            f"--{taken[0]} is not free here: the cache has one row of --lengths and --generate, on the CPU"
        )


def _described(readings: Sequence[Reading], rows: Sequence[dict[str, Any]], line: Line | None) -> str:
    seconds = {row["length"]: row["seconds"] for row in rows if row["reader"] == "codellama"}
    peaks = {row["length"]: row["peak"] for row in rows if row["reader"] == "codellama"}
    lines = []
    for row in rows:
        n, planned = row["length"], row["planned"]
        if planned is not None:
            beside = f"{planned / 1e6:,.0f} planned, {row['peak'] / planned:.3f} of it"
        else:
            beside = f"{row['seconds'] / seconds[n]:.2f} times our time, {row['peak'] / peaks[n]:.2f} times our memory"
            beside += ", more than our longest prompt took" if row["peak"] > max(peaks.values()) else ""
        speeds = f"{row['tokens_per_second']:,.0f}", f"{row['written_per_second']:.1f}"
        lines.append((row["reader"], f"{n:,}", f"{row['seconds']:,.1f}", *speeds, f"{row['peak'] / 1e6:,.0f}", beside))
    text = render(("", "tokens", "seconds", "read/s", "written/s", "peak, MB", ""), lines)
    longest = max((r for r in readings if r.reader == "codellama"), key=lambda r: r.length)
    text += f"\n\ntokens read per second, by position in the prompt of {longest.length:,}:\n"
    text += render(("from", "read/s"), [(f"{first:,}", f"{speed:,.0f}") for first, speed in by_position(longest)])
    if line is not None:
        text += (
            f"\n\nmemory: {line.start / 1e6:,.1f} MB and {line.slope:,.0f} bytes a token; no length is off that line "
            f"by more than {line.residual:.2%}"
        )
    return text


if __name__ == "__main__":
    run(one, name="python -m llama.longcontext.prefill")
