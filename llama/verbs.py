"""The verbs of one person at a terminal: `codellama complete`, `infill` and `info`, and what `chat` shares with them.

Text is written as it comes. Under torchrun rank 0 reads and prints, and the others follow.
"""

from __future__ import annotations

import functools
import io
import os
import re
import sys
import tokenize
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from llama.options import (
    Amount,
    Loading,
    MaybeCount,
    MaybeExisting,
    MaybePath,
    MaybeTarget,
    MaybeText,
    Positional,
    Seed,
    Share,
    Stops,
    Temperature,
)

if TYPE_CHECKING:
    from llama.generation import Llama
    from llama.requests import Event
    from llama.serve.client import Server

FILL = "<FILL>"


def complete(
    prompt: Positional[str],
    *,
    temperature: Temperature = 0.2,
    top_p: Share = 0.9,
    top_k: MaybeCount = None,
    max_gen_len: Amount = 256,
    stop: Stops = (),
    seed: Seed = 1,
    echo: bool = True,
    server: MaybeText = None,
    load_cache: MaybeExisting = None,
    save_cache: MaybeTarget = None,
    **loading: Unpack[Loading],
) -> None:
    r"""Continues PROMPT ("-": standard input) and prints both.

    Args:
        prompt: the text. One that begins with a hyphen stands at the end, after --.
        temperature: how much chance there is in each choice (0: none, always the likeliest token).
        top_p: draw from the likeliest tokens that have this share of the probability.
        top_k: draw from so many of the likeliest tokens.
        max_gen_len: tokens of the answer at most.
        stop: end before this text; may be given several times; \n is a line end.
        seed: of the draws; the same seed gives the same answer.
        echo: print the prompt as well.
        server: the address of a running `codellama serve`, or of another server of OpenAI's API, to write the answer.
        load_cache: a file made by --save_cache: what it holds of the prompt isn't read again.
        save_cache: a file to keep what was read and written.
    """
    # Read before anything is loaded.
    text = _prompt_text(prompt) if os.environ.get("RANK", "0") == "0" else ""
    if server is not None:
        body = {"prompt": text, "max_tokens": max_gen_len, "temperature": temperature, "top_p": top_p, "seed": seed}
        body |= ({"top_k": top_k} if top_k else {}) | ({"stop": list(stop)} if stop else {})
        _complete_by(server_of(server, loading, load_cache, save_cache), body, text if echo else "")
        return
    llama = load_to_use(loading, seed)
    text = llama.ranks.broadcast_object(text)
    with cache_files(llama, load_cache, save_cache):
        events = llama.stream([text], max_gen_len, temperature, top_p, top_k=top_k, stop=stop, seed=seed)
        say(llama, text if echo else "")
        print_stream(llama, events)
        say(llama, "\n")


def infill(
    file: Positional[str],
    *,
    in_place: bool = False,
    only: bool = False,
    encoding: MaybeText = None,
    temperature: Temperature = 0.0,
    top_p: Share = 0.9,
    max_gen_len: Amount = 256,
    suffix_first: bool = False,
    stop: Stops = (),
    seed: Seed = 1,
    load_cache: MaybeExisting = None,
    save_cache: MaybeTarget = None,
    **loading: Unpack[Loading],
) -> None:
    r"""Prints FILE ("-": standard input) with what is missing filled in: at each <FILL>, or at FILE:LINE:COLUMN.

    Args:
        file: a file with one or several <FILL>, or FILE:LINE:COLUMN, both counted from 1.
        in_place: change the file itself, and print nothing.
        only: print what is filled in alone.
        encoding: of the file (default: what its first lines say, as Python reads it, or UTF-8).
        temperature: how much chance there is in each choice (0: none, always the likeliest token).
        top_p: draw from the likeliest tokens that have this share of the probability.
        max_gen_len: tokens of each filled place at most.
        suffix_first: tell the model the text behind the gap before the text in front of it (SPM).
        stop: end before this text; may be given several times; \n is a line end.
        seed: of the draws; the same seed gives the same answer.
        load_cache: a file made by --save_cache: what it holds of the prompt isn't read again.
        save_cache: a file to keep what was read and written.
    """
    if in_place and file == "-":
        raise ValueError("--in_place needs a file; for standard input leave it out")
    path, name, parts, used = Path(), "", [""], ""
    if os.environ.get("RANK", "0") == "0":  # before anything is loaded
        path, name, parts, used = _parts_to_fill(file, encoding)
    llama = load_to_use(loading, seed)
    from llama.prompts import infilling

    parts = llama.ranks.broadcast_object(parts)

    def show(text: str) -> None:
        if not in_place:
            say(llama, text)

    text, cut = parts[0], list[int]()
    line_end = "\r\n" if "\r\n" in parts[0] + parts[-1] else "\n"
    with cache_files(llama, load_cache, save_cache):
        show("" if only else text)
        for at, part in enumerate(parts[1:], 1):
            # What stands behind the next gaps is known; the gaps themselves are left out.
            prompt = infilling(llama.tokenizer, text, "".join(parts[at:]), suffix_first)
            events = llama.stream([prompt], max_gen_len, temperature, top_p, stop=stop, seed=seed)
            written = _with_line_ends(events, line_end, at, cut)
            text += print_stream(llama, written, show, stoppable=not in_place) + part
            show("\n" if only else part)
    if in_place and llama.ranks.leads:
        _replace(path, text.encode(used))
        print(f"{name}: {len(parts) - 1} place{'s' if len(parts) > 2 else ''} filled in", file=sys.stderr)
    for at in cut if llama.ranks.leads else ():
        print(f"place {at} was cut after {max_gen_len} tokens: a larger --max_gen_len gives more", file=sys.stderr)


