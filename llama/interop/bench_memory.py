"""How much memory converting and loading take: `python -m llama.interop.bench_memory`, a table, or with --json a
line of JSON.

A random checkpoint of some gigabytes is made in a scratch folder, converted there and back, and loaded. Each step runs
in a process of its own, whose private memory (RssAnon of Linux's /proc/self/status: what no file can give back) is
read every millisecond or so. The ratio compares its growth with the largest tensor and what the result must hold: a
loaded model its weights, a conversion nothing. Pages of the mapped files, which the system drops when it needs room,
are shown beside it.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from json import dumps
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint import load, open_checkpoint
from llama.cli import run
from llama.config import ModelArgs
from llama.interop.convert import Job, convert, write_meta
from llama.interop.layout import shard_shapes, whole_shapes
from llama.model import Transformer
from llama.options import Above, MaybeOut
from llama.parallel import start


class Noise:
    """Random weights of an architecture as a checkpoint (`llama.checkpoint.Weights`) of which nothing is stored."""

    path = Path("noise")
    n_shards = 1
    tokenizer_path = Path("noise", "tokenizer.model")

    def __init__(self, args: ModelArgs) -> None:
        self._args = args

    def names(self) -> list[str]:
        return list(whole_shapes(self._args))

    def args(self, **limits: Any) -> ModelArgs:
        return self._args

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor:
        return torch.randn(shard_shapes(args, world_size, rank)[name], dtype=torch.bfloat16) * 0.02


def architecture(gigabytes: float) -> ModelArgs:
    """One with about so many in bfloat16: layers of a 1.1 B Llama's shape, but for GQA."""
    args = ModelArgs(dim=2048, n_layers=1, n_heads=16, n_kv_heads=16, hidden_dim=5632, vocab_size=32016)
    sizes = {name: prod(shape) for name, shape in whole_shapes(args).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers."))
    args.n_layers = max(1, round((gigabytes * 1e9 / 2 - sum(sizes.values()) + layer) / layer))
    return args


def make(folder: Path, args: ModelArgs, shards: int) -> None:
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tokenizer that there is not
        write_meta(Job(Noise(args), args, shards, torch.bfloat16, None, lambda size: None), folder)


def load_model(folder: Path, dtype: torch.dtype) -> None:
    weights = open_checkpoint(folder)
    with torch.device("meta"):
        model = Transformer(weights.args(max_batch_size=1, max_seq_len=512))
    load(model, weights, start(device="cpu"), dtype)


def resident() -> tuple[int, int]:
    """Bytes of this process's private memory, and of files in its memory."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024


def growth(step: Callable[..., None], *given: Any) -> tuple[int, int, float]:
    """By how much both grow at most while `step(*given)` runs in a process of its own; and its seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (step, given))


def _warm_up() -> None:
    """All steps on a model of next to nothing: what libraries take when they are first used is not the step's."""
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=64, hidden_dim=64)
    with tempfile.TemporaryDirectory() as scratch:
        two, hf, four = Path(scratch, "two"), Path(scratch, "hf"), Path(scratch, "four")
        make(two, args, 2)
        convert(two, hf, "hf")
        convert(hf, four, "meta", 4)
        load_model(hf, torch.float32)


def _growth(step: Callable[..., None], given: tuple[Any, ...]) -> tuple[int, int, float]:
    warnings.simplefilter("ignore")  # the same, in a process that does nothing else
    _warm_up()
    peak, done = resident(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            now = resident()
            peak = max(peak[0], now[0]), max(peak[1], now[1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.monotonic()
    step(*given)
    seconds = time.monotonic() - begin
    done.set()
    watcher.join()
    return peak[0] - before[0], peak[1] - before[1], seconds


def bench(*, gigabytes: Above = 2.2, folder: MaybeOut = None, json: bool = False) -> None:
    """Prints what converting and loading take.

    Args:
        gigabytes: of the checkpoint that is made, in bfloat16. Four times as much is needed on the disk.
        folder: where to make it (none: the system's place for temporary files).
        json: print JSON instead of the table.
    """

    def show(line: str) -> None:
        if not json:
            print(line, flush=True)

    args = architecture(gigabytes)
    shapes = whole_shapes(args)
    whole, largest = (f(prod(shape) for shape in shapes.values()) for f in (sum, max))
    show(f"{args.n_layers} layers, {whole:,} parameters; the largest tensor has {largest:,}")
    show(f"{'step':32} {'seconds':>8} {'private':>10} {'allowed':>10} {'ratio':>6} {'of files':>10}   MB")
    results = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        two, hf, four = Path(scratch, "two"), Path(scratch, "hf"), Path(scratch, "four")
        make(two, args, 2)
        bf16, f32 = torch.bfloat16, torch.float32
        steps: list[tuple[str, int, Callable[..., None], tuple[Any, ...]]] = [
            ("2 shards to Hugging Face", 2 * largest, convert, (two, hf, "hf")),
            ("Hugging Face to 4 shards", 2 * largest, convert, (hf, four, "meta", 4)),
            ("load Hugging Face, bfloat16", 2 * largest + 2 * whole, load_model, (hf, bf16)),
            ("load 4 shards, bfloat16", 2 * largest + 2 * whole, load_model, (four, bf16)),
            ("load Hugging Face, float32", 4 * largest + 4 * whole, load_model, (hf, f32)),
        ]
        for name, allowed, step, given in steps:
            private, mapped, seconds = growth(step, *given)
            numbers = [f"{n / 1e6:10,.0f}" for n in (private, allowed, mapped)]
            show(f"{name:32} {seconds:8.1f} {numbers[0]} {numbers[1]} {private / allowed:6.2f} {numbers[2]}")
            results.append({"step": name, "seconds": seconds, "private": private, "allowed": allowed, "mapped": mapped})
    if json:
        print(dumps({"parameters": whole, "largest": largest, "steps": results}))


if __name__ == "__main__":
    run(bench, name="python -m llama.interop.bench_memory")
