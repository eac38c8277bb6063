"""Whether it will fit, before anything is loaded; and if not, what would.

memory.py counts the bytes. Here they meet a device: what does not fit is planned again with one setting changed at a
time (a shorter context, fewer rows, more ranks, fewer bits a weight …), to the nearest value with which it does. So
every suggestion is itself a plan, and one that fits.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from fire.decorators import SetParseFns

from llama.checkpoint import Weights
from llama.config import PRESETS, ModelArgs
from llama.interop.layout import read_args
from llama.interop.memory import Device, Plan, Settings, plan
from llama.parallel import Ranks
from llama.system import DTYPES, free_memory

USABLE = 0.95
"""Of a device's memory. The rest is left to the driver's own needs, to gaps between blocks, and to a plan's error."""
IGNORE = "CODELLAMA_IGNORE_PLAN"
"""An environment variable: with any value, `require` lets everything pass."""
KV_DTYPES = {**DTYPES, "float8": torch.float8_e4m3fn, "int8": torch.int8}
UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
DEVICES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB, as sold
SLOTS = 128  # contexts are suggested in multiples of this


def fits(planned: Plan, memory: int) -> bool:
    """Whether a device of so many bytes holds a rank of it."""
    return planned.total <= USABLE * memory


def changed(planned: Plan, **settings: Any) -> Plan:
    """The plan with other settings, or another max_seq_len or max_batch_size; ValueError as `plan`."""
    limits = {name: settings.pop(name) for name in ("max_seq_len", "max_batch_size") if name in settings}
    return plan(dataclasses.replace(planned.args, **limits), dataclasses.replace(planned.settings, **settings))


def alternatives(planned: Plan, memory: int) -> list[Plan]:
    """Plans that fit `memory` bytes, each the nearest by one kind of change. Where none does, the same from the first
    of these on: 2 bytes a number, 8 bits a weight, 4 bits, one row, one row and 8 or 4 bits. May be empty."""
    narrow = {"dtype": torch.bfloat16} if planned.settings.dtype.itemsize > 2 else {}
    bits = [{"quantize": kind} for kind in ("int8", "int4")] if planned.settings.quantize is None else []
    one_row = {"max_batch_size": 1}
    starts: list[dict[str, Any]] = [{}, narrow, *({**narrow, **kind} for kind in bits), {**narrow, **one_row}]
    starts += [{**narrow, **one_row, **kind} for kind in bits]
    found = (list(_nearest(changed(planned, **start), memory)) for start in starts)
    return next((plans for plans in found if plans), [])


def _nearest(planned: Plan, memory: int) -> Iterator[Plan]:
    """The nearest plan that fits, by each kind of change by which there is one."""
    args, settings = planned.args, planned.settings
    ranks = range(settings.model_parallel_size + 1, args.n_heads + 1)
    # Each kind's values take less and less memory, so that the first that fits can be found by halving.
    kinds: dict[str, list[Any]] = {
        "dtype": [torch.bfloat16] if settings.dtype.itemsize > 2 else [],
        "prefill_chunk": [n for n in (256, 128, 64) if n < min(settings.prefill_chunk, args.max_seq_len)],
        "quantize": ["int8", "int4"] if settings.quantize is None else [],
        "max_batch_size": list(range(args.max_batch_size - 1, 0, -1)),
        "max_seq_len": list(range((args.max_seq_len - 1) // SLOTS * SLOTS, 0, -SLOTS)),
        "model_parallel_size": [n for n in ranks if _can_be_shared(planned, n)],
    }
    for name, values in kinds.items():

        def enough(value: Any, name: str = name) -> bool:
            return fits(changed(planned, **{name: value}), memory)

        at = bisect.bisect_left(values, True, key=enough)
        if at < len(values):
            yield changed(planned, **{name: values[at]})


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
    """Whether it fits a device of `memory` bytes, and the settings nearest to these that would."""
    room = f"{spelled(memory)}, of which {USABLE:.0%} are counted on"
    if fits(planned, memory):
        return f"fits: {spelled(planned.total)} a rank, and the device has {room}"
    lines = [f"does not fit: {spelled(planned.total)} a rank, but the device has {room}"]
    near = alternatives(planned, memory)
    if not near:
        return f"{lines[0]}; nor would one row, 4 bits a weight, and a shorter context or more ranks"
    lines += ["what would fit instead:"]
    lines += [f"  {difference(planned, other):40} {spelled(other.total):>10} a rank" for other in near]
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
    """Raises ValueError, in the plan's words, where a run can't fit into what is free on this rank's device now.

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
        near = alternatives(planned, free)
        others = "; ".join(difference(planned, other) for other in near) or "nothing near to it"
        raise ValueError(
            f"this needs {spelled(planned.total)} on each rank ({spelled(planned.weights)} of weights, "
            f"{spelled(planned.kv_cache)} of KV cache), but {ranks.device} has {spelled(free)} free. What would fit: "
            f"{others}. `codellama plan` shows more; set {IGNORE}=1 to try all the same"
        )


def parse_size(text: str) -> int:
    """Bytes from "80GB" (decimal, as devices are sold), "80GiB", or a plain number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]i?B)?\s*", text, re.IGNORECASE)
    unit = (found[2] or "").upper() if found else "?"
    if found is None or unit not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"a size of {text!r} can't be read: write it as 80GB, 79.6GiB, or a number of bytes")
    return int(float(found[1]) * UNITS[unit])


