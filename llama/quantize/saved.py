"""Quantised checkpoints on disk: made in one pass from a checkpoint of any format, loaded on any number of ranks.

The folder is a published one with other contents. params.json has one entry more, `quantization`: the scheme, the
group and the version of this layout. consolidated.00.pth has, in place of each linear layer's weight, its stored
tensors: `layers.0.attention.wq.weight` is there as `layers.0.attention.wq.weight.codes` and `….scale`. The embedding
and the norms are as they were. There is always one file, whatever the model's size; a rank maps it and takes its rows
or columns.

Tensors are read, quantised and written one at a time. torch.save wants them all at once, so each is first laid into a
file of its own and mapped from there: on the disk, that takes the room of the result twice.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoint import CUT, Checkpoint, Weights, open_checkpoint, recut
from llama.config import ModelArgs
from llama.model import Transformer
from llama.parallel import Ranks
from llama.quantize.operators import Stored
from llama.quantize.schemes import Scheme, for_weight, scheme_of
from llama.system import copy_tokenizer, some_of

ENTRY = "quantization"
"""Of params.json, in a quantised folder."""
VERSION = 1
"""Of the layout that is written and read."""
LINEAR = {short for short, dim in CUT.items() if dim is not None} - {"tok_embeddings"}
"""The layers whose weights are quantised."""


def is_linear(name: str) -> bool:
    """Whether a parameter, by Meta's name, is a linear layer's weight."""
    return name.endswith(".weight") and name.split(".")[-2] in LINEAR


def cut(scheme: Scheme, stored: Stored, name: str, args: ModelArgs, rank: int, world_size: int) -> Stored:
    """Rank `rank`'s part, of `world_size`, of the stored tensors of the whole weight `name`: views, where they can be.
    ValueError where the weight, or a group of it, can't be cut so."""
    sizes = rank, world_size, args.n_kv_heads, args.head_dim
    if CUT[name.split(".")[-2]] == 0:
        return {key: recut(name, [tensor], *sizes) for key, tensor in stored.items()}
    numbers = torch.arange(scheme.shape(stored)[1], device="cpu").unsqueeze(0)
    mine = recut(name, [numbers], *sizes)  # the columns' own numbers, so it says which they are
    return scheme.columns(stored, int(mine[0, 0]), mine.shape[1], name)


# Read ----------------------------------------------------------------------------------------------------------------


def open_weights(path: Path) -> Saved:
    """A quantised folder, opened but not read. Raises ValueError as `Saved` does."""
    return Saved(path)


