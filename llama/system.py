"""What lies outside: files that may be missing or damaged, devices, memory that may be too small.

A checkpoint is gigabytes that somebody downloaded. What can be wrong with it is said in one sentence, with the file's
name and what to do; what is written appears whole or not at all. Nothing here knows what a Llama is.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.errors import CheckpointError, LlamaError, NotEnoughMemory

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files that describe a tokenizer, and what a generation begins and ends with; the first may do alone."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def readable() -> Iterator[None]:
    """Makes a CheckpointError of what the system says of a file or a folder that can't be read, and of a ValueError."""
    try:
        yield
    except OSError as error:
        found = f"{error.filename or 'a file'} can't be read ({error.strerror or error})"
        raise CheckpointError(f"{found}: check the path and its permissions") from error
    except ValueError as error:
        if isinstance(error, LlamaError):
            raise
        raise CheckpointError(str(error)).with_traceback(error.__traceback__) from error.__cause__


@readable()
def read_plain(path: Path, most: int = -1) -> bytes:
    """The first bytes of a file, or all. CheckpointError where there is none, or another thing: a pipe is not opened,
    since that may wait for ever."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe, a device or a broken link"
        found = found if os.path.lexists(path) else "missing"
        raise CheckpointError(f"{path} is {found}: it is a file in a download; copy or download it again")
    with path.open("rb") as file:
        return file.read(most)


def copy_tokenizer(tokenizer_path: Path, folder: Path) -> bool:
    """Copies a checkpoint's tokenizer into another folder: the one file, or all that stand beside it where it is
    another than tokenizer.model. False where there is none."""
    alone = tokenizer_path.name == "tokenizer.model"
    copied = [tokenizer_path] if alone else [tokenizer_path.parent / name for name in TOKENIZER_FILES]
    for file in copied:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return tokenizer_path.is_file()


def read_params(path: Path) -> dict[str, Any]:
    contents = read_plain(path)
    try:
        params = json.loads(contents.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} holds {type(params).__name__} instead of an object of sizes: download it again")
    return params


def open_shard(path: Path) -> dict[str, Tensor]:
    head = read_plain(path, 64).lstrip()
    size = path.stat().st_size
    if head.startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, not a shard: the download link had expired; ask for a new one")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the shard: run `git lfs pull` in its repository")
    try:
        members = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
        shard = torch.load(path, map_location="cpu", mmap=bool(members), weights_only=True)
    except Exception as error:  # torch.load raises all kinds of them for damaged files
        found = "can't be read, most likely an incomplete download: resume it, or delete the file and download it again"
        if isinstance(error, pickle.UnpicklingError):
            found = "is damaged, or loading it would run code: check it against checklist.chk, or take another source"
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{path} ({size:,} bytes) {found}. ({reason})") from error
    entries: dict[str, Tensor] = shard if isinstance(shard, dict) else {type(shard).__name__: shard}
    odd = [key for key, t in entries.items() if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_meta]
    if odd or not all(isinstance(key, str) for key in entries):
        raise CheckpointError(f"{path} holds no plain dictionary of dense tensors ({some_of(odd)}): take another")
    _check_members(path, members, entries)
    return entries


@readable()
def open_shards(folder: Path) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """consolidated.00.pth, consolidated.01.pth … without a gap, which hold tensors of the same names. Other files in
    the folder are none of ours."""
    found = {path.name for path in folder.iterdir()}
    count = sum(bool(re.fullmatch(r"consolidated\.\d\d+\.pth", name)) for name in found)
    if not count:
        raise CheckpointError(f"{folder} holds no consolidated.00.pth: pass the folder that has the *.pth files in it")
    names = [f"consolidated.{number:02d}.pth" for number in range(count)]
    missing = some_of(sorted(set(names) - found))
    if missing:
        raise CheckpointError(f"{folder} has {count} shards, but lacks {missing}: download it, or remove the odd one")
    shards = [open_shard(folder / name) for name in names]
    keys: list[set[str]] = [set(shard) for shard in shards]
    if any(other != keys[0] for other in keys):
        differing = sorted(keys[0].union(*keys) - keys[0].intersection(*keys))
        raise CheckpointError(
            f"the {len(keys)} shards in {folder} hold different tensors ({some_of(differing)}): they belong to "
            "different checkpoints; download all of them again"
        )
    return [folder / name for name in names], shards


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write in; at the end its files are moved into it, or are gone if the block fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        yield Path(scratch)
        target.mkdir(exist_ok=True)
        for written in sorted(Path(scratch).iterdir()):
            os.replace(written, target / written.name)


def _check_members(path: Path, members: list[zipfile.ZipInfo], shard: dict[str, Tensor]) -> None:
    """Compares the tensors of a zip archive with what is stored, both in the order of the file: torch.load maps as many
    bytes as a tensor has, even if they are compressed, belong to the next one, or lie beyond the end."""
    storages = {(s := tensor.untyped_storage()).data_ptr(): (s.nbytes(), name) for name, tensor in shard.items()}
    of_tensors = sorted((m for m in members if "/data/" in m.filename), key=lambda member: member.header_offset)
    stored = [-1 if member.compress_type else member.file_size for member in of_tensors]
    pairs = zip(sorted(storages.items()), stored, strict=False)
    wrong = [name for (_, (nbytes, name)), size in pairs if nbytes != size]
    if wrong:
        raise CheckpointError(f"{path} holds {some_of(wrong)} compressed or cut short: download it, or save it, again")


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


def default_device() -> torch.device:
    """A GPU where there is one: this rank's under torchrun, Apple's for a single process; else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    mps = torch.backends.mps.is_available() and int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("mps" if mps else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a CUDA GPU that has it, float16 on an older one and on Apple's (macOS before 14 has no bfloat16),
    float32 elsewhere (a CPU is slow in float16)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def own_device(given: torch.device | str | None, world_size: int) -> torch.device:
    """`given` on this rank: "cuda" is the GPU of its LOCAL_RANK. Raises ValueError where it can't be used."""
    try:
        device = default_device() if given is None else torch.device(given)
        if device.type == "cuda" and world_size > 1:
            own, gpus = int(os.environ.get("LOCAL_RANK", device.index or 0)), torch.cuda.device_count()
            if own >= gpus or device.index not in (None, own):
                raise ValueError(
                    f"device {device} for the rank with LOCAL_RANK {own} (GPUs that PyTorch finds: {gpus}): each rank "
                    "needs a GPU of its own, so start as many ranks at most and give --device cuda without a number"
                )
            device = torch.device("cuda", own)
            torch.cuda.set_device(device)  # NCCL uses the current one
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {given} can't be used here ({reason}): give cpu, cuda, cuda:N or mps") from None
    return device


def free_memory(device: torch.device) -> int | None:
    """Bytes that this rank may still take; None where that can't be told. Ranks on a CPU share its memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, to use again
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    available = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return int(available[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if available else None


def require_memory(weights: int, cache: int, device: torch.device) -> None:
    """Raises NotEnoughMemory where bytes of weights and of KV cache are more than what is free. CODELLAMA_IGNORE_PLAN=1
    lets everything pass. `codellama plan` counts the rest as well."""
    free = free_memory(device)
    if free is not None and weights + cache > free and not os.environ.get("CODELLAMA_IGNORE_PLAN"):
        raise NotEnoughMemory(
            f"this needs {weights / 1e9:.1f} GB of weights and {cache / 1e9:.1f} GB of KV cache on each rank, but "
            f"{device} has {free / 1e9:.1f} GB free: lower max_batch_size or max_seq_len, or load in fewer bits "
            "(llama.load(quantize=...)); `codellama plan` says what would fit"
        )


def some_of(names: Iterable[str], most: int = 6) -> str:
    """The first names, for a message, and how many more there are."""
    every = list(map(str, names))
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
