"""Texts that say the same: found exactly, and nearly, by MinHash and locality-sensitive hashing.

A model learns a repeated text by heart, and is not measured by a held-out text that it has learnt. Two files are near
duplicates if of the sequences of five words or signs that occur in either, at least 80 % occur in both (Jaccard). The
smallest of many hashes of such a set is the same for two sets as often as they overlap (Broder 1997), so files that
agree in a band of these are looked up in a table rather than compared with every other (Leskovec et al., Mining of
Massive Datasets, section 3.4); what the table proposes is then compared exactly. Comments and white space don't
count, so that the same code under two licences' headers is the same. For texts that are held out this isn't strict
enough: a larger file may contain one, or a copy have been rewritten in part. So of those, none may hold half.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint32]
Places = NDArray[np.int64]

SIMILAR = 0.8
MUCH = 0.5
"""The part of a protected text above which a text that has it repeats it."""
WORDS = 5
BANDS, ROWS = 32, 5
"""Of the pairs that are just similar enough, one in 300,000 is overlooked; of those at a third, 12 % are compared."""

_TOKEN = re.compile(r"\w+|[^\w\s]")
_COMMENT = re.compile(r"^[ \t]*#.*$", re.MULTILINE)
_BLOCK = 4096  # a block of hashes times one multiplier stays in the CPU's cache


@dataclass(frozen=True)
class Match:
    """The name of a kept text, and whether a text is the same but for white space, nearly so, or has much of it."""

    name: str
    degree: Literal["a copy of", "nearly", "much of"]


class Duplicates:
    """The texts kept so far; the one given first is the one that stays.

    Half a gigabyte of memory holds what it needs to know of 200 MB of Python.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        # Odd multipliers permute the 32-bit numbers; the additions break the order that 0 would keep.
        self._multipliers = rng.integers(0, 2**31, BANDS * ROWS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self._additions = rng.integers(0, 2**32, BANDS * ROWS, dtype=np.uint32)
        self._exact: dict[bytes, Match] = {}
        self._kept: list[tuple[str, Hashes]] = []
        none = np.zeros(0, np.int64)
        self._protected: tuple[Hashes, Places, Places] = (none.astype(np.uint32), none, none)
        self._bands: list[defaultdict[bytes, list[int]]] = [defaultdict(list) for _ in range(BANDS)]

    def find(self, name: str, text: str) -> Match | None:
        """The kept text that this one repeats; if there is none, this one is kept under its name."""
        key = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if key not in self._exact:
            match = self._find_near(name, text)
            # What is later the same as this goes back to the text that was kept, not to this.
            self._exact[key] = match or Match(name, "a copy of")
            return match
        return self._exact[key]

    def protect(self) -> None:
        """From here on, a text that has `MUCH` of one that was kept until now repeats it, however long it is."""
        sizes = [len(words) for _, words in self._kept]
        hashes = np.concatenate([words for _, words in self._kept] or [np.zeros(0, np.uint32)])
        order = np.argsort(hashes, kind="stable")
        self._protected = hashes[order], np.repeat(np.arange(len(sizes)), sizes)[order], np.array(sizes)

    def _find_near(self, name: str, text: str) -> Match | None:
        words = shingles(text)
        keys = [band.tobytes() for band in self._sign(words).reshape(BANDS, ROWS)]
        proposed = {index for band, key in zip(self._bands, keys, strict=True) for index in band.get(key, ())}
        for index in sorted(proposed):
            earlier, others = self._kept[index]
            if similarity(words, others) >= SIMILAR:
                return Match(earlier, "nearly")
        if (most := self._find_protected(words)) is not None:
            return Match(self._kept[most][0], "much of")
        for band, key in zip(self._bands, keys, strict=True):
            band[key].append(len(self._kept))
        self._kept.append((name, words))
        return None

    def _find_protected(self, words: Hashes) -> int | None:
        """The protected text of which `words` has the largest part, if that is `MUCH`."""
        hashes, owners, sizes = self._protected
        if not len(sizes):
            return None
        first, last = np.searchsorted(hashes, words, "left"), np.searchsorted(hashes, words, "right")
        counts = last - first
        # All places from `first` to `last` of each hash, one after the other.
        places = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        parts = np.bincount(owners[places], minlength=len(sizes)) / sizes
        most = int(parts.argmax())
        return most if parts[most] >= MUCH else None

    def _sign(self, words: Hashes) -> Hashes:
        """For each of the permutations, the smallest of the permuted hashes."""
        signature = np.full(BANDS * ROWS, np.iinfo(np.uint32).max, dtype=np.uint32)
        for start in range(0, len(words), _BLOCK):
            block = words[start : start + _BLOCK]
            for row, (a, b) in enumerate(zip(self._multipliers, self._additions, strict=True)):
                signature[row] = min(signature[row], (block * a + b).min())
        return signature


def shingles(text: str) -> Hashes:
    """Sorted hashes of all sequences of `WORDS` words or signs; of a shorter text, one of the whole."""
    words = _TOKEN.findall(_COMMENT.sub("", text))
    words += [""] * (WORDS - len(words))
    ids = np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))
    mixed = np.zeros(len(ids) - WORDS + 1, dtype=np.uint64)
    for offset in range(WORDS):
        # The multiplier is 2^64 divided by the golden ratio; the shift brings what it mixed best to the low half.
        mixed = (mixed + ids[offset : offset + len(mixed)]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def similarity(a: Hashes, b: Hashes) -> float:
    """Jaccard's: the part of all elements that both sets have. 0 if their sizes alone rule out `SIMILAR`."""
    if min(len(a), len(b)) < SIMILAR * max(len(a), len(b)):
        return 0.0
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
