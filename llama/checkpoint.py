"""Checkpoints on disk: params.json and consolidated.NN.pth, cut into any number of shards, on any number of ranks.

A published checkpoint comes in as many files as the ranks it was made for (7B: 1, 13B: 2, 34B: 4, 70B: 8). Which
dimension each matrix is cut on stands in one table, CUT; from it follows how to read any rank's part out of any
number of files, so merging, splitting and loading are one function, `recut`. Files are mapped into memory, never read
whole: what a rank doesn't need it doesn't touch, and weights that need no conversion are used where they lie.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.model import Transformer
from llama.parallel import Ranks, share
from llama.rope import spectrum
from llama.system import appearing_whole, open_shards, read_params, read_plain, readable, require_memory, some_of

CUT: dict[str, int | None] = {
    "tok_embeddings": 1,  # the hidden dimension, unlike Llama 3
    "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,  # whole in every shard
}  # fmt: skip
IGNORED = "rope.freqs"  # in some files, rounded to bfloat16 and sometimes of the wrong base


def recut(name: str, parts: list[Tensor], rank: int, world_size: int, n_kv_heads: int, head_dim: int) -> Tensor:
    """Rank `rank`'s part, of `world_size`, of the parameter `name` whose parts in order are given.

    Where there are more parts, or ranks, than KV heads, neighbours hold the same head. Raises ValueError where the
    parameter can't be cut into so many.
    """
    pieces, dim = pieces_of(name, parts, rank, world_size, n_kv_heads, head_dim)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def pieces_of(
    name: str, parts: list[Tensor], rank: int, world_size: int, n_kv_heads: int, head_dim: int
) -> tuple[list[Tensor], int]:
    """What `recut` joins: views of `parts`, and the dimension on which they follow each other."""
    short = name.split(".")[-2]
    dim = CUT.get(short)
    if dim is None:
        return parts[:1], 0
    repeat = short in ("wk", "wv")
    if repeat:
        parts = parts[:: max(1, len(parts) // n_kv_heads)]
    unit = head_dim if short in ("wq", "wk", "wv", "wo") else 1
    whole = sum(part.shape[dim] for part in parts)
    try:
        start, size = share(whole, rank, world_size, unit, repeat)
    except ValueError as error:
        raise ValueError(
            f"the {'heads' if unit > 1 else 'rows' if dim == 0 else 'columns'} of {name}: {error}"
        ) from None
    pieces = []
    for part in parts:
        low, high = max(start, 0), min(start + size, part.shape[dim])
        if low < high:
            pieces.append(part.narrow(dim, low, high - low))
        start -= part.shape[dim]
    return pieces, dim


class Weights(Protocol):
    """A model's parameters under Meta's names, wherever they lie: what `load` needs to know of a checkpoint."""

    path: Path
    """For messages; beside it, or in it, stands the tokenizer."""

    @property
    def n_shards(self) -> int: ...

    @property
    def tokenizer_path(self) -> Path: ...

    def names(self) -> list[str]: ...

    def args(self, **limits: Any) -> ModelArgs: ...

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor: ...


@runtime_checkable
class Packed(Protocol):
    """Weights that stay in the form in which they are stored, as quantised ones do: they know how."""

    def fill(self, model: Transformer, ranks: Ranks, dtype: torch.dtype) -> None: ...


FORMATS = {
    "config.json": "llama.interop.huggingface",
    ".gguf": "llama.interop.gguf",
    "quantization": "llama.quantize.saved",
    "anything else": "llama.interop.found",
}
"""What else a checkpoint may be, by a file of its folder, by its own ending, or by an entry of its params.json, and the
module whose `open_weights` reads it; the last one is asked about what has none of these. Such a module is imported when
it is wanted."""


@readable()
def open_checkpoint(ckpt_dir: str | os.PathLike[str]) -> Weights:
    """A checkpoint of any format, opened but not read. Raises CheckpointError as `Checkpoint` does."""
    path = Path(ckpt_dir).expanduser()
    params = path / "params.json"
    entries = read_params(params) if params.is_file() else {}
    other = "" if entries else "anything else"
    for mark in FORMATS:
        if mark in entries or (not entries and (path.suffix.lower() == mark or (path / mark).is_file())):
            other = mark
            break
    weights: Weights = importlib.import_module(FORMATS[other]).open_weights(path) if other else Checkpoint(path)
    return weights


class Checkpoint:
    """A folder in the published format, opened but not read.

    Raises CheckpointError, naming the file and the remedy, for what can't be one: a missing folder or file, a gap in
    the shards, an incomplete download, a web page saved as a shard, a pickle that holds more than tensors.
    """

    def __init__(self, ckpt_dir: str | os.PathLike[str]) -> None:
        self.path = Path(ckpt_dir)
        if not self.path.is_dir():
            raise CheckpointError(f"there is no folder {self.path}; pass --ckpt_dir with the folder of the checkpoint")
        self.params = read_params(self.path / "params.json")
        self._paths, self._shards = open_shards(self.path)

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def tokenizer_path(self) -> Path:
        if (self.path / "tokenizer_config.json").is_file():  # where tokenizer.model doesn't say everything
            own: Path = importlib.import_module(FORMATS["anything else"]).tokenizer_path(self.path)
            return own
        return self.path / "tokenizer.model"

    def names(self) -> list[str]:
        """The parameters' names, as in the model."""
        return [name for name in self._shards[0] if name != IGNORED]

    def args(self, **limits: Any) -> ModelArgs:
        """The architecture; its vocabulary is the embedding's own, whatever params.json says."""
        embedding = "tok_embeddings.weight"
        if embedding not in self._shards[0]:
            raise CheckpointError(f"{self.path} is not in Meta's format: no {embedding}, but {some_of(self.names())}")
        parts = self._weights(embedding)
        try:
            args, unknown = ModelArgs.from_params(self.params)
            check_sizes(args, self.names(), sum(part.shape[1] for part in parts))
        except ValueError as error:
            raise CheckpointError(f"{self.path / 'params.json'}: {error}") from error
        if unknown:
            warnings.warn(f"{self.path / 'params.json'}: unknown keys are ignored: {', '.join(unknown)}", stacklevel=2)
        return dataclasses.replace(args, vocab_size=parts[0].shape[0], **limits)

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor:
        """Rank `rank`'s part of a parameter; a view into the file where one file holds it in one piece."""
        return recut(name, self._weights(name), rank, world_size, args.n_kv_heads, args.head_dim)

    def parts(self, name: str) -> list[Tensor]:
        """A parameter as the shards hold it, one after the other; views into the files."""
        return [shard[name] for shard in self._shards]

    def _weights(self, name: str) -> list[Tensor]:
        return [check_weight(path, name, part) for path, part in zip(self._paths, self.parts(name), strict=True)]


