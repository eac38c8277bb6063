"""The room's commands: `codellama longcontext spectra`, `perplexity`, `attention` and the others.

Each stands as `command` beside the function that it calls. It prints a table, or JSON with --json, and writes
OUT/NAME.csv, .json and .png. Under torchrun every rank computes; rank 0 prints and writes.
"""

from __future__ import annotations

from collections.abc import Callable

from llama.longcontext import attention, completion, perplexity, precision, prefill, retrieval, spectra, sweep
from llama.longcontext.reproduce import cli as reproduce

COMMANDS: dict[str, Callable[..., None]] = {
    "spectra": spectra.command,
    "perplexity": perplexity.command,
    "sweep": sweep.command,
    "retrieval": retrieval.command,
    "completion": completion.command,
    "attention": attention.command,
    "precision": precision.command,
    "reproduce": reproduce.command,
    "prefill": prefill.command,
}
