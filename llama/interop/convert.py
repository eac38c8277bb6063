"""A checkpoint in another format, another number of shards or another dtype, in one pass and little memory.

Tensors come one at a time from whatever `open_checkpoint` opened, mapped, and go to disk some rows at a time: where
shards are joined or the rows of wq and wk reordered, only those rows are copied. A Hugging Face folder's files are
written so directly. A shard of the published format has to be given to `torch.save` whole, so its tensors are first
laid one after the other into a scratch file, which is then mapped: they are in memory only as far as the system likes
to keep pages of files. So private memory stays at some megabytes, whatever the model's size; but GGUF is written, and
what is quantised read, a whole tensor at a time. On the disk, the scratch file needs the room of one more shard.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoint import Checkpoint, Weights, open_checkpoint, pieces_of
from llama.config import ModelArgs
from llama.interop.gguf import QUANTS, write_gguf
from llama.interop.huggingface import HuggingFace, to_config, trained_context, write_json
from llama.interop.layout import shard_shapes, whole_shapes
from llama.interop.names import ROTATED, to_halves, to_huggingface
from llama.interop.tokenizer import write_tokenizer
from llama.interop.vocabulary import read_said
from llama.options import Count, MaybeDtype, Positional, choice
from llama.system import DTYPES, TOKENIZER_FILES, copy_tokenizer, read_params, some_of
from llama.tokenizer import Tokenizer

FILE_BYTES = 5_000_000_000
"""The most that a safetensors file of a Hugging Face folder holds; a single larger tensor has a file of its own."""

CHUNK_BYTES = 2**22
"""About as many bytes of a tensor are converted and written at once."""


@dataclass(frozen=True)
class Matrix:
    """A tensor in pieces that follow each other on `dim`; it is never whole in memory, only some rows at a time."""

    pieces: list[Tensor]
    dim: int

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = list(self.pieces[0].shape)
        first[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(first)

    def rows(self, about: int, multiple: int = 1) -> Iterator[Tensor]:
        """All rows in order, `about` so many at a time: a multiple of `multiple`, or what is left."""
        step = max(1, about // multiple) * multiple
        if self.dim == 0 and multiple == 1:
            for piece in self.pieces:
                yield from torch.split(piece, step)
        else:
            for at in range(0, self.shape[0], step):
                yield self._from(at, step)

    def _from(self, at: int, count: int) -> Tensor:
        if self.dim:
            return torch.cat([piece[at : at + count] for piece in self.pieces], self.dim)
        found = []
        for piece in self.pieces:
            low, high = max(at, 0), min(at + count, len(piece))
            if low < high:
                found.append(piece[low:high])
            at -= len(piece)
        return torch.cat(found)


@dataclass(frozen=True)
class Job:
    """What a writer is given."""

    weights: Weights
    args: ModelArgs
    shards: int
    stored: torch.dtype
    """What most of the source's tensors are stored in."""
    dtype: torch.dtype | None
    """What they shall be stored in; None: each as it is."""
    advance: Callable[[int], object]
    """To be told of each tensor's bytes as they are written."""
    quant: str = "f16"
    """What a GGUF file's matrices shall be stored in."""

    def matrices(self, shard: int) -> Iterator[tuple[str, Matrix]]:
        """A shard's tensors by Meta's names, one at a time, as they are stored. ValueError for one of another
        shape than the architecture's."""
        for name, shape in shard_shapes(self.args, self.shards, shard).items():
            found = self._matrix(name, shard)
            if found.shape != shape:
                raise ValueError(
                    f"{name} in {self.weights.path} is {found.shape} instead of {shape} (shard {shard} of "
                    f"{self.shards}): take sizes and weights from the same checkpoint"
                )
            yield name, found
            del found  # before the next one is made

    def _matrix(self, name: str, shard: int) -> Matrix:
        if not isinstance(self.weights, Checkpoint):
            return Matrix([self.weights.tensor(name, self.args, shard, self.shards)], 0)
        sizes = self.args.n_kv_heads, self.args.head_dim
        return Matrix(*pieces_of(name, self.weights.parts(name), shard, self.shards, *sizes))


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str = "hf",
    shards: int = 1,
    dtype: torch.dtype | None = None,
    quant: str | None = None,
    *,
    progress: bool = False,
) -> None:
    """Writes the checkpoint `src`, of any format, as a new folder `dst`: to "hf" or, in `shards` files, to "meta"; or
    to "gguf", as a new file.

    `dtype` (default: as stored), or for "gguf" `quant` (default: f16, in which bfloat16's smallest
    numbers are rounded), rounds, and nothing else does: there and back is bit-exact. What is written stands under a
    temporary name beside `dst` until it is whole. Raises ValueError where
    `dst` exists, `src` is no whole checkpoint, the model can't be cut into `shards`, or the disk has no room; then
    nothing is left behind.
    """
    target = Path(dst)
    if to not in WRITERS:
        raise ValueError(f"--to {to} is unknown; there are {', '.join(WRITERS)}")
    if shards < 1 or (to != "meta" and shards != 1):
        raise ValueError(f"--shards {shards} with --to {to}: give 1 or more with --to meta, and none otherwise")
    if (to == "gguf" and dtype is not None) or (to != "gguf" and quant is not None):
        raise ValueError(f"--dtype {dtype} and --quant {quant} with --to {to}: gguf has --quant, the others --dtype")
    if quant is not None and quant not in QUANTS:
        raise ValueError(f"--quant {quant} is unknown; there are {', '.join(QUANTS)}")
    if target.exists():
        raise ValueError(f"{target} exists already; choose another name, or remove it")
    weights = open_checkpoint(src)
    args = weights.args()
    _check_names(weights, args)
    whole = sum(prod(shape) for shape in whole_shapes(args).values())
    try:
        parts = sum(prod(shape) for shard in range(shards) for shape in shard_shapes(args, shards, shard).values())
    except ValueError as error:
        raise ValueError(f"--shards {shards} can't be had: {error}") from error
    stored = weights.tensor("layers.0.attention.wo.weight", args).dtype
    packed = {"f32": 4, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_1": 20 / 32, "q5_0": 22 / 32, "q5_1": 24 / 32}
    itemsize = packed.get(quant or "", 2) if to == "gguf" else (dtype or stored).itemsize
    needed = int(itemsize * (parts + (-(-whole // shards) if to == "meta" else 0)))
    place = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"{place} has {free:,} bytes free; converting needs {needed:,}: make room there")
    bar = tqdm(
        total=int(itemsize * parts), desc="converting", unit="B", unit_scale=True, disable=not progress, leave=False
    )
    with bar, _appearing_whole(target, needed) as folder:
        WRITERS[to](Job(weights, args, shards, stored, dtype, bar.update, quant or "f16"), folder)


def _check_names(weights: Weights, args: ModelArgs) -> None:
    expected, found = set(whole_shapes(args)), set(weights.names())
    problems = [
        f"{word}: {some_of(sorted(names))}"
        for word, names in (("missing", expected - found), ("unexpected", found - expected))
        if names
    ]
    if problems:
        raise ValueError(
            f"the tensors in {weights.path} are not those that its sizes describe; {'; '.join(problems)}. "
            "Take sizes and weights from the same checkpoint"
        )


@contextmanager
def _appearing_whole(target: Path, needed: int) -> Iterator[Path]:
    """A folder to write in, which takes its real name when the block ends and is removed if the block fails."""
    # Beside the target, since a rename is atomic within one file system only.
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
        yield folder
        alone = folder / ONE_FILE
        (alone if alone.exists() else folder).rename(target)
    except OSError as error:
        raise ValueError(
            f"{target} could not be written ({error.strerror or error}), and nothing of it is left; it needs about "
            f"{needed:,} bytes in {target.parent}: make room there, or choose another place"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Meta ----------------------------------------------------------------------------------------------------------------


def write_meta(job: Job, folder: Path) -> None:
    """params.json, consolidated.NN.pth and, where there is one, tokenizer.model."""
    for shard in range(job.shards):
        scratch = folder / "scratch"
        own = _laid_out(job, shard, scratch)
        try:
            torch.save(own, folder / f"consolidated.{shard:02d}.pth")
        except RuntimeError as error:  # so it reports what a write() has failed with
            raise OSError(str(error).partition("\n")[0]) from error
        scratch.unlink()
    if not copy_tokenizer(job.weights.tokenizer_path, folder):
        warnings.warn(f"{job.weights.tokenizer_path} is missing, so the result has no tokenizer.model", stacklevel=3)
    # Last, so that an unfinished folder is no checkpoint.
    write_json(folder / "params.json", job.args.to_params())


def _laid_out(job: Job, shard: int, path: Path) -> dict[str, Tensor]:
    """A shard's tensors, lying in the file `path` and mapped from there, each in a storage of its own."""
    places = []
    with path.open("wb") as file:
        for name, matrix in job.matrices(shard):
            file.write(bytes(-file.tell() % 64))
            dtype = job.dtype or matrix.dtype
            places.append((name, dtype, torch.Size(matrix.shape), file.tell()))
            job.advance(_write(file, matrix, dtype))
            del matrix
        size = file.tell()
    mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    return {
        name: torch.empty(0, dtype=dtype).set_(mapped[at : at + shape.numel() * dtype.itemsize]).view(shape)
        for name, dtype, shape, at in places
    }


def _write(file: BinaryIO, matrix: Matrix, dtype: torch.dtype, head_dim: int = 0) -> int:
    """Appends a tensor's numbers, row after row in `dtype`, and returns how many bytes they are. With `head_dim`, the
    rows of each head are put into Hugging Face's order."""
    about = CHUNK_BYTES // (prod(matrix.shape[1:]) * dtype.itemsize)
    size = 0
    for rows in matrix.rows(about, head_dim or 1):
        ordered = to_halves(rows, head_dim) if head_dim else rows
        size += file.write(ordered.to(dtype).contiguous().view(torch.uint8).numpy().data)
    return size


# Hugging Face --------------------------------------------------------------------------------------------------------

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class SafetensorsFile:
    """A safetensors file that is written tensor by tensor: 8 bytes of the header's length, the header, the numbers.

    The header is JSON that says where each tensor lies, so it is complete only at the end. Room for it is left at the
    beginning and filled up with spaces, as the format allows
    (https://github.com/huggingface/safetensors#format). Without the library, whose `save_file` wants all of a file's
    tensors at once.
    """

    def __init__(self, path: Path, most: int) -> None:
        """`most` tensors will be added at most."""
        self.path = path
        self.names: list[str] = []
        self._room = 4096 + 256 * most
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._file = path.open("wb")
        self._file.write(bytes(8 + self._room))
        self.size = 0
        """Bytes of numbers."""

    def add(self, name: str, matrix: Matrix, dtype: torch.dtype, head_dim: int = 0) -> int:
        """Writes a tensor as `_write` does, and returns its bytes. ValueError for a dtype that weights seldom have."""
        if dtype not in CODES:
            raise ValueError(f"{name} is {dtype}; choose a dtype of {', '.join(map(str, CODES))}")
        size = _write(self._file, matrix, dtype, head_dim)
        place = [self.size, self.size + size]
        self._header[name] = {"dtype": CODES[dtype], "shape": list(matrix.shape), "data_offsets": place}
        self.names.append(name)
        self.size += size
        return size

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                header = json.dumps(self._header).encode()
                assert len(header) <= self._room
                self._file.seek(0)
                self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))


def write_huggingface(job: Job, folder: Path) -> None:
    """*.safetensors (with an index where they are several), config.json, generation_config.json, and what
    AutoTokenizer reads."""
    _write_safetensors(job, folder)
    config = to_config(job.args, job.dtype or job.stored) | {"bos_token_id": 1, "eos_token_id": 2}
    ends = config["eos_token_id"]
    if isinstance(job.weights, HuggingFace):
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        config |= {key: job.weights.config[key] for key in kept if key in job.weights.config}
        ends = config["eos_token_id"]
        _copy_beside(job.weights.path, folder)
    elif job.weights.tokenizer_path.is_file():
        tokenizer = Tokenizer(job.weights.tokenizer_path)
        _write_beside(job.weights.tokenizer_path, tokenizer, folder, config["max_position_embeddings"])
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        # transformers has one set of ids to stop at, whatever the prompt: what ends an answer of any job.
        every = [tokenizer.eos_id, *sorted(tokenizer.ends), tokenizer.eot_id, tokenizer.step_id]
        ends = list(dict.fromkeys(end for end in every if end is not None))
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        warnings.warn(f"{job.weights.tokenizer_path} is missing, so the result has no tokenizer", stacklevel=3)
    if not (folder / "generation_config.json").is_file():
        generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends}
        write_json(folder / "generation_config.json", generation)
    # Last, so that an unfinished folder is no checkpoint.
    write_json(folder / "config.json", config)


def _write_safetensors(job: Job, folder: Path) -> None:
    most = len(whole_shapes(job.args))
    files: list[SafetensorsFile] = []
    tensors = job.matrices(0)
    held = next(tensors, None)
    while held is not None:
        with SafetensorsFile(folder / f"{len(files)}.part", most) as file:
            while held is not None and (not file.size or file.size + _size(job, held[1]) <= FILE_BYTES):
                name, matrix = held
                theirs = to_huggingface(name)
                assert theirs is not None
                turned = job.args.head_dim if ROTATED.fullmatch(name) else 0
                job.advance(file.add(theirs, matrix, job.dtype or matrix.dtype, turned))
                del matrix, held  # before the next one is made
                held = next(tensors, None)
        files.append(file)
    if len(files) == 1:
        files[0].path.rename(folder / "model.safetensors")
        return
    placed: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        real = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.path.rename(folder / real)
        placed |= dict.fromkeys(file.names, real)
    index = {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": dict(sorted(placed.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _size(job: Job, matrix: Matrix) -> int:
    return prod(matrix.shape) * (job.dtype or matrix.dtype).itemsize


def _copy_beside(source: Path, folder: Path) -> None:
    """What a Hugging Face folder has besides its weights is another one's too, as it is."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_beside(path: Path, tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """The files of a tokenizer: copied where they are in Hugging Face's format, made where only tokenizer.model is."""
    own = path.parent / "tokenizer.model"
    copy_tokenizer(path, folder)
    if not own.is_file() or (path.parent / "tokenizer.json").is_file():
        return
    write_tokenizer(own, folder, max_length)
    said = read_said(path.parent) if path.suffix == ".json" else None
    if said is not None:
        written = read_params(folder / "tokenizer_config.json")
        written |= {"add_bos_token": tokenizer.traits.adds_bos, "eos_token": tokenizer.token_piece(tokenizer.eos_id)}
        if tokenizer.dialog is not None:
            written["chat_template"] = said.template
        write_json(folder / "tokenizer_config.json", written)


# GGUF ----------------------------------------------------------------------------------------------------------------

ONE_FILE = "model.gguf"
"""What a writer that makes a single file calls it: it alone takes the name that was asked for."""


def write_one_file(job: Job, folder: Path) -> None:
    """A GGUF file with the tokenizer in it."""
    context = trained_context(job.args)
    if isinstance(job.weights, HuggingFace):
        context = job.weights.config.get("max_position_embeddings", context)
    tokenizer = job.weights.tokenizer_path
    if not tokenizer.is_file():
        warnings.warn(f"{tokenizer} is missing, so the result has no tokenizer", stacklevel=2)
    shapes = whole_shapes(job.args)
    whole = ((name, torch.cat(matrix.pieces, matrix.dim)) for name, matrix in job.matrices(0))
    write_gguf(folder / ONE_FILE, job.args, shapes, whole, job.quant, context, tokenizer, job.advance)


WRITERS: dict[str, Callable[[Job, Path], None]] = {
    "hf": write_huggingface,
    "meta": write_meta,
    "gguf": write_one_file,
}
"""Formats that can be written, by the word for --to."""


# The command ---------------------------------------------------------------------------------------------------------


def command(
    src: Positional[str],
    dst: Positional[str],
    *,
    to: Literal["hf", "meta", "gguf"],
    shards: Count = 1,
    dtype: MaybeDtype = None,
    quant: Annotated[str | None, choice(QUANTS)] = None,
) -> None:
    """Writes the checkpoint SRC, of any format, as a new folder DST, or as a new file with --to gguf.

    Args:
        src: a folder in Meta's or Hugging Face's format, or a .gguf file.
        dst: what doesn't exist yet.
        to: the format.
        shards: into how many files to cut (with --to meta).
        dtype: of the weights (none: as stored).
        quant: what matrices are stored in (with --to gguf; none: f16).
    """
    convert(src, dst, to, shards, None if dtype is None else DTYPES[dtype], quant, progress=True)
    print(f"{dst}: written in the format {to}")