def check_weight(path: Path, name: str, tensor: Tensor, stored_as: str = "") -> Tensor:
    """The tensor; CheckpointError where it can't be the parameter `name` (Meta's), whatever the sizes of the model."""
    dims = 1 if CUT.get(name.split(".")[-2:][0]) is None else 2
    if tensor.dim() != dims or not tensor.is_floating_point():
        found = f"{tensor.dtype} of the shape {tuple(tensor.shape)}, not floating point in {dims} dimensions"
        raise CheckpointError(f"{path}: {stored_as or name} is {found}: take another file, or download it again")
    return tensor


def check_sizes(args: ModelArgs, names: Iterable[str], dim: int) -> None:
    """CheckpointError for sizes that parameters of these names, and an embedding of `dim` columns, contradict, and
    ValueError for a RoPE that can't be. It is asked before a model is made: one of many layers takes minutes, a wide
    one gigabytes."""
    layers = len({name.split(".")[1] for name in names if name.startswith("layers.")})
    for size, given, found in (("n_layers", args.n_layers, layers), ("dim", args.dim, dim)):
        if given != found:
            raise CheckpointError(f"{size} is {given}, but {found} in the tensors: take both from the same checkpoint")
    spectrum(args.head_dim, args.rope_theta, args.rope_scaling, 1)