class Saved:
    """A quantised folder, as `llama.checkpoint.Weights` asks for one: to the core's `load` its weights are dequantised;
    `layers.quantize_load` takes what is stored.

    Raises ValueError as `Checkpoint` does, and for a folder that is not quantised, or so by another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = Checkpoint(path)
        self.path = self._file.path
        entry = self._file.params.get(ENTRY)
        # It says nothing about the architecture, and would be warned of as unknown.
        self._file.params = {key: value for key, value in self._file.params.items() if key != ENTRY}
        params = self.path / "params.json"
        if not isinstance(entry, dict) or "version" not in entry:
            raise ValueError(f"{params} has no entry {ENTRY!r} with a version: it is not a quantised checkpoint")
        if entry["version"] != VERSION:
            raise ValueError(
                f"{params}: the quantised weights are of version {entry['version']}, and this package reads version "
                f"{VERSION}: quantise the plain checkpoint again, or take the package that wrote them"
            )
        if self._file.n_shards > 1:
            raise ValueError(f"{self.path} has {self._file.n_shards} shards; a quantised checkpoint has one file")
        try:
            self.scheme = scheme_of(str(entry.get("scheme")), entry.get("group") or None)
        except ValueError as error:
            raise ValueError(f"{params}: {error}") from None
        self._keys: dict[str, list[str]] = {}
        for full in self._file.names():
            name, _, key = full.rpartition(".")
            if is_linear(name):
                self._keys.setdefault(name, []).append(key)

    def scheme_for(self, asked: str | Scheme | None) -> Scheme:
        """The scheme to multiply by: its own, or one that has the same stored tensors. ValueError for any other."""
        scheme = self.scheme if asked is None else scheme_of(asked)
        if (scheme.layout, scheme.group) != (self.scheme.layout, self.scheme.group):
            raise ValueError(
                f"{self.path} is quantised to {self.scheme}, and {scheme} was asked for: leave --quantize out, or "
                "quantise the plain checkpoint again"
            )
        return scheme

    @property
    def n_shards(self) -> int:
        return 1

    @property
    def tokenizer_path(self) -> Path:
        return self._file.tokenizer_path

    def names(self) -> list[str]:
        """The parameters' names, as in a plain model."""
        plain = [name for name in self._file.names() if name.rpartition(".")[0] not in self._keys]
        return plain + list(self._keys)

    def args(self, **limits: Any) -> ModelArgs:
        return self._file.args(**limits)

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor:
        """Rank `rank`'s part of a parameter; dequantised, in bfloat16, where it is quantised."""
        if name not in self._keys:
            return self._file.tensor(name, args, rank, world_size)
        return for_weight(self.scheme, name).dequantize(self.stored(name, args, rank, world_size)).bfloat16()

    def fill(self, model: Transformer, ranks: Ranks, dtype: torch.dtype) -> None:
        """`checkpoint.load`, of codes that stay codes."""
        from llama.quantize.layers import quantize_load  # which needs this file

        quantize_load(model, self, ranks, dtype)

    def stored(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Stored:
        """Rank `rank`'s part of what is stored of a linear layer's weight: views into the file where they can be."""
        whole = {key: self._file.parts(f"{name}.{key}")[0] for key in self._keys[name]}
        own = for_weight(self.scheme, name)
        own.check(whole, f"{self.path}: {name}")
        return cut(own, whole, name, args, rank, world_size)


# Written -------------------------------------------------------------------------------------------------------------


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    scheme: str | Scheme,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> None:
    """Writes the checkpoint `src`, of any format and number of shards, as the new quantised folder `dst`.

    In memory there is one plain weight at a time; it is quantised on `device`. `dst` appears when it is whole. Raises
    ValueError where `dst` exists, `src` is no whole plain checkpoint, a weight can't be quantised, or the disk is too
    small; then nothing is left behind.
    """
    chosen, target = scheme_of(scheme), Path(dst)
    if target.exists():
        raise ValueError(f"{target} exists already; choose another name, or remove it")
    weights = open_checkpoint(src)
    if isinstance(weights, Saved) or (isinstance(weights, Checkpoint) and ENTRY in weights.params):
        raise ValueError(f"{weights.path} is quantised already: give a plain checkpoint")
    args = weights.args()
    shapes = _checked_shapes(weights, args)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target.parent, weights, args, shapes, chosen)
    # Beside the target, since a rename is atomic within one file system only.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        result, laid = Path(scratch, "result"), Path(scratch, "laid")
        result.mkdir()
        laid.mkdir()
        tensors: dict[str, Tensor] = {}
        for name in tqdm(shapes, desc=f"quantising to {chosen}", unit="tensor", disable=not progress, leave=False):
            plain = weights.tensor(name, args)
            if tuple(plain.shape) != shapes[name]:
                raise ValueError(
                    f"{name} in {weights.path} is {tuple(plain.shape)} instead of {shapes[name]}: use the sizes that "
                    "came with these weights"
                )
            stored = {"": plain}
            if is_linear(name):
                stored = {f".{key}": t for key, t in for_weight(chosen, name).quantize(plain.to(device), name).items()}
            for ending, tensor in stored.items():
                tensors[name + ending] = _laid(tensor.cpu(), laid / str(len(tensors)))
        _save(tensors, result / "consolidated.00.pth", target)
        if not copy_tokenizer(weights.tokenizer_path, result):
            warnings.warn(f"{weights.tokenizer_path} is missing, so {target} has no tokenizer.model", stacklevel=2)
        entry = {"scheme": chosen.name, "group": chosen.group, "version": VERSION}
        text = json.dumps({**args.to_params(), ENTRY: entry}, indent=1) + "\n"
        (result / "params.json").write_text(text, encoding="utf-8")
        result.rename(target)


def _checked_shapes(weights: Weights, args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Of all parameters, by name; ValueError where the checkpoint has not just these."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(args).named_parameters()}
    differing = sorted(set(shapes).symmetric_difference(weights.names()))
    if differing:
        raise ValueError(
            f"{weights.path} does not have the tensors that its sizes describe; missing or unexpected: "
            f"{some_of(differing)}. Take sizes and weights from the same checkpoint"
        )
    return shapes


def _check_room(
    folder: Path, weights: Weights, args: ModelArgs, shapes: dict[str, tuple[int, ...]], scheme: Scheme
) -> None:
    bits = scheme.bits(
        scheme.quantize(torch.zeros(1, 1024, device="cpu"))
    )  # of rows as long as this, which says it nearly
    width = weights.tensor("norm.weight", args).dtype.itemsize
    bytes_ = sum(prod(shape) * (bits / 8 if is_linear(name) else width) for name, shape in shapes.items())
    needed, free = int(2 * bytes_), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free:,} bytes free; quantising needs about {needed:,}: make room there")


def _laid(tensor: Tensor, path: Path) -> Tensor:
    """The same tensor, mapped from a new file."""
    tensor = tensor.contiguous()
    path.write_bytes(tensor.view(-1).view(torch.uint8).numpy().data)
    return torch.from_file(str(path), size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)


def _save(tensors: dict[str, Tensor], path: Path, target: Path) -> None:
    try:
        torch.save(tensors, path)
    except RuntimeError as error:  # so it reports what a write() has failed with
        raise ValueError(f"{target} could not be written ({str(error).partition(chr(10))[0]})") from error
