"""The commands: `codellama complete`, `infill`, `chat`, `info`, and one for each room that has a command line.

This is the one place where words become objects. Text is written to the terminal as it comes. Under torchrun every
rank runs the same command; rank 0 reads and prints, the others follow. What a user got wrong ends in one paragraph.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from fire.decorators import SetParseFns

from llama import parallel
from llama.checkpoint import open_checkpoint
from llama.errors import LostRank
from llama.front import load as build
from llama.generation import EMBEDDED, Llama
from llama.model import Transformer
from llama.prompts import Message, dialog, infilling
from llama.requests import Event

FILL = "<FILL>"
PATHS = {"ckpt_dir": str, "tokenizer_path": str, "load_cache": str, "save_cache": str}  # not a number, were it 1e3
ROOMS = {
    "train": ("llama.train.cli:COMMANDS", "Trains a small checkpoint."),
    "convert": ("llama.interop.convert:command", "Rewrites a checkpoint in another format or number of shards."),
    "download": ("llama.interop.download:command", "Downloads a checkpoint from the Hugging Face hub."),
    "check": ("llama.interop.check:command", "Says of each file of a checkpoint whether it is whole, and the remedy."),
    "plan": ("llama.interop.plan:command", "What a run takes of memory, whether it fits, and what would."),
    "longcontext": (
        "llama.longcontext.cli:COMMANDS",
        "RoPE schemes and long contexts: spectra, perplexity, sweeps, retrieval.",
    ),
    "quantize": ("llama.quantize.cli:command", "Rewrites a checkpoint in 8 or 4 bits, or reports what that loses."),
    "bench": ("llama.bench.cli:command", "Measures speed and memory, beside the machine's limits and transformers."),
    "evals": ("llama.evals.cli:COMMANDS", "Measures a checkpoint: bits per byte, completions, infilling, retrieval."),
}
"""Verbs of the rooms: a function, or a table of them, and what they do. A room is imported when it is asked for."""


@contextmanager
def _cache_files(llama: Llama, load: str | None, save: str | None) -> Iterator[None]:
    """Restores what a file holds into the cache, and after the block writes one of what it holds then."""
    if load is None and save is None:
        yield
        return
    files = importlib.import_module("llama.longcontext.saved_cache")
    if load is not None:
        files.load_cache(llama, load)
    yield
    if save is not None:
        files.save_cache(llama, save)


@SetParseFns(prompt=str, stop=str, **PATHS)  # type: ignore[untyped-decorator]
def complete(
    prompt: str,
    *,
    temperature: float = 0.2,
    top_p: float = 0.9,
    top_k: int | None = None,
    max_gen_len: int | None = None,
    stop: str | None = None,
    seed: int = 1,
    echo: bool = True,
    load_cache: str | None = None,
    save_cache: str | None = None,
    **options: Any,
) -> None:
    """Continues PROMPT ("-": standard input) and prints both, or with --noecho the continuation alone.

    --save_cache FILE keeps what was read and written, and --load_cache FILE takes it up again: of a prompt that begins
    the same, only the rest is read. --kv_dtype int8 halves the cache. Further options are those of Llama.build:
    --ckpt_dir --tokenizer_path --max_seq_len --max_batch_size --model_parallel_size --device --dtype --rope_theta
    --rope_scaling --quantize --fast --compile --lookup --timeout.
    """
    llama = build(seed=seed, **options)
    text = llama.ranks.broadcast_object(sys.stdin.read() if llama.ranks.leads and prompt == "-" else prompt)
    settings: dict[str, Any] = {"top_k": top_k, "stop": stop or (), "seed": seed}
    with _cache_files(llama, load_cache, save_cache):
        events = llama.stream([text], max_gen_len, temperature, top_p, **settings)
        _say(llama, text if echo else "")
        _print_stream(llama, events)
        _say(llama, "\n")


@SetParseFns(file=str, **PATHS)  # type: ignore[untyped-decorator]
def infill(
    file: str,
    *,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    suffix_first: bool = False,
    seed: int = 1,
    load_cache: str | None = None,
    save_cache: str | None = None,
    **options: Any,
) -> None:
    """Prints FILE ("-": standard input) with its one <FILL> filled in. Options as for complete."""
    llama = build(seed=seed, **options)
    with llama.ranks.all_ranks():
        text = ""
        if llama.ranks.leads:
            if file != "-" and not os.path.isfile(file):
                raise ValueError(f"there is no file {file}; give a file with one {FILL}, or - for standard input")
            # As bytes: a text stream would turn \r\n into \n.
            text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8")
            if text.count(FILL) != 1:
                raise ValueError(f"{file} has {text.count(FILL)} places marked {FILL}; it needs exactly one")
    prefix, suffix = llama.ranks.broadcast_object(text).split(FILL)
    prompt = infilling(llama.tokenizer, prefix, suffix, suffix_first)
    with _cache_files(llama, load_cache, save_cache):
        events = llama.stream([prompt], max_gen_len, temperature, top_p, seed=seed)
        _say(llama, prefix)
        _print_stream(llama, events)
        _say(llama, suffix)


@SetParseFns(system=str, **PATHS)  # type: ignore[untyped-decorator]
def chat(
    *,
    system: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_gen_len: int | None = None,
    seed: int = 1,
    load_cache: str | None = None,
    save_cache: str | None = None,
    **options: Any,
) -> None:
    """A conversation. /reset forgets it, Ctrl-C stops an answer, Ctrl-D or /exit ends. Options as for complete.

    What the model has read of the conversation stays in its cache, so each turn reads only what is new. (Under
    torchrun, Ctrl-C reaches the launcher, which ends all ranks.)
    """
    llama = build(**{"seed": seed, "max_batch_size": 1, **options})
    opening: list[Message] = [Message(role="system", content=str(system))] if system else []
    messages = list(opening)
    with _cache_files(llama, load_cache, save_cache):
        while (line := _read_line(llama)) is not None and line != "/exit":
            if line == "/reset":
                messages = list(opening)
            elif line:
                try:
                    prompt = dialog(llama.tokenizer, [*messages, Message(role="user", content=line)])
                    stream = llama.stream([prompt], max_gen_len, temperature, top_p, seed=seed)
                except ValueError as error:
                    _say(llama, f"({error}; /reset begins anew)\n")
                    continue
                answer = _print_stream(llama, stream)
                _say(llama, "\n")
                messages += [Message(role="user", content=line), Message(role="assistant", content=answer)]


def _read_line(llama: Llama) -> str | None:
    """The next line of rank 0's user, on every rank; None at the end."""
    line: str | None = None
    if llama.ranks.leads:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            _say(llama, "\n")
    received: str | None = llama.ranks.broadcast_object(line)
    return received


