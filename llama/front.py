"""The front: words become objects.

What the core takes as functions and objects, people say in words: `quantize="int8"`, `fast=True`, `dtype="bfloat16"`.
The command line, a server and Python users say them to `load`, and this is the one place that knows what they mean.
A room is imported when its word is said.
"""

from __future__ import annotations

import inspect
import os
import runpy
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import Weights
from llama.config import RopeScaling
from llama.generation import Llama
from llama.model import Transformer
from llama.parallel import Ranks
from llama.rope import SPECTRA
from llama.system import DTYPES


def load(
    ckpt_dir: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    *,
    dtype: torch.dtype | str | None = None,
    rope_scaling: RopeScaling | str | None = None,
    prefill_chunk: int = 512,
    lookup: int = 0,
    quantize: str | None = None,
    fast: bool = False,
    compile: bool = False,
    kv_dtype: str | None = None,
    **options: Any,
) -> Llama:
    """`Llama.build`, which explains the other options, in words.

    `dtype` is float32, bfloat16 or float16; `rope_scaling` may be the name of a scheme, or FILE.py:FUNCTION for one of
    your own. `quantize` is a scheme of llama/quantize: int8, int8-dynamic, int4, int4-dynamic, nf4 ... `fast` puts in
    the blocks of llama/fast, and `compile` compiles them for fixed shapes. `kv_dtype` int8 gives a cache of a byte a
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
        if fast or compile:
            from llama.fast import prepare_

            prepare_(model, prefill_chunk, fast, compile, ranks.leads, lookup)

    limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size, "prefill_chunk": prefill_chunk}
    given = {**limits, **options, "lookup": lookup, "dtype": dtype, "rope_scaling": scaling_of(rope_scaling)}
    return Llama.build(ckpt_dir, tokenizer_path, **given, load=read, prepare=prepare)


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
    scheme = runpy.run_path(path).get(name)
    if not callable(scheme):
        raise ValueError(f"{path} has no function {name}; a scheme is one of (head_dim, theta, length, *, ...)")
    known = SPECTRA.get(name)
    if known is not None and inspect.getfile(known) != path:
        raise ValueError(f"there is a scheme {name!r} already; give the function in {path} another name")
    SPECTRA[name] = scheme
    return name
