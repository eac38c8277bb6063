"""The options of every command, as types: what a word on the command line may be, and what it becomes.

A command is a function whose parameters are annotated with these. Each word is checked before anything is loaded, and
help shows what is allowed. Nothing here imports PyTorch, so help and a mistyped option are answered at once.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict
from tyro.conf import Positional as Positional  # for the commands
from tyro.conf import UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from llama.arguments import Range, checked

SCHEMES = ("int8", "int8-dynamic", "int4", "int4-dynamic", "nf4")
"""Of quantisation; the 4-bit ones of whole numbers may name the weights that share a scale: int4:64."""


def spec(metavar: str, read: Callable[[str], Any], write: Callable[[Any], str] = str) -> PrimitiveConstructorSpec[Any]:
    """An option of one word: how help calls it, what the word becomes (ValueError for one that may not be), and how a
    default is shown."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["none" if value is None else write(value)],
    )


def number(word: str, allowed: Range) -> Any:
    """The number that a word is. ValueError, with what is allowed, where it is none or out of range."""
    value: int | float | str = word
    for kind in (int, float):
        try:
            value = kind(word)
            break
        except ValueError:
            continue
    return checked("it", value, allowed)


def numbers(metavar: str, allowed: Range, none: bool = False) -> PrimitiveConstructorSpec[Any]:
    """One number within a range, or None where that is allowed."""
    return spec(metavar, lambda word: None if none and word in ("None", "none") else number(word, allowed))


def several(metavar: str, read: Callable[[str], Any]) -> PrimitiveConstructorSpec[Any]:
    """A list with commas between its items: 512,1024. Brackets around it and spaces within are ignored, and commas
    within {…} divide nothing."""

    def items(text: str) -> tuple[Any, ...]:
        found = [item.strip(" '\"") for item in re.split(r",(?![^{]*\})", text.strip("[]() "))]
        return tuple(read(item) for item in found if item)

    return spec(f"{metavar},…", items, lambda values: ",".join(map(str, values)) if values else "none")


def nearest(word: str, known: Sequence[str]) -> str:
    """ "; did you mean …?", or nothing where no known word is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """Reads one of a few words, such as the keys of a table."""

    def read(word: str) -> str:
        if word not in known:
            raise ValueError(f"{word!r} is unknown{nearest(word, list(known))} (there are {', '.join(known)})")
        return word

    return read


def choice(known: Collection[str]) -> PrimitiveConstructorSpec[Any]:
    """One of a few words, or None for "none given". (A `Literal` is for options that always have a value.)"""
    return spec("|".join(known), lambda word: None if word in ("None", "none") else one_of(known)(word))


def existing(word: str) -> str:
    if not os.path.exists(word):
        raise ValueError(f"there is no file or folder {word}")
    return word


def folder(word: str) -> str:
    """A folder to write to, which is made if it isn't there. ValueError where that can't be: to be known before the
    work of which the results would be lost."""
    place = os.path.abspath(word)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        reason = "may not be written to" if os.path.isdir(place) else "is no folder"
        raise ValueError(f"{word} can't be written, since {place} {reason}: choose another folder")
    return word


def target(word: str) -> str:
    """A file to write, in a folder that is made if it isn't there."""
    if os.path.isdir(word):
        raise ValueError(f"{word} is a folder: give a file's name")
    folder(os.path.dirname(os.path.abspath(word)))
    return word


def device(word: str) -> str:
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", word):
        raise ValueError(f"{word!r} is no device: give cpu, cuda, cuda:N or mps")
    return word


def quantization(word: str) -> str:
    """A scheme's word. The quantiser knows which groups each may have."""
    name = word.partition(":")[0]
    if name not in SCHEMES or not re.fullmatch(r"[a-z0-9-]+(:\d+)?", word):
        raise ValueError(f"{word!r} is unknown{nearest(name, SCHEMES)} (there are {', '.join(SCHEMES)}, int4:64 …)")
    return word


def scaling(word: str) -> Any:
    """A RoPE scheme: its name, FILE.py:FUNCTION, or a dictionary with its parameters."""
    if not word.lstrip().startswith("{"):
        return word
    try:
        found = ast.literal_eval(re.sub(r"\b(true|false|null)\b", lambda m: CONSTANTS[m[0]], word))
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f'{word!r:.80} can\'t be read: write it as \'{{"rope_type": "linear", "factor": 4}}\'')
    return found


def text(word: str) -> str:
    r"""A text in which \n, \t and \\ are what they are in Python."""
    return re.sub(r"\\[nrt\\]", lambda found: ESCAPES[found[0]], word)


def unset(meaning: str) -> Any:
    """What help says of an option's default where the option is left out."""
    return arg(help_behavior_hint=f"(default: {meaning})")


CONSTANTS = {"true": "True", "false": "False", "null": "None"}
ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\\\": "\\"}
MOST = 2**31 - 1
COUNT: Range = (int, "at least", 1, MOST)
AMOUNT: Range = (int, "at least", 0, MOST)
SEED: Range = (int, "at least", 0, 2**63 - 1)
SHARE: Range = (float, "at least", 0, 1)
ABOVE: Range = (float, "above", 0, 1e12)
BASE: Range = (float, "above", 1, 1e12)

