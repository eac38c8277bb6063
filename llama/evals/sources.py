"""What is measured on: source files, and samples of what is in them that anyone can draw again.

A measure names its sample by a rule instead of storing it. Every candidate has a name (a path and a line, say), and
the sample is those whose names have the smallest hashes. So it doesn't depend on the order of the files or on the
machine, a larger sample contains the smaller one, and two checkpoints are always asked the same questions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")


class Source(Protocol):
    """A file's name, unique among those measured on, and its text. `llama.train.corpus.Source` is one."""

    @property
    def path(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class File:
    path: str
    text: str


def read_folder(folder: str | os.PathLike[str]) -> list[File]:
    """Every .py file under `folder` that is UTF-8 and not empty, by path; ValueError where there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give one with .py files in it")
    found = []
    for path in sorted(root.rglob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # no program that a model could have been asked to write
        if text.strip():
            found.append(File(path.relative_to(root).as_posix(), text))
    if not found:
        raise ValueError(f"{root} holds no .py file with text in it, at any depth; give a folder of Python code")
    return found


def with_text(sources: Iterable[Source]) -> list[Source]:
    """Those that aren't empty; ValueError where none is left."""
    kept = [source for source in sources if source.text]
    if not kept:
        raise ValueError("there is nothing to measure on: give at least one source file that is not empty")
    return kept


def choose(candidates: Iterable[T], n: int | None, name: Callable[[T], str], seed: int = 0) -> list[T]:
    """The `n` candidates (None: all) whose names hash lowest, in that order; another `seed`, another sample."""
    if n is not None and n < 1:
        raise ValueError(f"n is {n}; a sample has at least 1, or None for all there are")

    def rank(candidate: T) -> bytes:
        return hashlib.blake2b(f"{seed} {name(candidate)}".encode(), digest_size=8).digest()

    return sorted(candidates, key=rank)[:n]


def choose_files(sources: Sequence[Source], n: int | None, seed: int = 0) -> list[Source]:
    """`n` whole files (None: all), by path."""
    return sorted(choose(sources, n, lambda source: source.path, seed), key=lambda source: source.path)
