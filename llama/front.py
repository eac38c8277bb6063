"""The front: words become objects.

What the core takes as functions and objects, people say in words: `quantize="int8"`, `fast=True`, `dtype="bfloat16"`.
The command line, a server and Python users say them to `load`, and this is the one place that knows what they mean.
A room is imported when its word is said.
"""

from __future__ import annotations

import inspect
import os
import runpy
import warnings
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import Weights, open_checkpoint
from llama.config import ModelArgs, RopeScaling
from llama.generation import EMBEDDED, Llama
from llama.model import Transformer
from llama.parallel import Ranks, start
from llama.rope import SPECTRA
from llama.system import DTYPES, default_dtype

EMBEDDED_CONTEXT = 2048
"""Tokens that the embedded checkpoint was trained on at most (its stage `long`)."""


def load(
    ckpt_dir: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    max_seq_len: int | None = 512,
    max_batch_size: int = 4,
    *,
    dtype: torch.dtype | str | None = None,
    rope_scaling: RopeScaling | str | None = None,
    prefill_chunk: int = 512,
    lookup: int = 0,
    quantize: str | None = None,
    fast: bool | None = False,
    compile: bool = False,
    kv_dtype: str | None = None,
    **options: Any,
) -> Llama:
    """`Llama.build`, which explains the other options, in words.

    `max_seq_len` None is the checkpoint's own context, or as much of it as the free memory has room for.
    `dtype` is float32, bfloat16 or float16; `rope_scaling` may be the name of a scheme, or FILE.py:FUNCTION for one of
    your own. `quantize` is a scheme of llama/quantize: int8, int8-dynamic, int4, int4-dynamic, nf4 ... `fast` puts in
    the blocks of llama/fast; None does so on a CPU if their kernels are compiled, and else compiles them in the
    background for the next time. `compile` compiles them for fixed shapes. `kv_dtype` int8 gives a cache of a byte a
    number. Raises ValueError for a word that is unknown, and, before a byte of the weights is read, where a run can't
    fit into the memory that is free: then with settings that would.
    """
    known = {**inspect.signature(Llama.build).parameters, **inspect.signature(load).parameters}
    unknown = [name for name in options if name not in known]
    if unknown:
        words = ", ".join(f"--{name}" for name in known if name not in ("load", "prepare", "options"))
        raise ValueError(f"unknown option --{unknown[0]}; there are {words}")
    if kv_dtype not in (None, "int8"):
        raise ValueError(f"--kv_dtype {kv_dtype} is unknown; there is int8, or leave it out for the model's own")
    if quantize is not None:
        from llama.quantize.schemes import scheme_of

        scheme_of(quantize)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype} is unknown; there are {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]

    def read(model: Transformer, checkpoint: Weights, ranks: Ranks, own_dtype: torch.dtype) -> None:
        from llama.interop.plan import require
        from llama.quantize.layers import quantize_load

        require(checkpoint, model.args, ranks, own_dtype, prefill_chunk, quantize, torch.int8 if kv_dtype else None)
        quantize_load(model, checkpoint, ranks, own_dtype, quantize)

    def prepare(model: Transformer, ranks: Ranks) -> None:
        if kv_dtype is not None:
            from llama.longcontext.int8_cache import int8_cache

            model.cache = int8_cache(model)
        use = fast
        if use is None:
            use = ranks.broadcast_object(_kernels_are_ready(ranks.device) if ranks.leads else False)
        if use or compile:
            from llama.fast import prepare_

            prepare_(model, prefill_chunk, use, compile, ranks.leads, lookup)

    scaling = scaling_of(rope_scaling)
    if max_seq_len is None:
        shared = {key: options[key] for key in ("model_parallel_size", "device", "timeout") if key in options}
        ranks = start(**shared)
        with ranks.all_ranks():
            settings = dtype or default_dtype(ranks.device), torch.int8 if kv_dtype else None, quantize, prefill_chunk
            found = _longest(ckpt_dir, ranks, max_batch_size, *settings) if ranks.leads else 0
        max_seq_len = ranks.broadcast_object(found)
    limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size, "prefill_chunk": prefill_chunk}
    given = {**limits, **options, "lookup": lookup, "dtype": dtype, "rope_scaling": scaling}
    return Llama.build(ckpt_dir, tokenizer_path, **given, load=read, prepare=prepare)


def context_of(checkpoint: Weights, args: ModelArgs) -> int:
    """Tokens that a checkpoint was made for: what its files say, or what its theta and scaling tell (Meta's don't)."""
    from llama.interop.huggingface import trained_context

    if checkpoint.path.resolve() == EMBEDDED.resolve():
        return EMBEDDED_CONTEXT
    told = getattr(checkpoint, "context", None)
    return int(told) if told else trained_context(args)


def _longest(
    ckpt_dir: str | Path | None, ranks: Ranks, rows: int, dtype: torch.dtype, kv_dtype: torch.dtype | None,
    quantize: str | None, chunk: int,
) -> int:  # fmt: skip
    """The checkpoint's own context, or as much of it as there is memory for: 512 at least, which may be refused."""
    from llama.interop.plan import room_for

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is opened once more, and they are said then
        checkpoint = open_checkpoint(EMBEDDED if ckpt_dir is None else ckpt_dir)
        args = checkpoint.args(max_batch_size=rows)
        args.max_seq_len = max(512, context_of(checkpoint, args))
    scheme = quantize or getattr(checkpoint, "scheme", None)
    return max(512, room_for(args, ranks, dtype, chunk, None if scheme is None else str(scheme), kv_dtype))


def _kernels_are_ready(device: torch.device) -> bool:
    """Whether a CPU's compiled kernels are there; where they aren't but could be, starts to compile them for the next
    time, and says so."""
    if device.type != "cpu":
        return False
    from llama.kernels import library

    if library.is_compiled():
        return library.available()
    if library.compile_in_background():
        note = "the fast kernels are being compiled in the background (about half a minute); this run does without"
        warnings.warn(note, stacklevel=2)
    return False


def scaling_of(word: RopeScaling | str | None) -> RopeScaling | None:
    """A `rope_scaling` from its name, or with a function of a user's own in it."""
    scaling = {"rope_type": word} if isinstance(word, str) else word
    if isinstance(scaling, dict) and ".py:" in str(scaling.get("rope_type")):
        return {**scaling, "rope_type": register_scheme(scaling["rope_type"])}
    return scaling


def register_scheme(place: str) -> str:
    """Puts a RoPE scheme of a user's own into the table of schemes: "FILE.py:FUNCTION", a function like those of
    rope.py. Returns its name there, which is the function's."""
    path, _, name = place.rpartition(":")
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}; give a scheme of your own as FILE.py:FUNCTION")
    try:
        scheme = runpy.run_path(path).get(name)
    except Exception as error:  # whatever a user's file may raise
        raise ValueError(f"{path} can't be run ({type(error).__name__}: {error}): mend it, and try it alone") from error
    if not callable(scheme):
        raise ValueError(f"{path} has no function {name}; a scheme is one of (head_dim, theta, length, *, ...)")
    known = SPECTRA.get(name)
    if known is not None and inspect.getfile(known) != path:
        raise ValueError(f"there is a scheme {name!r} already; give the function in {path} another name")
    SPECTRA[name] = scheme
    return name