Count = Annotated[int, numbers("N", COUNT)]
Amount = Annotated[int, numbers("N", AMOUNT)]
Seed = Annotated[int, numbers("N", SEED)]
MaybeSeed = Annotated[int | None, numbers("N", SEED, none=True)]
Temperature = Annotated[float, numbers("X", (float, "at least", 0, 100))]
Share = Annotated[float, numbers("0…1", SHARE)]
Above = Annotated[float, numbers("X", ABOVE)]
# With None for "none given". Not `Count | None`: tyro would take such a union apart, and report each part's error.
MaybeCount = Annotated[int | None, numbers("N", COUNT, none=True)]
MaybeAmount = Annotated[int | None, numbers("N", AMOUNT, none=True)]
MaybeAbove = Annotated[float | None, numbers("X", ABOVE, none=True)]
MaybeBase = Annotated[float | None, numbers("X", BASE, none=True)]
Counts = Annotated[tuple[int, ...], several("N", lambda word: number(word, COUNT))]
Shares = Annotated[tuple[float, ...], several("0…1", lambda word: number(word, SHARE))]
Numbers = Annotated[tuple[float, ...], several("X", lambda word: number(word, ABOVE))]
Amounts = Annotated[tuple[int, ...], several("N", lambda word: number(word, AMOUNT))]
Lengths = Annotated[tuple[int, ...], several("N", lambda word: number(word, (int, "at least", 2, MOST)))]
Bases = Annotated[tuple[float, ...], several("X", lambda word: number(word, BASE))]
Words = Annotated[tuple[str, ...], several("WORD", str)]
Path = Annotated[str, spec("PATH", str)]
MaybePath = Annotated[str | None, spec("PATH", str)]
MaybeText = Annotated[str | None, spec("TEXT", str)]
MaybeSources = Annotated[str | None, spec("PATH", existing), unset("held-out files of the standard library")]
MaybeExisting = Annotated[str | None, spec("PATH", existing)]
MaybeTarget = Annotated[str | None, spec("FILE", target)]
Out = Annotated[str, spec("FOLDER", folder)]
MaybeOut = Annotated[str | None, spec("FOLDER", folder)]
Device = Annotated[str, spec("cpu|cuda|cuda:N|mps", device)]
MaybeDevice = Annotated[str | None, spec("cpu|cuda|cuda:N|mps", device)]
Dtype = Literal["float32", "bfloat16", "float16"]
MaybeDtype = Annotated[str | None, choice(("float32", "bfloat16", "float16"))]
Quantize = Annotated[str, spec("SCHEME", quantization)]
MaybeQuantize = Annotated[str | None, spec("SCHEME", quantization)]
Schemes = Annotated[tuple[str, ...], several("SCHEME", quantization)]
Scaling = Annotated[Any, spec("NAME|FILE.py:FUNCTION|{…}", scaling, repr)]
Scalings = Annotated[tuple[Any, ...], several("NAME|FILE.py:FUNCTION|{…}", scaling)]
Stops = UseAppendAction[tuple[Annotated[str, spec("TEXT", text, repr)], ...]]


class Loading(TypedDict, total=False):
    """Of the model: the arguments of `llama.load`."""

    ckpt_dir: Annotated[Path, unset("the embedded checkpoint")]
    """A folder in Meta's or Hugging Face's format, or a .gguf file."""
    tokenizer_path: Annotated[Path, unset("the checkpoint's own")]
    """A tokenizer.model."""
    max_seq_len: Annotated[Count, unset("512, or as --lengths need; of complete, infill and chat: the model's own")]
    """Tokens of prompt and answer together that the cache has room for."""
    max_batch_size: Annotated[Count, unset("4; of complete, infill and chat: 1")]
    """Rows of the cache: sequences that are computed side by side."""
    model_parallel_size: Annotated[Count, unset("all that torchrun started")]
    """Ranks that share the model."""
    device: Annotated[Device, unset("a GPU if there is one")]
    """Where the model runs."""
    dtype: Annotated[Dtype, unset("bfloat16 on a GPU, float32 on a CPU")]
    """Of the weights."""
    rope_theta: Annotated[Above, unset("the checkpoint's")]
    """RoPE's base."""
    rope_scaling: Annotated[Scaling, unset("the checkpoint's")]
    """RoPE scheme: its name (linear, yarn …), a function of your own, or '{"rope_type": "linear", "factor": 4}'."""
    prefill_chunk: Annotated[Count, unset("512")]
    """Prompt tokens that are read in one step."""
    lookup: Annotated[Amount, unset("0")]
    """Propose so many tokens a step from what stands before: faster where code repeats itself, and the same text."""
    quantize: Annotated[Quantize, unset("as they are stored")]
    """Load weights in 8 or 4 bits: int8, int8-dynamic, int4, int4:64, int4-dynamic, nf4."""
    fast: Annotated[bool, unset("off; of complete, infill and chat: on, where a CPU has a C++ compiler")]
    """Fused steps in C++, which is compiled for this processor when it is first used."""
    compile: Annotated[bool, unset("off")]
    """Compile the model for fixed shapes, which is for GPUs."""
    kv_dtype: Annotated[Literal["int8"], unset("as dtype")]
    """Keep the cache in one byte a number."""
    timeout: Annotated[Above, unset("60")]
    """Seconds that a rank waits for the others."""
