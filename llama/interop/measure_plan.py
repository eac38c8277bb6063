"""Is a plan right? Runs what was planned, in a process of its own, and compares.

    python -m llama.interop.measure_plan compare                        # all shapes, on the CPU
    python -m llama.interop.measure_plan compare --shapes embedded --device cuda --dtype bfloat16

A run reads prompts that fill the cache but for a few tokens and writes those, sampled from a nucleus. On a GPU its
size is torch.cuda.max_memory_allocated. On a CPU (Linux) it is the growth of resident memory: the peak, VmHWM, set
back once the weights are loaded, less what was resident before them. By then the embedded checkpoint had run once, so
that libraries, threads and their buffers don't count. Every page of the weights is touched before, so weights that stay
mapped from their file count as the private ones do; the file of weights that were converted is unmapped by then. The
allocator gives large blocks back at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_): what is counted is what
tensors take, not what glibc keeps for later.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import torch

from llama.checkpoint import open_checkpoint, save
from llama.cli import run
from llama.config import ModelArgs
from llama.generation import EMBEDDED, Llama
from llama.interop.layout import whole_shapes
from llama.interop.memory import Device, Settings, plan
from llama.options import Count, Dtype, Positional, one_of, several
from llama.system import DTYPES
from llama.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]  # from where `-m llama…` finds this very package
TOKENIZER = EMBEDDED / "tokenizer.model"
SHAPES: dict[str, dict[str, Any]] = {
    "embedded": {},
    "110M": {"dim": 768, "n_layers": 15, "n_heads": 12, "hidden_dim": 2048},
    "400M": {"dim": 1024, "n_layers": 35, "n_heads": 16, "n_kv_heads": 4, "hidden_dim": 2816},
}
"""The embedded checkpoint, and random weights of larger shapes that use its tokenizer."""
ANSWER = 8  # tokens that are written
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def make(shape: str, folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint of random weights stored in `dtype`; the embedded one lies where it lies."""
    if not SHAPES[shape]:
        return EMBEDDED
    args = ModelArgs(**SHAPES[shape], vocab_size=Tokenizer(TOKENIZER).n_words)
    draw = torch.Generator().manual_seed(0)
    shapes = whole_shapes(args)
    weights = {name: torch.empty(size, dtype=dtype).normal_(std=0.02, generator=draw) for name, size in shapes.items()}
    save(folder / shape, args, weights, 1, TOKENIZER)
    return folder / shape


def fill(llama: Llama) -> None:
    """Reads as many rows and tokens as the cache has room for, but for a short answer, and writes that. Then two of
    the prompts come again with other ends, of half a chunk each, so that these are read side by side."""
    args, half = llama.model.args, llama.loop.chunk // 2
    prompts = torch.randint(3, args.vocab_size, (args.max_batch_size, args.max_seq_len - ANSWER)).tolist()
    again = [[*prompt[: -half - i], 2, *prompt[1 - half :]] for i, prompt in enumerate(prompts[:2])]
    for asked in (prompts, again) if args.max_batch_size > 1 and half > 1 else (prompts,):
        for _ in llama.stream(asked, ANSWER, seed=1):
            pass


def grow(folder: Positional[str], *, slots: Count, rows: Count, chunk: Count, device: Device, dtype: Dtype) -> None:
    """Prints by how many bytes a run makes this process grow. To be started in a fresh one, as `compare` does."""
    fill(Llama.build(max_seq_len=600, max_batch_size=2, device=device, dtype=DTYPES[dtype]))
    gc.collect()
    before = 0 if device == "cuda" else _status("VmRSS")
    llama = Llama.build(folder, max_seq_len=slots, max_batch_size=rows, device=device, dtype=DTYPES[dtype])
    llama.loop.chunk = chunk
    for weight in llama.model.parameters():
        weight.flatten()[::512].sum()  # a number of each page
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    fill(llama)
    print((torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")) - before)


def _status(name: str) -> int:
    """Bytes, from the kernel's account of this process."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _grown(folder: Path, **options: Any) -> int:
    """What `grow` prints in a fresh process."""
    words = ["-m", "llama.interop.measure_plan", "grow", str(folder), *(f"--{k}={v}" for k, v in options.items())]
    environment = {**os.environ, **STEADY}
    done = subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the run of {folder} failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def compare(
    *,
    shapes: Annotated[tuple[str, ...], several("SHAPE", one_of(SHAPES))] = tuple(SHAPES),
    slots: Count = 2048,
    rows: Count = 2,
    chunk: Count = 512,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    stored: Dtype = "bfloat16",
    json: bool = False,
) -> None:
    """Prints for each shape the planned and the measured bytes and their ratio.

    Args:
        shapes: some of embedded,110M,400M.
        slots: max_seq_len.
        rows: max_batch_size.
        chunk: prompt tokens read at once.
        device: what it runs on.
        dtype: in which to run.
        stored: in which the random weights lie on disk; as `dtype`, they stay mapped on a CPU.
        json: print JSON instead of the table.
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError("resident memory is read from Linux's /proc, which is not here: measure with --device cuda")
    results = []
    if not json:
        print(f"{'shape':10} {'planned':>15} {'measured':>15} {'ratio':>7}")
    for name in shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = make(name, Path(scratch), DTYPES[stored])
            args = open_checkpoint(folder).args(max_seq_len=slots, max_batch_size=rows)
            settings = Settings(1, DTYPES[dtype], prefill_chunk=chunk, device=device)
            planned = plan(args, settings).total
            measured = _grown(folder, slots=slots, rows=rows, chunk=chunk, device=device, dtype=dtype)
        results.append({"shape": name, "planned": planned, "measured": measured, "ratio": round(planned / measured, 4)})
        if not json:
            print(f"{name:10} {planned:15,} {measured:15,} {planned / measured:7.3f}", flush=True)
    settings_used = {"slots": slots, "rows": rows, "chunk": chunk, "device": device, "dtype": dtype, "stored": stored}
    if json:
        print(dumps({**settings_used, "results": results}))


if __name__ == "__main__":
    run({"compare": compare, "grow": grow}, name="measure_plan")
