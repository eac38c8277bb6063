"""Whether it will fit, before anything is loaded; and if not, what would.

memory.py counts the bytes. Here they meet a device: what does not fit is planned again with other settings (a shorter
context, fewer rows, more ranks, fewer bits a weight …), one by one and several together, each to the nearest value with
which it does. So every suggestion is itself a plan, and one that fits.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch

from llama.checkpoint import Weights, open_checkpoint
from llama.config import PRESETS, ModelArgs
from llama.errors import NotEnoughMemory
from llama.front import EMBEDDED_CONTEXT
from llama.generation import EMBEDDED
from llama.interop.huggingface import trained_context
from llama.interop.layout import read_args, read_json
from llama.interop.memory import Device, Plan, Settings, plan
from llama.options import Count, MaybeCount, MaybeDtype, MaybeQuantize, Positional, choice, spec
from llama.parallel import Ranks
from llama.system import DTYPES, free_memory

USABLE = 0.95
"""Of a device's memory. The rest is left to the driver's own needs, to gaps between blocks, and to a plan's error."""
IGNORE = "CODELLAMA_IGNORE_PLAN"
"""An environment variable: with any value, `require` lets everything pass."""
KV_DTYPES = {**DTYPES, "float8": torch.float8_e4m3fn, "int8": torch.int8}
UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
NEAREST = 3
"""So many suggestions stand in an error's one sentence."""
DEVICES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB, as sold
BITS = (None, "int8", "int4")
"""Of weights: what is suggested where nothing was asked for."""
SHORT_CHUNK = 64
SLOTS = 128  # contexts are suggested in multiples of this


def fits(planned: Plan, memory: int) -> bool:
    """Whether a device of so many bytes holds a rank of it."""
    return planned.total <= USABLE * memory


def changed(planned: Plan, **settings: Any) -> Plan:
    """The plan with other settings, or another max_seq_len or max_batch_size; ValueError as `plan`."""
    limits = {name: settings.pop(name) for name in ("max_seq_len", "max_batch_size") if name in settings}
    return plan(dataclasses.replace(planned.args, **limits), dataclasses.replace(planned.settings, **settings))


def alternatives(planned: Plan, memory: int) -> list[Plan]:
    """Every plan that fits `memory` bytes and gives up no more than it must, the nearest first.

    What may be given up: bytes of a number (2), of a weight (int8, int4) and of the cache (int8), tokens of a chunk,
    rows, the context, a single rank. One of them by itself comes before two together, and so on. A plan that gives up
    as much as another of each kind, and more of one, is left out. May be empty.
    """
    found = list(_candidates(planned, memory))
    if not found and planned.settings.prefill_chunk > SHORT_CHUNK:  # a chunk by itself hardly helps, so it comes last
        found = list(_candidates(changed(planned, prefill_chunk=SHORT_CHUNK), memory))
    every = {tuple(_options(one).values()): one for one in found}
    losses = {key: _losses(planned, found) for key, found in every.items()}

    def bettered(key: tuple[Any, ...]) -> bool:
        own = losses[key]
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in losses.values())

    left = [key for key in every if not bettered(key)]
    return [every[key] for key in sorted(left, key=lambda key: (sum(map(bool, losses[key])), losses[key][::-1]))]


def _losses(planned: Plan, other: Plan) -> tuple[float, ...]:
    """What is given up of each kind, from the least painful to the most; 0 is nothing."""
    (_, own), (_, its) = (planned.args, planned.settings), (other.args, other.settings)
    return (
        float(own.dtype.itemsize - its.dtype.itemsize),
        own.prefill_chunk / its.prefill_chunk - 1,
        float(its.kv_dtype != own.kv_dtype),
        float(BITS.index(its.quantize) if its.quantize != own.quantize else 0),
        planned.args.max_batch_size / other.args.max_batch_size - 1,
        planned.args.max_seq_len / other.args.max_seq_len - 1,
        its.model_parallel_size / own.model_parallel_size - 1,
    )


