"""From documents to the array a model trains on: each document a token sequence, and rows of a few whole sequences.

No sequence is cut by the end of a row: half a document with its middle moved would teach nothing. So documents are
cut to fit beforehand, and sequences are laid into rows largest first, each where it leaves the least room. The
array lies on disk as 16-bit ids and is read through a memory map; it follows from corpus, tokenizer and a seed.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama.tokenizer import Tokenizer
from llama.train.atomic import replacing
from llama.train.corpus import Source
from llama.train.documents import Document, cut, dialog, functions
from llama.train.infilling import prefix_first, split, suffix_first

Rows = NDArray[np.uint16]
PADDING = 0
"""Fills a row that no sequence fits any more; it is unk, which byte fallback never produces, and counts for no loss."""
_SPARE = 12
"""Tokens that a sequence may have above its document's own: bos, marks, and pieces broken by a cut."""


@dataclass(frozen=True)
class Mixture:
    """How documents become sequences, as parts of 1."""

    infilling: float = 0.5  # of the documents. The paper has 0.9: it infills during a second, far longer training
    suffix_first: float = 0.5  # of those
    functions: float = 0.5  # of all functions, which are documents of their own besides being in their file
    dialogs: float = 0.1  # of all tokens


def encode_corpus(
    tokenizer: Tokenizer, sources: Iterable[Source], length: int, mixture: Mixture, seed: str
) -> list[list[int]]:
    """The sequences of one pass over `sources`, none longer than `length`."""
    rng = random.Random(seed)
    found: list[list[int]] = []
    talks: list[list[int]] = []
    for source in sources:
        for document in cut_source(tokenizer, source, length):
            found.append(encode_document(tokenizer, document, length, mixture, rng))
        for function in functions(source.text):
            if rng.random() < mixture.functions:
                found.append(encode_document(tokenizer, Document(function.code, ends=True), length, mixture, rng))
            if talk := dialog(function, rng):
                talks.append(tokenizer.encode(talk, bos=True, eos=True))
    rng.shuffle(talks)
    wanted = mixture.dialogs / (1 - mixture.dialogs) * sum(len(sequence) for sequence in found)
    for talk_ids in talks:
        if wanted <= 0:
            break
        wanted -= len(talk_ids)
        found.append(talk_ids)
    return [sequence for sequence in found if len(sequence) <= length]


def encode_plain(tokenizer: Tokenizer, sources: Iterable[Source], length: int) -> list[list[int]]:
    """All of `sources` once, as plain documents: what held-out loss is measured on."""
    return [
        tokenizer.encode(document.text, bos=True, eos=document.ends)
        for source in sources
        for document in cut_source(tokenizer, source, length)
    ]


def cut_source(tokenizer: Tokenizer, source: Source, length: int) -> Iterator[Document]:
    """A file's documents, each of so few tokens that any form of it fits a row of `length`."""
    return cut(source.text, length - _SPARE, lambda lines: [len(tokenizer.encode_infilling(line)) for line in lines])


def encode_document(
    tokenizer: Tokenizer, document: Document, length: int, mixture: Mixture, rng: random.Random
) -> list[int]:
    """A document as it is or, at the mixture's rate, with its middle moved to the end."""
    if rng.random() < mixture.infilling:
        form = suffix_first if rng.random() < mixture.suffix_first else prefix_first
        sequence = form(tokenizer, split(document.text, rng))
        if len(sequence) <= length:
            return sequence
    return tokenizer.encode(document.text, bos=True, eos=document.ends)


def pack(sequences: Iterable[list[int]], length: int, seed: str) -> Rows:
    """Lays whole sequences into rows (N, length), padded at the end, in random order."""
    rng = random.Random(seed)
    by_room: defaultdict[int, list[list[list[int]]]] = defaultdict(list)
    ordered = sorted(sequences, key=len, reverse=True)
    for sequence in ordered:
        assert len(sequence) <= length
        room = next((size for size in range(len(sequence), length) if by_room[size]), None)
        row = [] if room is None else by_room[room].pop()
        row.append(sequence)
        by_room[(length if room is None else room) - len(sequence)].append(row)
    filled = [row for rows in by_room.values() for row in rows]
    rng.shuffle(filled)
    packed = np.full((len(filled), length), PADDING, dtype=np.uint16)
    for target, row in zip(packed, filled, strict=True):
        rng.shuffle(row)  # or every row would begin with its longest sequence
        ids = [token for sequence in row for token in sequence]
        target[: len(ids)] = ids
    return packed


def write_rows(path: str | os.PathLike[str], rows: Rows) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)


def read_rows(path: str | os.PathLike[str]) -> Rows:
    rows: Rows = np.load(path, mmap_mode="r")
    return rows
