"""How much memory a run takes: of the whole, and above weights and cache.

Memory that a process has had is hard to tell from memory that it needs: libraries, threads and allocators keep what
they once got. So each figure comes from a process of its own, in which a small model ran first, and whose allocator
gives large blocks back at once. On a GPU the figures are torch.cuda.max_memory_allocated's. On a CPU (Linux) they are
the kernel's account of resident memory, whose peak, VmHWM, can be set back; weights that are mapped from a file count
as others do, since every page of them was touched before.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.bench.measures import draw_prompts
from llama.bench.subject import Subject

ROOT = Path(__file__).resolve().parents[2]  # from where `-m llama…` finds this very package
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
SHORT = 64  # tokens of the prompt that everything is used with once


@dataclass(frozen=True)
class Memory:
    """Bytes by which a process grew."""

    total: int
    """At the peak: loading, packing, cache and reading."""
    above: int
    """While the prompt was read, above weights and cache."""


class Gauge:
    """A process's memory on a device, and its peak since it was set back. ValueError where it can't be read."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if not self.cuda and not CLEAR.exists():
            raise ValueError(
                "resident memory is read from Linux's /proc, which is not here: leave memory out of --measures, or "
                "measure with --device cuda"
            )

    def now(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            CLEAR.write_text("5")  # sets VmHWM back to VmRSS

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def growth(
    warm_up: Callable[[], object], make: Callable[[], Subject], words: int, tokens: int, device: torch.device
) -> Memory:
    """What reading a prompt of `tokens` tokens takes with the model that `make` makes, of `words` words. To be called
    in a fresh process."""
    gauge = Gauge(device)
    warm_up()
    before = gauge.now()
    gauge.reset()
    subject = make()
    subject.room(1, tokens)
    subject.read(draw_prompts(words, 1, min(SHORT, tokens)))
    held, loading = gauge.now(), gauge.peak()
    gauge.reset()
    subject.read(draw_prompts(words, 1, tokens))
    peak = gauge.peak()
    return Memory(max(peak, loading) - before, max(0, peak - held - subject.cache_bytes(1, tokens)))


def in_fresh_process(options: Mapping[str, Any]) -> Memory:
    """What `python -m llama.bench grow` with these options finds. ValueError with its last words where it fails."""
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    done = subprocess.run(
        [sys.executable, "-m", "llama.bench", "grow", *words],
        env={**os.environ, **STEADY},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"the process that measures memory failed: {done.stderr.strip()[-500:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))
