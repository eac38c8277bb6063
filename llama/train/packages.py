"""The packages of the corpus: which they are, how they are had, and how they are read without being installed.

`packages.tsv` pins every package to one wheel by its sha256, with its licence and its place in the split; a package
is in one part as a whole, so that what is held out is held out. Wheels, because they are read as they are: what pip
does to look into a source archive is to run it. pip fetches them, from wherever its settings say, for the tags in
their names rather than for this machine, and into a cache in which what is there with the right sum stays.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from tqdm import tqdm

from llama.train.corpus import Source

Split = Literal["heldout", "validation", "train"]
SPLITS: tuple[Split, ...] = ("heldout", "validation", "train")
"""In this order duplicates are looked for, so that what two packages share is held out rather than trained on."""
LICENCES = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "PSF-2.0"}
"""SPDX's names. A package under one of two says which we take; one with parts under several says `A AND B`."""
MANIFEST = Path(__file__).with_name("packages.tsv")


@dataclass(frozen=True)
class Package:
    """A line of the manifest. `kept` is the megabytes of Python text that the corpus had of it when it was pinned."""

    name: str
    version: str
    licence: str
    split: Split
    file: str
    sha256: str
    bytes: int
    kept: float


def read_manifest(path: Path = MANIFEST) -> list[Package]:
    """The pinned packages in the order of the file."""
    packages = []
    with path.open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines, delimiter="\t"):
            split, size, kept = line.pop("split"), line.pop("bytes"), line.pop("kept")
            if split not in SPLITS:
                raise ValueError(f"{path}: {line['name']} is in split {split!r}; there are {', '.join(SPLITS)}")
            packages.append(Package(**line, split=cast(Split, split), bytes=int(size), kept=float(kept)))
    return packages


def fetch_all(packages: Sequence[Package], cache: Path) -> None:
    """Brings all wheels into `cache`. Raises ValueError at the first that can't be had; those before it stay."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not _is_whole(cache / package.file, package)]
    size = sum(package.bytes for package in missing)
    if (free := shutil.disk_usage(cache).free) < size:
        raise ValueError(
            f"{cache} has {free / 1e6:.0f} MB of free space, and {len(missing)} packages of {size / 1e6:.0f} MB are "
            "still to be fetched; make room, or give another folder as --cache"
        )
    with tqdm(total=size, desc="fetching", unit="B", unit_scale=True, disable=not missing) as progress:
        for package in missing:
            progress.set_postfix_str(package.name)
            with enough_space(cache):
                fetch(package, cache)
            progress.update(package.bytes)


def fetch(package: Package, cache: Path) -> None:
    """Brings one wheel into `cache`, where it appears whole and with the manifest's sum or not at all."""
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as folder:
        done = run_pip(package, Path(folder))
        wheel = Path(folder, package.file)
        if not wheel.is_file():
            if os.strerror(errno.ENOSPC) in done.stderr:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise ValueError(
                f"{package.name} {package.version} can't be had: {said[-1].strip() if said else 'pip brought no wheel'}"
                f". Check the network and pip's settings (pip config list) and run the command again, or put "
                f"{package.file} into {cache} yourself; the packages fetched so far are kept there"
            )
        if not _is_whole(wheel, package):
            raise ValueError(
                f"{package.file} is not the file that was pinned: its sha256 is {_sum(wheel)}, not {package.sha256}. "
                f"If pip takes it from a mirror, fetch it from elsewhere; the packages fetched so far are in {cache}"
            )
        os.replace(wheel, cache / package.file)


def run_pip(package: Package, folder: Path) -> subprocess.CompletedProcess[str]:
    """`pip download` of the wheel with the tags of the pinned one, whatever machine this is."""
    python, abi, platforms = package.file.removesuffix(".whl").rsplit("-", 3)[1:]
    if platforms == "any":
        tags = ["--implementation=py", "--python-version=3.13", "--abi=none", "--platform=any"]
    else:
        tags = [f"--implementation={python[:2]}", f"--python-version={python[2]}.{python[3:]}", f"--abi={abi}"]
        tags += [f"--platform={platform}" for platform in platforms.split(".")]
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    # The wheel is read and never installed, so that neither this interpreter's version nor other packages matter.
    alone = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input"]
    what = [f"--dest={folder}", f"{package.name}=={package.version}"]
    return subprocess.run([*pip, *alone, *tags, *what], capture_output=True, text=True)


def unpack(package: Package, cache: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of each Python file of a fetched wheel, by path."""
    with zipfile.ZipFile(cache / package.file) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".py"):
                yield name, wheel.read(name)


def as_source(path: str, content: bytes) -> Source | None:
    """The file as text with newlines alone, or None if it isn't UTF-8."""
    try:
        return Source(path, io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read())
    except UnicodeDecodeError:
        return None


@contextmanager
def enough_space(folder: Path) -> Iterator[None]:
    """Says which folder is full, and that nothing is lost, where the block finds no space left."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"no space is left for {folder}; make room and run the command again: the packages fetched so far are kept"
        ) from error


def _is_whole(path: Path, package: Package) -> bool:
    return path.is_file() and path.stat().st_size == package.bytes and _sum(path) == package.sha256


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
