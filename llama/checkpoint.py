"""Checkpoints on disk: params.json and consolidated.NN.pth, cut into any number of shards, on any number of ranks.

A published checkpoint comes in as many files as the ranks it was made for (7B: 1, 13B: 2, 34B: 4, 70B: 8). Which
dimension each matrix is cut on stands in one table, CUT; from it follows how to read any rank's part out of any
number of files, so merging, splitting and loading are one function, `recut`. Files are mapped into memory, never read
whole: what a rank doesn't need it doesn't touch, and weights that need no conversion are used where they lie.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from llama.config import ModelArgs
from llama.model import Transformer
from llama.parallel import Ranks, share

CUT: dict[str, int | None] = {
    "tok_embeddings": 1,  # the hidden dimension, unlike Llama 3
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
    "attention_norm": None,  # whole in every shard
    "ffn_norm": None,
    "norm": None,
}
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


FORMATS = {
    "config.json": "llama.interop.huggingface",
    ".gguf": "llama.interop.gguf",
    "quantization": "llama.quantize.saved",
}
"""What else a checkpoint may be, by a file of its folder, by its own ending, or by an entry of its params.json, and the
module whose `open_weights` reads it. Such a module is imported when it is wanted."""


def open_checkpoint(ckpt_dir: str | os.PathLike[str]) -> Weights:
    """A checkpoint of any format, opened but not read. Raises ValueError as `Checkpoint` does."""
    path = Path(ckpt_dir)
    params = path / "params.json"
    entries = read_params(params) if params.is_file() else {}
    for mark, module in FORMATS.items():
        if mark in entries or (not entries and (path.suffix == mark or (path / mark).is_file())):
            weights: Weights = importlib.import_module(module).open_weights(path)
            return weights
    return Checkpoint(path)


class Checkpoint:
    """A folder in the published format, opened but not read.

    Raises ValueError, naming the file and the remedy, for what can't be a checkpoint: a missing folder or file, a gap
    in the shards, an incomplete download, a web page saved as a shard, a pickle that holds more than tensors.
    """

    def __init__(self, ckpt_dir: str | os.PathLike[str]) -> None:
        self.path = Path(ckpt_dir)
        if not self.path.is_dir():
            raise ValueError(f"there is no folder {self.path}; pass --ckpt_dir with the folder of the checkpoint")
        self.params = read_params(self.path / "params.json")
        self._shards = [open_shard(path) for path in _shard_paths(self.path)]
        keys: list[set[str]] = [set(shard) for shard in self._shards]
        if any(other != keys[0] for other in keys):
            differing = sorted(keys[0].union(*keys) - keys[0].intersection(*keys))
            raise ValueError(
                f"the {len(keys)} shards in {self.path} hold different tensors ({some_of(differing)}): they belong to "
                "different checkpoints; download all of them again"
            )

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.model"

    def names(self) -> list[str]:
        """The parameters' names, as in the model."""
        return [name for name in self._shards[0] if name != IGNORED]

    def args(self, **limits: Any) -> ModelArgs:
        """The architecture; its vocabulary is the embedding's own, whatever params.json says."""
        embedding = self._shards[0].get("tok_embeddings.weight")
        if embedding is None:
            raise ValueError(
                f"{self.path} has no tok_embeddings.weight but {some_of(self.names())}: it is not in Meta's format"
            )
        params = {**self.params, "vocab_size": embedding.shape[0]}
        try:
            args, unknown = ModelArgs.from_params(params, **limits)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path / 'params.json'}: {error}") from error
        if unknown:
            warnings.warn(f"{self.path / 'params.json'}: unknown keys are ignored: {', '.join(unknown)}", stacklevel=2)
        return args

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor:
        """Rank `rank`'s part of a parameter; a view into the file where one file holds it in one piece."""
        return recut(name, self.parts(name), rank, world_size, args.n_kv_heads, args.head_dim)

    def parts(self, name: str) -> list[Tensor]:
        """A parameter as the shards hold it, one after the other; views into the files."""
        return [shard[name] for shard in self._shards]


def read_params(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: it stands beside the shards in a download; copy or download it again")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds {type(params).__name__} instead of an object of sizes: download it again")
    return params