def architecture(model: str, **limits: Any) -> ModelArgs:
    """Of a preset by its name, in either case, or of a folder's params.json or config.json."""
    preset = PRESETS.get(model.upper())
    if preset is not None:
        return ModelArgs(**preset, **limits)
    if not Path(model).is_dir():
        raise ValueError(f"{model} is neither a folder nor one of {', '.join(PRESETS)}: give one of these")
    return read_args(Path(model), **limits)


def _dtype(word: str, option: str, known: dict[str, torch.dtype]) -> torch.dtype:
    if word not in known:
        raise ValueError(f"--{option} {word} is unknown; there are {', '.join(known)}")
    return known[word]


@SetParseFns(model=str, device_memory=str, dtype=str, kv_dtype=str, quantize=str, device=str)  # type: ignore[untyped-decorator]
def command(
    model: str,
    *,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    model_parallel_size: int = 1,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    quantize: str | None = None,
    device_memory: str | None = None,
    prefill_chunk: int = 512,
    device: str = "cuda",
) -> None:
    """What a run of MODEL takes of each rank's memory, whether that fits, and what would. Reads no weights.

    Args:
        model: 7B, 13B, 34B or 70B, or a folder with a params.json or config.json.
        max_seq_len: slots of the cache, prompt and answer together.
        max_batch_size: rows of the cache.
        model_parallel_size: ranks that share the model.
        dtype: float32, bfloat16 or float16 (default: bfloat16, on a CPU float32).
        kv_dtype: of the cache, also float8 or int8 (default: as dtype).
        quantize: int8, int8-dynamic, int4 (int4:64, int4:128), int4-dynamic or nf4 weights.
        device_memory: of each rank, as 80GB or 79.6GiB (default: what is free here, if the device is).
        prefill_chunk: prompt tokens that are read in a step, of all rows together.
        device: cuda or cpu.
    """
    args = architecture(model, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    settings = Settings(
        model_parallel_size,
        _dtype(dtype or ("float32" if device == "cpu" else "bfloat16"), "dtype", DTYPES),
        None if kv_dtype is None else _dtype(kv_dtype, "kv_dtype", KV_DTYPES),
        quantize,
        prefill_chunk,
        cast("Device", device),
    )
    planned = plan(args, settings)
    ranks = f"{model_parallel_size} rank{'s' if model_parallel_size > 1 else ''}"
    print(
        f"{model} on {ranks}, {max_batch_size} x {max_seq_len:,} tokens, read in chunks of {prefill_chunk}; each rank:"
    )
    print(describe(planned))
    memory = parse_size(device_memory) if device_memory else None
    if memory is None and (device == "cpu" or torch.cuda.is_available()):
        memory = free_memory(torch.device(device))
    if memory is not None:
        print(verdict(planned, memory))
    else:
        enough = [size for size in DEVICES if fits(planned, size * 10**9)]
        print(f"fits devices of {enough[0]} GB or more" if enough else "no single device holds that: use more ranks")
