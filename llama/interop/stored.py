"""What lies in a file of weights, by its header: the name, dtype and shape of every tensor, and a way to its numbers.

A safetensors file begins with the length of its header, 8 bytes, and the header, JSON: of each tensor dtype, shape and
the bytes it occupies. These must lie one after the other up to the very end of the file, so a file that was cut short
shows by its size. A pickle (.pth, .bin) is a zip archive whose directory stands at its end: cut short, it has none.
https://huggingface.co/docs/safetensors, section Format
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.interop.layout import Shape

AGAIN = "download it again"
RESUME = "give the download command again: it resumes what is incomplete; or delete the file and download it again"
HEADER_LIMIT = 100_000_000  # the library's own
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PIECE = 1 << 24  # numbers that are looked at together


class Fault(Exception):
    """What is wrong with a file, and the remedy."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found, remedy)
        self.found, self.remedy = found, remedy


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    dtype: torch.dtype
    shape: Shape
    data: Callable[[], Tensor]
    """The numbers, mapped from the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def is_finite(self) -> bool:
        """Whether it has neither NaN nor infinity; reads it a piece at a time."""
        if not self.dtype.is_floating_point:
            return True
        flat = self.data().flatten()
        return all(bool(flat[at : at + _PIECE].isfinite().all()) for at in range(0, len(flat), _PIECE))


def look_through(path: Path) -> None:
    """Raises Fault where a file is empty, or something else is stored in its place."""
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if not path.stat().st_size:
        raise Fault("empty", AGAIN)
    if head.startswith((b"<", b"\xef\xbb\xbf<")):
        raise Fault(
            "a web page or an error message in place of the file",
            "delete it and download it again: the link had expired, or the page asked for a log-in",
        )
    if head.startswith(b"version https://git-lfs"):
        raise Fault(
            "a Git LFS pointer in place of the file", "run `git lfs install` and `git lfs pull` in its repository"
        )


def compare_crc(path: Path, advance: Callable[[int], object] = lambda size: None) -> int:
    """Reads every member of a zip archive and compares its CRC-32; how many there are. Raises Fault for one that
    differs. 0 for what is no zip archive, or stores no sums."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.CRC]
        for member in members:
            try:
                with archive.open(member) as file:
                    while block := file.read(1 << 22):
                        advance(len(block))
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise Fault(
                    f"damaged: the CRC-32 that the archive itself holds of {member.filename} is not its own",
                    "delete it and download it again",
                ) from error
    return len(members)


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a .safetensors, .pth or .bin file, by name. Reads no numbers. Raises Fault."""
    look_through(path)
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def _safetensors(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT:
            raise Fault("no safetensors file: it begins with no length of a header", AGAIN)
        if size < 8 + length:
            raise Fault(f"cut short within its header, at {size:,} bytes", RESUME)
        start = 8 + length
        header = file.read(length)
        # Mappings outlive the file object.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        places = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
        stored = {name: _entry(entry, mapped, start) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault(f"damaged: its header can't be read ({type(error).__name__}: {error})", AGAIN) from error
    at = 0
    for begin, end, name in places:
        if begin != at or end - begin != stored[name].nbytes:
            raise Fault(f"damaged: {name} does not lie where the header says", AGAIN)
        at = end
    if size != start + at:
        found = "cut short" if size < start + at else "too long"
        raise Fault(f"{found}: {size:,} bytes instead of {start + at:,}", RESUME if size < start + at else AGAIN)
    return stored


def _entry(entry: dict[str, Any], mapped: mmap.mmap, start: int) -> Stored:
    dtype, shape, begin = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), start + int(entry["data_offsets"][0])

    def data() -> Tensor:
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mapping can't be written, which nobody does
            return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)

    return Stored(dtype, shape, data)


def _pickled(path: Path) -> dict[str, Stored]:
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        begins_as_zip = file.read(4) == b"PK\x03\x04"
    if begins_as_zip and not zipped:
        raise Fault(f"cut short at {path.stat().st_size:,} bytes: the archive has no directory at its end", RESUME)
    try:
        found = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise Fault(
            "no plain file of tensors: damaged, or loading it would run code", "take it from a source you trust"
        ) from error
    except Exception as error:  # torch.load raises all kinds of them for damaged files
        raise Fault(f"can't be read ({type(error).__name__}), most likely incomplete", RESUME) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise Fault("no plain dictionary of tensors", "take the file that came with the others")
    return {name: _held(value) for name, value in found.items()}


def _held(tensor: Tensor) -> Stored:
    return Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)
