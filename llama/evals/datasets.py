"""The files of benchmarks: downloaded once, by address and SHA-256, or taken from a folder of one's own."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.system import replacing

CACHE = "CODELLAMA_EVALS"
"""The environment variable with the folder of downloaded benchmarks (default: ~/.cache/codellama/evals)."""


@dataclass(frozen=True)
class Dataset:
    path: str
    """Below the folder of data: humaneval/HumanEval.jsonl.gz."""
    address: str = ""
    sha256: str = ""
    """Of the file at the address."""
    licence: str = ""


@dataclass(frozen=True)
class Rows:
    rows: list[dict[str, Any]]
    sha256: str
    """Of the file that they were read from."""
    is_known: bool
    """Whether it is the one in our table."""


def read(dataset: Dataset, data: str | Path | None = None) -> Rows:
    """A benchmark's rows: of the file in `data`, with its folder or without, or of the cache, where it is downloaded
    if it isn't there. A download must have the table's checksum; a file of one's own may be another."""
    path = fetch(dataset, data)
    contents = path.read_bytes()
    found = hashlib.sha256(contents).hexdigest()
    text = (gzip.decompress(contents) if contents[:2] == b"\x1f\x8b" else contents).decode("utf-8")
    return Rows([json.loads(line) for line in text.split("\n") if line.strip()], found, _is_known(dataset, contents))


def fetch(dataset: Dataset, data: str | Path | None = None) -> Path:
    return _local(dataset, Path(data)) if data is not None else _cached(dataset)


def _is_known(dataset: Dataset, contents: bytes) -> bool:
    """Whether this is the table's file; compressed or not, since some are served plain and kept compressed."""
    plain = gzip.decompress(contents) if contents[:2] == b"\x1f\x8b" else contents
    return dataset.sha256 in (hashlib.sha256(contents).hexdigest(), hashlib.sha256(plain).hexdigest())


def _local(dataset: Dataset, folder: Path) -> Path:
    name = Path(dataset.path).name
    tried = [folder / dataset.path, folder / name, *(folder / p.removesuffix(".gz") for p in (dataset.path, name))]
    for path in tried:
        if path.is_file():
            return path
    raise ValueError(f"{folder} has no {dataset.path}: give a folder with it, or leave --data out to download it")


def _cached(dataset: Dataset) -> Path:
    default = Path.home() / ".cache" / "codellama" / "evals"
    path = Path(os.environ.get(CACHE) or default) / dataset.path
    if path.is_file():
        return path
    if not dataset.address:
        raise ValueError(f"{dataset.path} has no address to download it from: give --data FOLDER with it")
    try:
        with urllib.request.urlopen(dataset.address, timeout=60) as answer:
            contents: bytes = answer.read()
    except OSError as error:
        raise ValueError(f"{dataset.address} can't be read ({error}): give --data FOLDER with {dataset.path}") from None
    if not _is_known(dataset, contents):
        found = hashlib.sha256(contents).hexdigest()
        raise ValueError(f"{dataset.address} has SHA-256 {found}, not {dataset.sha256}: give --data FOLDER instead")
    with replacing(path) as temporary:
        temporary.write_bytes(contents)
    return path