def _shard_paths(folder: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth … without a gap. Other files in the folder are none of ours."""
    numbered = sorted(
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(r"consolidated\.(\d\d+)\.pth", path.name))
    )
    if not numbered:
        raise ValueError(f"{folder} holds no consolidated.00.pth: pass the folder that has the *.pth files in it")
    missing = sorted(set(range(numbered[-1][0] + 1)) - {number for number, _ in numbered})
    if missing:
        names = ", ".join(f"consolidated.{number:02d}.pth" for number in missing)
        raise ValueError(f"{folder} lacks {names}: download what is missing")
    return [path for _, path in numbered]


def open_shard(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"<"):
        raise ValueError(f"{path} is a web page, not a shard: the download link had expired; ask for a new one")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the shard itself: run `git lfs pull` in its repository")
    try:
        shard = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} ({size:,} bytes) is no plain file of tensors: it is damaged, or loading it would run code. Take "
            f"it from a source you trust, and check it against checklist.chk. ({_first_line(error)})"
        ) from error
    except Exception as error:  # torch.load raises all kinds of them for damaged files
        raise ValueError(
            f"{path} ({size:,} bytes) can't be read, most likely an incomplete download: resume it, or delete the file "
            f"and download it again. ({_first_line(error)})"
        ) from error
    if not isinstance(shard, dict) or not all(isinstance(value, Tensor) for value in shard.values()):
        raise ValueError(f"{path} holds no plain dictionary of tensors: it is not a shard of a published checkpoint")
    return shard


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def load(model: Transformer, checkpoint: Weights, ranks: Ranks, dtype: torch.dtype) -> None:
    """Gives a model made on the meta device this rank's weights, in `dtype` on the rank's device.

    A weight that needs no conversion stays mapped; another takes memory of its own, one at a time. Raises ValueError
    that names every tensor that is missing, unexpected or of another shape; the model is then unchanged.
    """
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
        raise ValueError(
            f"the tensors in {checkpoint.path} are not those that its params.json describes; {'; '.join(problems)}. "
            "Use the params.json that came with these shards"
        )
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False)


def some_of(names: Iterable[str], most: int = 6) -> str:
    """The first names, for a message, and how many more there are."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def split(weights: dict[str, Tensor], args: ModelArgs, n: int) -> list[dict[str, Tensor]]:
    """A whole model's weights as the `n` shards of as many ranks; ValueError where they can't be cut so."""
    sizes = args.n_kv_heads, args.head_dim
    return [{name: recut(name, [w], rank, n, *sizes) for name, w in weights.items()} for rank in range(n)]


def merge(shards: list[dict[str, Tensor]], args: ModelArgs) -> dict[str, Tensor]:
    """The inverse of `split`."""
    sizes = args.n_kv_heads, args.head_dim
    return {name: recut(name, [shard[name] for shard in shards], 0, 1, *sizes) for name in shards[0]}


def save(
    ckpt_dir: str | os.PathLike[str],
    args: ModelArgs,
    weights: dict[str, Tensor],
    n_shards: int = 1,
    tokenizer_path: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a whole model's weights as a folder in the published format, cut into `n_shards` files.

    Everything is first written beside the folder and then moved into it, so an interruption leaves nothing that looks
    whole. Raises ValueError where the folder already holds another checkpoint's shards.
    """
    target = Path(ckpt_dir)
    stale = [path.name for path in target.glob("consolidated.*.pth")] if target.is_dir() else []
    if set(stale) - {f"consolidated.{i:02d}.pth" for i in range(n_shards)}:
        raise ValueError(f"{target} holds a checkpoint in {len(stale)} shards; choose another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        (Path(scratch) / "params.json").write_text(json.dumps(args.to_params(), indent=1) + "\n", encoding="utf-8")
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, Path(scratch) / "tokenizer.model")
        for i, shard in enumerate(split(weights, args, n_shards)):
            own = {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in shard.items()}
            torch.save(own, Path(scratch) / f"consolidated.{i:02d}.pth")
        target.mkdir(exist_ok=True)
        for written in sorted(Path(scratch).iterdir()):
            os.replace(written, target / written.name)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """For files that appear whole or not at all: yields a temporary path beside `path`, in a folder that is made where
    there is none; it takes the real name when the block ends, and is removed if the block fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