def _candidates(planned: Plan, memory: int) -> Iterator[Plan]:
    """Plans that fit: what has few values in every combination, and of what has many, one at a time, the nearest; rows
    and another together, with one row."""
    args, settings = planned.args, planned.settings
    chunks = [n for n in (256, 128, SHORT_CHUNK) if n < min(settings.prefill_chunk, args.max_seq_len)]
    near = _first_that_fits(planned, "prefill_chunk", chunks, memory)
    if near is not None:
        yield near
    few: dict[str, list[Any]] = {
        "dtype": [settings.dtype, *([torch.bfloat16] if settings.dtype.itemsize > 2 else [])],
        "quantize": [None, *BITS[1:]] if settings.quantize is None else [settings.quantize],
        "kv_dtype": [settings.kv_dtype, *([torch.int8] if settings.kv_dtype is None else [])],
    }
    # Each one's values take less and less memory, so that the first that fits can be found by halving.
    many: dict[str, list[int]] = {
        "max_batch_size": list(range(args.max_batch_size - 1, 0, -1)),
        "max_seq_len": list(range((args.max_seq_len - 1) // SLOTS * SLOTS, 0, -SLOTS)),
        "model_parallel_size": [
            n for n in range(settings.model_parallel_size + 1, args.n_heads + 1) if _can_be_shared(planned, n)
        ],
    }
    for values in itertools.product(*few.values()):
        start = dict(zip(few, values, strict=True))
        for rows in sorted({args.max_batch_size, 1}, reverse=True):
            now = changed(planned, **start, max_batch_size=rows)
            if fits(now, memory):
                yield now
                continue
            for name, of_it in many.items():
                near = _first_that_fits(now, name, [n for n in of_it if name != "max_batch_size" or n < rows], memory)
                if near is not None:
                    yield near


def _first_that_fits(planned: Plan, name: str, values: list[int], memory: int) -> Plan | None:
    at = bisect.bisect_left(values, True, key=lambda value: fits(changed(planned, **{name: value}), memory))
    return changed(planned, **{name: values[at]}) if at < len(values) else None


def _can_be_shared(planned: Plan, ranks: int) -> bool:
    try:
        changed(planned, model_parallel_size=ranks)
    except ValueError:
        return False
    return True


def difference(planned: Plan, other: Plan) -> str:
    """The options that lead from `planned` to `other`: "--max_seq_len 4096 --quantize int8"."""
    words = []
    for name, value in _options(other).items():
        if value != _options(planned)[name]:
            words.append(f"--{name} {str(value).removeprefix('torch.')}")
    return " ".join(words)


def _options(planned: Plan) -> dict[str, Any]:
    limits = {name: getattr(planned.args, name) for name in ("max_seq_len", "max_batch_size")}
    return {**limits, **{field.name: getattr(planned.settings, field.name) for field in dataclasses.fields(Settings)}}


def describe(planned: Plan) -> str:
    """The sizes as a table, in decimal units."""
    rows = {
        "weights": planned.weights,
        "KV cache": planned.kv_cache,
        "rotation tables": planned.tables,
        "at most, of": max(planned.making_tables, planned.prefill, planned.decode),
        "  prefill": planned.prefill,
        "  decode": planned.decode,
        "total": planned.total,
    }
    return "\n".join(f"  {name:16} {spelled(size):>10}" for name, size in rows.items())


def verdict(planned: Plan, memory: int) -> str:
    """Whether it fits a device of `memory` bytes, and all settings that would, the nearest first."""
    room = f"{spelled(memory)}, of which {USABLE:.0%} are counted on"
    if fits(planned, memory):
        return f"fits: {spelled(planned.total)} a rank, and the device has {room}"
    lines = [f"does not fit: {spelled(planned.total)} a rank, but the device has {room}"]
    near = alternatives(planned, memory)
    if not near:
        return f"{lines[0]}; nor would one row, 4 bits a weight, and a shorter context or more ranks"
    lines += ["what would fit instead, the nearest first:"]
    options = [difference(planned, other) for other in near]
    width = max(map(len, options))
    lines += [
        f"  {words:{width}} {spelled(other.total):>10} a rank" for words, other in zip(options, near, strict=True)
    ]
    return "\n".join(lines)


def spelled(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def require(
    checkpoint: Weights,
    args: ModelArgs,
    ranks: Ranks,
    dtype: torch.dtype,
    prefill_chunk: int = 512,
    quantize: str | None = None,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """Raises NotEnoughMemory, in the plan's words, where a run can't fit into what is free on this rank's device now.

    Of the checkpoint it is asked only whether it is quantised already. What exceeds the free memory by no more than a
    plan's error of 5 % passes, and so does everything where that is not known (neither CUDA nor Linux), or where the
    environment variable CODELLAMA_IGNORE_PLAN is set. Ranks on one machine's CPU are taken to share its memory.
    """
    free = free_memory(ranks.device)
    if free is None or os.environ.get(IGNORE):
        return
    device: Device = "cuda" if ranks.device.type == "cuda" else "cpu"
    scheme = quantize or getattr(checkpoint, "scheme", None)
    kept = None if scheme is None else str(scheme)
    planned = plan(args, Settings(ranks.world_size, dtype, kv_dtype, kept, prefill_chunk, device))
    if USABLE * planned.total > free:
        near = alternatives(planned, free)[:NEAREST]
        others = "; ".join(difference(planned, other) for other in near) or "nothing near to it"
        raise NotEnoughMemory(
            f"this needs {spelled(planned.total)} on each rank ({spelled(planned.weights)} of weights, "
            f"{spelled(planned.kv_cache)} of KV cache), but {ranks.device} has {spelled(free)} free. What would fit: "
            f"{others}. `codellama plan` shows more; set {IGNORE}=1 to try all the same"
        )


def room_for(
    args: ModelArgs, ranks: Ranks, dtype: torch.dtype, prefill_chunk: int, quantize: str | None,
    kv_dtype: torch.dtype | None,
) -> int:  # fmt: skip
    """`args.max_seq_len`, or the most slots a row for which there is memory now; 0 where nothing fits."""
    free = free_memory(ranks.device)
    device: Device = "cuda" if ranks.device.type == "cuda" else "cpu"
    planned = plan(args, Settings(ranks.world_size, dtype, kv_dtype, quantize, prefill_chunk, device))
    if free is None or fits(planned, free):
        return args.max_seq_len
    shorter = list(range((args.max_seq_len - 1) // SLOTS * SLOTS, 0, -SLOTS))
    near = _first_that_fits(planned, "max_seq_len", shorter, free)
    return 0 if near is None else near.args.max_seq_len


def parse_size(text: str) -> int:
    """Bytes from "80GB" (decimal, as devices are sold), "80GiB", or a plain number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]i?B)?\s*", text, re.IGNORECASE)
    unit = (found[2] or "").upper() if found else "?"
    if found is None or unit not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"a size of {text!r} can't be read: write it as 80GB, 79.6GiB, or a number of bytes")
    size = int(float(found[1]) * UNITS[unit])
    if size < 2**20:
        raise ValueError(f"a size of {text!r} is {size:,} bytes: write it with its unit, as {found[1]}GB")
    return size


def architecture(model: str, **limits: Any) -> ModelArgs:
    """Of a preset by its name, in either case, or of a folder's params.json or config.json, or of a .gguf file. Limits
    that are None are the model's own: its context, and 1 row."""
    preset = PRESETS.get(model.upper())
    rows = limits.get("max_batch_size") or 1
    if preset is not None:
        args = ModelArgs(**preset, max_batch_size=rows)
    elif Path(model).is_dir():
        args = read_args(Path(model), max_batch_size=rows)
    elif Path(model).is_file():
        args = open_checkpoint(model).args(max_batch_size=rows)
    else:
        raise ValueError(f"{model} is neither a folder nor one of {', '.join(PRESETS)}: give one of these")
    args.max_seq_len = limits.get("max_seq_len") or _own_context(Path(model), args)
    return args


def _own_context(path: Path, args: ModelArgs) -> int:
    if path.resolve() == EMBEDDED.resolve():
        return EMBEDDED_CONTEXT
    told: Any = None
    if (path / "config.json").is_file() and not (path / "params.json").is_file():
        told = read_json(path / "config.json").get("max_position_embeddings")
    elif path.is_file():
        told = getattr(open_checkpoint(path), "context", None)
    return told if isinstance(told, int) and told > 0 else trained_context(args)


def command(
    model: Positional[str],
    *,
    max_seq_len: MaybeCount = None,
    max_batch_size: Count = 1,
    model_parallel_size: Count = 1,
    dtype: MaybeDtype = None,
    kv_dtype: Annotated[str | None, choice(KV_DTYPES)] = None,
    quantize: MaybeQuantize = None,
    device_memory: Annotated[int | None, spec("80GB|79.6GiB", parse_size)] = None,
    prefill_chunk: Count = 512,
    device: Device = "cuda",
) -> None:
    """What a run of MODEL takes of each rank's memory, whether that fits, and what would. Reads no weights.

    Args:
        model: 7B, 13B, 34B or 70B; a folder with a params.json or config.json; or a .gguf file.
        max_seq_len: slots of the cache, prompt and answer together (none: the model's own context).
        max_batch_size: rows of the cache: 1 is a conversation.
        model_parallel_size: ranks that share the model.
        dtype: of weights and activations (none: bfloat16, on a CPU float32).
        kv_dtype: of the cache (none: as dtype).
        quantize: weights in fewer bits: int8, int8-dynamic, int4 (int4:64, int4:128), int4-dynamic or nf4.
        device_memory: of each rank (none: what is free here, if the device is).
        prefill_chunk: prompt tokens that are read in a step, of all rows together.
        device: what it runs on.
    """
    args = architecture(model, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    settings = Settings(
        model_parallel_size,
        DTYPES[dtype or ("float32" if device == "cpu" else "bfloat16")],
        None if kv_dtype is None else KV_DTYPES[kv_dtype],
        quantize,
        prefill_chunk,
        device,
    )
    planned = plan(args, settings)
    ranks = f"{model_parallel_size} rank{'s' if model_parallel_size > 1 else ''}"
    rows = f"{max_batch_size} row{'s' if max_batch_size > 1 else ''} of {args.max_seq_len:,} tokens"
    print(f"{model} on {ranks}, {rows}, read in chunks of {prefill_chunk}; each rank:")
    print(describe(planned))
    memory = device_memory
    if memory is None and (device == "cpu" or torch.cuda.is_available()):
        memory = free_memory(torch.device(device))
    if memory is not None:
        print(verdict(planned, memory))
    else:
        enough = [size for size in DEVICES if fits(planned, size * 10**9)]
        print(f"fits devices of {enough[0]} GB or more" if enough else "no single device holds that: use more ranks")