def _with_line_ends(
    events: Generator[Event, None, None], line_end: str, place: int, cut: list[int]
) -> Generator[Event, None, None]:
    """Events whose text has the file's line ends. Adds the place to `cut` where an answer didn't end by itself."""
    try:
        for event in events:
            if event.finish_reason == "length":
                cut.append(place)
            # A model that has read CRLF may write either.
            yield replace(event, text=event.text.replace("\r", "").replace("\n", line_end))
    finally:
        events.close()


def info(ckpt_dir: Positional[MaybePath] = None, *, json: bool = False) -> None:
    """What a checkpoint is: its sizes, parameters, bytes, and the cache that a token takes. Reads no weights.

    Args:
        ckpt_dir: a folder or a .gguf file (default: the embedded checkpoint).
        json: print JSON instead.
    """
    from json import dumps

    import torch

    from llama.checkpoint import open_checkpoint
    from llama.front import context_of
    from llama.generation import EMBEDDED
    from llama.model import Transformer

    checkpoint = open_checkpoint(EMBEDDED if ckpt_dir is None else ckpt_dir)
    args = checkpoint.args()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(args).parameters())
    stored = next(iter(checkpoint.tensor(name, args).dtype for name in checkpoint.names()))
    dtype, width = str(stored).removeprefix("torch."), stored.itemsize
    kv = 2 * args.n_layers * args.n_kv_heads * args.head_dim * width
    sizes = {**args.to_params(), "head_dim": args.head_dim, "hidden_dim": args.hidden_dim}
    sizes["context"] = context_of(checkpoint, args)
    told = {"parameters": parameters, "weights": parameters * width, "KV cache": kv, "dtype": dtype}
    if json:
        print(dumps({"path": str(checkpoint.path), **sizes, **told}))
        return
    print(f"{checkpoint.path}: {checkpoint.n_shards} shard{'s' if checkpoint.n_shards > 1 else ''}")
    for name, value in sizes.items():
        print(f"  {name:20} {value}")
    print(f"  {'parameters':20} {parameters:,}")
    print(f"  {'weights':20} {parameters * width:,} bytes in {dtype}")
    print(f"  {'KV cache':20} {kv:,} bytes a token in {dtype}")


# What verbs share ----------------------------------------------------------------------------------------------------


def server_of(url: str, loading: Loading, *files: str | None) -> Server:
    """A running server, to be used instead of a model of one's own. ValueError for options that are the server's."""
    given = [*loading, *(["load_cache or --save_cache"] if any(files) else [])]
    if given:
        raise ValueError(f"--{given[0]} goes with a model in this process, not with --server: give it to the server")
    from llama.serve.client import Server

    return Server(url)


