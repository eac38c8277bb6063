"""The header of a GGUF file: its key-value pairs, and where its tensors lie.

Every count and length in the file is compared with what is left of the file before it is believed, so a damaged header
costs neither time nor memory. The tensors must lie within the file, one after the other.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llama.errors import CheckpointError
from llama.system import read_plain

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _DEEPEST = 8, 9, 4
AGAIN = "delete it and download it again"
REMOVED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
"""Types that llama.cpp once wrote and reads no more."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """As GGUF writes it: the length of a row first."""
    kind: int
    """Its type's number."""
    start: int
    """In bytes from the beginning of the file."""
    nbytes: int


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} ({len(self.data):,} bytes) can't be read: most likely an incomplete download: {what}; {AGAIN}"
        )

    def take(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if self.at + size > len(self.data):
            raise self.fail(f"its header ends at byte {len(self.data):,}, too early")
        (found,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return found

    def count(self, what: str, least: int) -> int:
        """A number of things of at least so many bytes each."""
        found: int = self.take("Q")
        if found * least > len(self.data) - self.at:
            raise self.fail(f"it claims {found:,} {what} at byte {self.at - 8:,}, more than it has room for")
        return found

    def string(self) -> str:
        size = self.count("characters", 1)
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth >= _DEEPEST:
            raise self.fail(f"a value at byte {self.at:,} is of the type {kind}, which there is not")
        inner = self.take("I")
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner]).newbyteorder("<")
            n = self.count("numbers", dtype.itemsize)
            self.at += n * dtype.itemsize
            return np.frombuffer(self.data, dtype, n, self.at - n * dtype.itemsize).tolist()
        return [self.value(inner, depth + 1) for _ in range(self.count("values", 8))]


def read_header(path: Path, sizes: dict[int, tuple[int, int]]) -> tuple[dict[str, Any], list[Entry], mmap.mmap]:
    """A file's key-value pairs, its tensors, and its bytes, mapped copy on write. `sizes` gives of each type how many
    numbers a block has, and how many bytes. CheckpointError for what is no whole GGUF file."""
    magic = read_plain(path, 8)
    size = path.stat().st_size
    if magic[:4] in (b"ggml", b"lmgg", b"fmgg", b"tjgg"):
        raise CheckpointError(f"{path} is a GGML file, from before GGUF: download the model as .gguf")
    if magic.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path} is a web page, not a GGUF file: the download link had expired; ask for a new one"
        )
    if magic.startswith(b"version"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository")
    if magic[:4] != b"GGUF" or size < 24:
        raise CheckpointError(
            f"{path} ({size:,} bytes) can't be read: most likely an incomplete download, or no GGUF file: {AGAIN}"
        )
    version = int.from_bytes(magic[4:8], "little")
    if version > 0xFFFF:
        raise CheckpointError(
            f"{path} is big-endian, for other processors than this one: take the little-endian file, or convert it "
            "with llama.cpp's gguf_convert_endian.py"
        )
    if version not in (2, 3):
        what = "from August 2023, which llama.cpp reads no more" if version == 1 else "which is not known here"
        raise CheckpointError(f"{path} is of GGUF's version {version}, {what}; 2 and 3 can be read: take a newer file")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    reader = _Reader(path, data)
    reader.at = 8
    tensors = reader.take("Q")
    pairs = reader.count("key-value pairs", 13)
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.string()
        values[key] = reader.value(reader.take("I"))
    if tensors * 24 > size - reader.at:
        raise reader.fail(f"it claims {tensors:,} tensors, more than it has room for")
    entries = [_entry(reader, sizes) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise reader.fail(f"general.alignment is {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    placed = [Entry(e.name, e.shape, e.kind, start + e.start, e.nbytes) for e in entries]
    end, last = start, ""
    for entry in sorted(placed, key=lambda e: e.start):
        if entry.start < end and entry.nbytes:
            raise reader.fail(f"{entry.name} lies at byte {entry.start:,}, within {last}")
        end, last = entry.start + entry.nbytes, entry.name
        if end > size:
            raise reader.fail(f"{entry.name} ends at byte {end:,}")
    return values, placed, data


def _entry(reader: _Reader, sizes: dict[int, tuple[int, int]]) -> Entry:
    name = reader.string()
    dims = reader.take("I")
    if not 0 < dims <= 4:
        raise reader.fail(f"{name[:80]!r} has {dims} dimensions; 1 to 4 are allowed")
    shape = tuple(reader.take("Q") for _ in range(dims))
    kind = reader.take("I")
    start = reader.take("Q")
    if kind not in sizes:
        known = f"{REMOVED[kind]}, which llama.cpp has removed" if kind in REMOVED else f"{kind}, which is not known"
        raise CheckpointError(
            f"{reader.path}: {name[:80]} is of the type {known}: take a file in f16, bf16, q8_0, q4_0 or q4_k"
        )
    block, nbytes = sizes[kind]
    if shape[0] % block:
        raise reader.fail(f"{name[:80]} has rows of {shape[0]}, no multiple of the {block} of its type")
    size = prod(shape) // block * nbytes
    if size > len(reader.data):
        raise reader.fail(f"{name[:80]} of the shape {shape} is larger than the file")
    return Entry(name, shape, kind, start, size)