def _print_stream(llama: Llama, events: Generator[Event, None, None]) -> str:
    """Prints one row's text as it comes and returns it whole. Ctrl-C ends it there, on all ranks."""
    parts: list[str] = []
    try:
        for event in events:
            parts.append(event.text)
            _say(llama, event.text)
    except KeyboardInterrupt:
        _say(llama, " [stopped]")
    finally:
        events.close()
    return "".join(parts)


def _say(llama: Llama, text: str) -> None:
    if llama.ranks.leads:
        print(text, end="", flush=True)


@SetParseFns(**PATHS)  # type: ignore[untyped-decorator]
def info(ckpt_dir: str | None = None) -> None:
    """What a checkpoint is: its sizes, parameters, bytes, and the cache that a token takes. Reads no weights."""
    checkpoint = open_checkpoint(EMBEDDED if ckpt_dir is None else ckpt_dir)
    args = checkpoint.args()
    with torch.device("meta"):
        model = Transformer(args)
    parameters = sum(p.numel() for p in model.parameters())
    stored = next(iter(checkpoint.tensor(name, args).dtype for name in checkpoint.names()))
    width = stored.itemsize
    kv = 2 * args.n_layers * args.n_kv_heads * args.head_dim * width
    print(f"{checkpoint.path}: {checkpoint.n_shards} shard{'s' if checkpoint.n_shards > 1 else ''}")
    for name, value in {**args.to_params(), "head_dim": args.head_dim, "hidden_dim": args.hidden_dim}.items():
        print(f"  {name:20} {value}")
    print(f"  {'parameters':20} {parameters:,}")
    print(f"  {'weights':20} {parameters * width:,} bytes in {str(stored).removeprefix('torch.')}")
    print(f"  {'KV cache':20} {kv:,} bytes a token in {str(stored).removeprefix('torch.')}")


COMMANDS: dict[str, Callable[..., None]] = {"complete": complete, "infill": infill, "chat": chat, "info": info}


def run(component: Any, name: str | None = None) -> None:
    """Runs a function, or a table of them, as a command by fire. What a user got wrong is one paragraph on rank 0's
    standard error and exit code 1 on every rank."""
    leads = os.environ.get("RANK", "0") == "0"
    # A function that takes any option takes --help for one, so fire is asked behind its own mark.
    if "--help" in sys.argv and "--" not in sys.argv:
        sys.argv = [*(word for word in sys.argv if word != "--help"), "--", "--help"]
    # "-" is a file's name here (standard input), not fire's separator.
    words = [*sys.argv[1:], *([] if "--" in sys.argv else ["--"]), "--separator=\x1f"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda note, *_, **__: print(f"note: {note}", file=sys.stderr) if leads else None
            fire.Fire(component, words, name=name)
    except ValueError as error:
        if leads:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except LostRank as error:  # rank 0 may be the lost one, so each says it
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        parallel.stop()


def main() -> None:
    """The console script `codellama`."""
    commands: dict[str, Any] = dict(COMMANDS)
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    for room, (place, summary) in ROOMS.items():
        if room == verb:
            module, _, name = place.partition(":")
            commands[room] = getattr(importlib.import_module(module), name)
        else:
            commands[room] = partial(print, summary)
            commands[room].__doc__ = summary
    run(commands, name="codellama")