def _complete_by(server: Server, body: dict[str, Any], echoed: str) -> None:
    events = server.stream("/v1/completions", body)
    print(echoed, end="", flush=True)
    try:
        for event in events:
            print("".join(choice.get("text") or "" for choice in event.get("choices", ())), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    finally:
        events.close()
    print()


def load_to_use(loading: Loading, seed: int = 1) -> Llama:
    """A Llama for one person at a terminal: one row, the checkpoint's own context as memory allows, and fast on a CPU
    as soon as its kernels are compiled."""
    from llama.front import load

    given: dict[str, Any] = {"max_seq_len": None, "max_batch_size": 1, "fast": None, **loading}
    return load(**given, seed=seed)


@contextmanager
def cache_files(llama: Llama, load: str | None, save: str | None) -> Iterator[None]:
    """Restores what a file holds into the cache, and after the block writes one of what it holds then."""
    if load is None and save is None:
        yield
        return
    from llama.longcontext import saved_cache

    if load is not None:
        saved_cache.load_cache(llama, load)
    yield
    if save is not None:
        saved_cache.save_cache(llama, save)


def print_stream(
    llama: Llama, events: Generator[Event, None, None], show: Callable[[str], object] | None = None,
    stoppable: bool = True,
) -> str:  # fmt: skip
    """Shows one row's text as it comes (by default on rank 0's standard output) and returns it whole. Ctrl-C ends it
    there, on all ranks, and if it isn't `stoppable` the command too."""
    parts: list[str] = []
    show = show or functools.partial(say, llama)
    try:
        for event in events:
            parts.append(event.text)
            show(event.text)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        show(" [stopped]")
    finally:
        events.close()
    return "".join(parts)


def say(llama: Llama, text: str) -> None:
    if llama.ranks.leads:
        print(text, end="", flush=True)


def _prompt_text(prompt: str) -> str:
    given = (sys.stdin.buffer.read(), "standard input") if prompt == "-" else (os.fsencode(prompt), "the prompt")
    text, _ = decoded(*given, "utf-8")
    if not text:
        raise ValueError(f"{given[1]} is empty: give a text to continue")
    return text


def decoded(contents: bytes, name: str, encoding: str | None = None) -> tuple[str, str]:
    """A text and its encoding: the one given, or what Python takes a file to be in (PEP 263). Line ends stay as they
    are. ValueError for bytes that are in another."""
    if encoding is None:
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(contents).readline)
        except SyntaxError:
            encoding = "utf-8"
    try:
        return contents.decode(encoding), encoding
    except LookupError:
        raise ValueError(f"--encoding {encoding} is unknown to Python; try utf-8 or latin-1") from None
    except UnicodeDecodeError as error:
        found = f"{name} is not in {encoding} (byte 0x{contents[error.start]:02x} at {error.start:,})"
        raise ValueError(f"{found}: save it as UTF-8, or for a file say what it is in: --encoding latin-1") from None


def _parts_to_fill(file: str, encoding: str | None) -> tuple[Path, str, list[str], str]:
    """A file's path and name, its text in parts with a gap between each two, and its encoding."""
    placed = None if file == "-" or os.path.exists(file) else re.fullmatch(r"(.+?):(\d+):(\d+)", file, re.DOTALL)
    name = placed[1] if placed else file
    if file != "-" and not os.path.isfile(name):
        given = "is a folder" if os.path.isdir(name) else "is missing"
        if os.path.isfile(re.sub(r":\d+$", "", name)):
            given = "lacks a column"
        raise ValueError(f"{name} {given}; give a file with {FILL}, FILE:LINE:COLUMN, or - for standard input")
    contents = sys.stdin.buffer.read() if file == "-" else Path(name).read_bytes()
    text, used = decoded(contents, "standard input" if file == "-" else name, encoding)
    if placed is None:
        parts = text.split(FILL)
        if len(parts) == 1:
            raise ValueError(f"{name} has no place marked {FILL}; mark one or several, or give {name}:LINE:COLUMN")
        return Path(name), name, parts, used
    lines, line, column = re.split(r"(?<=\n)", text), int(placed[2]), int(placed[3])
    length = len(lines[line - 1].rstrip("\r\n")) if 1 <= line <= len(lines) else -1
    if not 1 <= column <= length + 1:
        allowed = f"line {line} has columns 1 to {length + 1}" if length >= 0 else f"it has lines 1 to {len(lines)}"
        raise ValueError(f"{name} has no line {line}, column {column}: {allowed}")
    at = sum(map(len, lines[: line - 1])) + column - 1
    return Path(name), name, [text[:at], text[at:]], used


def _replace(path: Path, contents: bytes) -> None:
    """Writes a file whole or not at all; its permissions stay, and so does a link to it."""
    from llama.system import replacing

    target = path.resolve()
    with replacing(target) as temporary:
        temporary.write_bytes(contents)
        temporary.chmod(target.stat().st_mode & 0o7777)
