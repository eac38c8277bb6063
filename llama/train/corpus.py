"""The corpus at hand everywhere: the Python source of the running interpreter's own standard library.

It is a few megabytes of good code under the PSF licence, and every machine that can train has it. Left out is what
doesn't read like a program: installed packages, tables that a generator wrote, files that don't parse. More than half
of what remains are test suites, which would teach little else than assertions, so they get a modest share. A stable
hash of a file's path says whether it is held out, so the split is the same on every machine and at every start.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEST_SHARE = 0.15
"""The part of the corpus, in characters, that test suites may be."""
HELD_OUT_ONE_IN = 40
LONGEST_TABLE = 0.3
"""A file of whose lines one table takes more than this part is data that happens to be written in Python."""

_NO_PROGRAMS = ("encodings/", "pydoc_data/", "lib2to3/tests/data/", "site-packages/")
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Source:
    """A file of the corpus; `path` is relative to the standard library's folder."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        folders = self.path.split("/")
        return not _TEST_FOLDERS.isdisjoint(folders[:-1]) or folders[-1].startswith("test_")

    @property
    def is_held_out(self) -> bool:
        return stable_hash(self.path) % HELD_OUT_ONE_IN == 0


def stable_hash(text: str) -> int:
    """64 bits that are the same in every process and on every machine, as `hash` is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def read_corpus(root: Path | None = None) -> list[Source]:
    """The corpus of the standard library at `root`, or the running interpreter's: each text once, in a fixed order."""
    found = list(_read_files(root or Path(sysconfig.get_paths()["stdlib"])))
    kept = [source for source in found if not source.is_test and _is_program(source.text)]
    room = int(TEST_SHARE / (1 - TEST_SHARE) * sum(len(source.text) for source in kept))
    for source in sorted((source for source in found if source.is_test), key=lambda source: stable_hash(source.path)):
        # A suite larger than what is left is passed over, so that the share is a bound.
        if len(source.text) <= room and _is_program(source.text):
            kept.append(source)
            room -= len(source.text)
    return sorted(kept, key=lambda source: source.path)


def _read_files(root: Path) -> Iterator[Source]:
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(_NO_PROGRAMS):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text not in seen:
            seen.add(text)
            yield Source(name, text)


def _is_program(text: str) -> bool:
    """Whether the text parses, does something, and isn't mostly one table."""
    try:
        with warnings.catch_warnings():
            # Old code draws warnings about its escapes when it is parsed; they are no business of the reader's.
            warnings.simplefilter("ignore")
            body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    tables = (
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple)
    )
    return bool(body) and max(tables, default=0) <= LONGEST_TABLE * text.count("\n")
