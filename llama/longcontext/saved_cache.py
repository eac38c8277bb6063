"""A prefilled cache on disk: a long context is read once and answered from many times.

Reading 100,000 tokens takes minutes, and copying what was remembered of them takes seconds. So the keys and values of
row 0 can be written to a file, with the tokens they belong to, and restored into another process, where
`Llama.stream` then goes on as if it had read the tokens itself:

    for _ in llama.stream([repository], 1):           # reads it, and writes one token
        pass
    save_cache(llama, "repository.cache")
    …
    load_cache(llama, "repository.cache")             # another day
    llama.stream([repository + question])                 # reads the question alone

Keys and values mean something to the very model that made them, and to another they are noise that looks like text. So
the file names what made it: the architecture, the frequencies of the rotation, the dtypes, the ranks, and a digest of
the weights. What differs is said, and the file refused.

The format: arrays of numpy's .npy, one after the other in one file. First JSON as bytes, then the ids, then for each
layer the keys and the values of the filled slots, as the bytes they are in the cache, and last a SHA-256 of all that.
Nothing in it is ever run, and only one layer's bytes lie in memory beside the cache. On several ranks each has a file
of its own, NAME.00, NAME.01 …
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib.format import read_array, write_array
from numpy.typing import NDArray
from torch import Tensor

from llama.cache import KVCache
from llama.generation import Llama
from llama.parallel import Ranks
from llama.rope import spectrum
from llama.system import replacing

FORMAT = "codellama cache 1"
WHOLE = 2**28
"""Bytes. Weights that are no more than this together are hashed whole, in a fraction of a second."""
SAMPLES = 64
"""Of a tensor in larger weights, so many pieces of PIECE bytes are hashed, the first and the last among them."""
PIECE = 4096
BLOCK = 2**26  # bytes that are summed at once


def save_cache(llama: Llama, path: str | os.PathLike[str]) -> list[int]:
    """Writes what row 0 of the cache holds; returns those tokens. After a prompt that was streamed by itself these are
    its own and its answer's, but for the last, which was not read; after several at once, those of one of them.

    The file appears whole or not at all. Raises ValueError where row 0 holds nothing.
    """
    with llama.ranks.all_ranks():
        cache = llama.model.own_cache()
        tokens = list(cache.tokens[0])
        if not tokens:
            raise ValueError(
                "row 0 of the cache holds nothing that could be saved: stream one prompt, by itself, before it is saved"
            )
        header = json.dumps({"format": FORMAT, "made_by": fingerprint(llama)}).encode()
        known: list[NDArray[Any]] = [np.frombuffer(header, np.uint8), np.array(tokens, np.int64)]
        with replacing(_own_path(path, llama.ranks)) as temporary, open(temporary, "wb") as file:
            seal = hashlib.sha256()
            for array in chain(known, _filled(cache, len(tokens))):
                seal.update(array.data)
                write_array(file, array, allow_pickle=False)
            write_array(file, np.frombuffer(seal.digest(), np.uint8), allow_pickle=False)
    return tokens


def load_cache(llama: Llama, path: str | os.PathLike[str]) -> list[int]:
    """Restores a saved cache into row 0; returns the tokens it holds. `Llama.stream` goes on from as many of them as
    its prompt begins with. A stream under way that has row 0 reads its tokens again.

    Raises ValueError, on every rank, where the file is missing or damaged, was made by something else than this
    model, or holds more tokens than the cache has slots. What the cache held before is then forgotten all the same.
    """
    own = _own_path(path, llama.ranks)
    cache = llama.model.own_cache()
    cache.forget(0, [0])  # before anything can fail, so that all ranks know the same
    with llama.ranks.all_ranks():
        if not own.is_file():
            raise ValueError(
                f"there is no saved cache {own}. One that was saved by N ranks is N files, NAME.00 and so on, and is "
                "loaded by as many"
            )
        with open(own, "rb") as file:
            tokens = _restore(llama, file, own)
    of_rank_0 = llama.ranks.broadcast_object(tokens)
    with llama.ranks.all_ranks():
        if tokens != of_rank_0:
            raise ValueError(f"{own} holds other tokens than rank 0's file: they were not saved together")
    cache.tokens[0] = list(tokens)
    return tokens


def _restore(llama: Llama, file: BinaryIO, path: Path) -> list[int]:
    """Reads a file into row 0. Where it fails halfway, what it has written there is out of sight, as is all that lies
    in a row of which nobody knows the tokens."""
    cache, seal = llama.model.own_cache(), hashlib.sha256()
    arrays = _sealed(file, seal)
    try:
        header = json.loads(next(arrays).tobytes())
        made_by = dict(header["made_by"]) if header["format"] == FORMAT else None
    except (ValueError, TypeError, KeyError, EOFError, OSError, MemoryError):
        made_by = None
    if made_by is None:
        raise ValueError(f"{path} is no saved cache, or one of another version: give a file that save_cache wrote")
    _check(llama, made_by, path)
    with _damage_named(path):
        tokens: list[int] = next(arrays).tolist()
    if len(tokens) > cache.slots:
        raise ValueError(
            f"{path} holds {len(tokens):,} tokens, but the cache has {cache.slots:,} slots: build with max_seq_len of "
            f"at least {len(tokens) + 1}"
        )
    with _damage_named(path):
        for pair in zip(cache.keys, cache.values, strict=True):
            for store in pair:
                visible = store[0, :, : len(tokens)]
                visible.copy_(torch.from_numpy(next(arrays)).view(store.dtype).view(visible.shape))
        expected = seal.digest()
        if next(arrays).tobytes() != expected:
            raise ValueError("what is read is not what was written")
    return tokens


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, EOFError, OSError, MemoryError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): delete it, and save it again") from error


def _sealed(file: BinaryIO, seal: hashlib._Hash) -> Iterator[NDArray[Any]]:
    """The arrays of a file. `seal` has seen all that were asked for before."""
    while True:
        array = np.ascontiguousarray(read_array(file, allow_pickle=False))
        seal.update(array.data)
        yield array


def _filled(cache: KVCache, n: int) -> Iterator[NDArray[np.uint8]]:
    """The first n slots of row 0: keys and values of each layer, as bytes (K, n, …)."""
    for pair in zip(cache.keys, cache.values, strict=True):
        for store in pair:
            yield store[0, :, :n].contiguous().view(torch.uint8).cpu().numpy()


def _own_path(path: str | os.PathLike[str], ranks: Ranks) -> Path:
    path = Path(path)
    return path if ranks.world_size == 1 else path.with_name(f"{path.name}.{ranks.rank:02d}")


# What made it ---------------------------------------------------------------------------------------------------------


def fingerprint(llama: Llama) -> dict[str, Any]:
    """All that keys and values depend on, besides the tokens, as JSON. max_seq_len is not among it, but where the
    frequencies follow from it (dynamic, longrope) they are.

    What was plugged into the model from outside, such as another `attend`, is not known to it.
    """
    model = llama.model
    args, cache = model.args, model.own_cache()
    scheme = spectrum(args.head_dim, args.rope_theta, args.rope_scaling, cache.slots)
    turns = {"inv_freq": scheme.inv_freq, "scale": torch.tensor(scheme.attention_scale, dtype=torch.float64)}
    made = {
        "params": args.to_params(),
        "frequencies": digest(turns),
        "dtype": str(model.norm.weight.dtype).removeprefix("torch."),
        "cache": str(cache.keys[0].dtype).removeprefix("torch."),
        "ranks": llama.ranks.world_size,
        "rank": llama.ranks.rank,
        "weights": digest({**dict(model.named_parameters()), **dict(model.named_buffers())}),
    }
    read_back: dict[str, Any] = json.loads(json.dumps(made, default=str))  # tuples become lists, as in the file
    return read_back


def digest(tensors: Mapping[str, Tensor], whole: int = WHOLE) -> str:
    """A SHA-256 over names, shapes, dtypes and contents.

    Up to `whole` bytes in all, every byte is hashed. Beyond, hashing would take longer than restoring the cache (13 GB
    at 1 or 2 GB/s), so of each tensor SAMPLES pieces are hashed, and the sum of all its bytes taken as 64-bit numbers,
    which runs at the speed of memory, on the device. Two checkpoints that were trained differ in the samples. A single
    number that was changed, a row that was added to the embedding, show in the sum. What shows in neither is rows that
    changed places outside the samples.
    """
    found = hashlib.sha256()
    is_small = sum(tensor.nbytes for tensor in tensors.values()) <= whole
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        content = tensor.contiguous().flatten().view(torch.uint8)
        if is_small or len(content) <= SAMPLES * PIECE:
            found.update(content.cpu().numpy().data)
        else:
            last = len(content) - PIECE
            starts = [last * i // (SAMPLES - 1) for i in range(SAMPLES)]
            found.update(torch.cat([content[start : start + PIECE] for start in starts]).cpu().numpy().data)
            found.update(f"{_sum(content)}\n".encode())
    return found.hexdigest()


def _sum(content: Tensor) -> int:
    """Of bytes as 64-bit numbers, modulo 2^64; those behind the last whole number are in the last sample."""
    total = 0
    for block in torch.split(content[: len(content) // 8 * 8], BLOCK):
        total += int(block.clone().view(torch.int64).sum())  # a copy, since a view must begin at a multiple of 8 bytes
    return total % 2**64


def _check(llama: Llama, made_by: dict[str, Any], path: Path) -> None:
    """Raises ValueError that names what is not the same."""
    here, there = ({**of.pop("params", {}), **of} for of in (fingerprint(llama), made_by))
    words = {
        "frequencies": "the frequencies of the rotation are others: rope_scaling depends on max_seq_len, and that was "
        "another, or the function that makes them has changed",
        "weights": "the weights are those of another checkpoint",
    }
    changed = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
    # Where a setting says why, the digests need not.
    said = [f"{key} is {there.get(key)} there and {here.get(key)} here" for key in changed if key not in words]
    said = said or [words[key] for key in changed]
    if said:
        raise ValueError(
            f"{path} was saved by something else than this model, so that what it holds would mean nothing to it: "
            f"{'; '.join(said)}. Run what it was saved with, or save it again"
        )