def load(model: Transformer, checkpoint: Weights, ranks: Ranks, dtype: torch.dtype) -> None:
    """Gives a model made on the meta device this rank's weights, in `dtype` on the rank's device.

    A weight that needs no conversion stays mapped; another takes memory of its own, one at a time. Raises
    CheckpointError that names every tensor that is missing, unexpected or misshapen; the model is then unchanged.
    """
    if isinstance(checkpoint, Packed):
        return checkpoint.fill(model, ranks, dtype)
    args = model.args
    slots = args.max_batch_size * args.max_seq_len * args.n_layers * model.kv_heads * args.head_dim
    weights_size = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    require_memory(weights_size, 2 * slots * dtype.itemsize, ranks.device)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = set(checkpoint.names())
    problems = [f"missing: {some_of(sorted(set(expected) - found))}"] if set(expected) - found else []
    problems += [f"unexpected: {some_of(sorted(found - set(expected)))}"] if found - set(expected) else []
    weights: dict[str, Tensor] = {}
    misshapen = []
    names = [] if problems else checkpoint.names()
    for name in tqdm(names, desc="loading", unit="tensor", delay=2, disable=not ranks.leads, leave=False):
        part = checkpoint.tensor(name, model.args, ranks.rank, ranks.world_size)
        if tuple(part.shape) != expected[name]:
            misshapen.append(f"{name} {tuple(part.shape)} instead of {expected[name]}")
        elif not misshapen:
            weights[name] = part.to(ranks.device, dtype).contiguous()
    problems += [f"of another shape: {some_of(misshapen)}"] if misshapen else []
    if problems:
        raise CheckpointError(
            f"the tensors in {checkpoint.path} are not those that its sizes describe; {'; '.join(problems)}. "
            "Take sizes and weights from the same checkpoint"
        )
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False)


def split(weights: dict[str, Tensor], args: ModelArgs, n: int) -> list[dict[str, Tensor]]:
    """A whole model's weights as the `n` shards of as many ranks; ValueError where they can't be cut so."""
    sizes = args.n_kv_heads, args.head_dim
    return [{name: recut(name, [w], rank, n, *sizes) for name, w in weights.items()} for rank in range(n)]


def merge(shards: list[dict[str, Tensor]], args: ModelArgs) -> dict[str, Tensor]:
    """The inverse of `split`."""
    sizes = args.n_kv_heads, args.head_dim
    return {name: recut(name, [shard[name] for shard in shards], 0, 1, *sizes) for name in shards[0]}


def save(
    ckpt_dir: str | os.PathLike[str], args: ModelArgs, weights: dict[str, Tensor], n_shards: int = 1,
    tokenizer_path: str | os.PathLike[str] | None = None,
) -> None:  # fmt: skip
    """Writes a whole model's weights as a folder in the published format, cut into `n_shards` files.

    Everything is first written beside the folder and then moved into it, so an interruption leaves nothing that looks
    whole. Raises ValueError where the folder already holds another checkpoint's shards.
    """
    target = Path(ckpt_dir)
    stale = [path.name for path in target.glob("consolidated.*.pth")] if target.is_dir() else []
    if set(stale) - {f"consolidated.{i:02d}.pth" for i in range(n_shards)}:
        raise ValueError(f"{target} holds a checkpoint in {len(stale)} shards; choose another folder, or remove it")
    with appearing_whole(target) as scratch:
        (scratch / "params.json").write_text(json.dumps(args.to_params(), indent=1) + "\n", encoding="utf-8")
        if tokenizer_path is not None:
            (scratch / "tokenizer.model").write_bytes(read_plain(Path(tokenizer_path)))
        for i, shard in enumerate(split(weights, args, n_shards)):
            own = {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in shard.items()}
            torch.save(own, scratch / f"consolidated.{i:02d}.pth")
