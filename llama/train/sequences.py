"""From documents to rows: each document a token sequence, each row a few whole sequences.

No sequence is cut by the end of a row: half a document with its middle moved would teach nothing. So documents are
cut to fit beforehand, and sequences are laid into rows largest first, each where it leaves the least room. What a
model reads and is not to learn, as the question of a dialog, is an id with all its bits turned over: negative.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama.tokenizer import Tokenizer
from llama.train.corpus import Source
from llama.train.documents import Document, Turn, cut, functions, turns, with_keys
from llama.train.exercises import stream
from llama.train.infilling import prefix_first, split, split_lines, suffix_first

Rows = NDArray[np.int16]
PADDING = 0
"""Fills a row that no sequence fits any more; it is unk, which byte fallback never produces, and counts for no loss."""
_SPARE = 12
"""Tokens that a sequence may have above its document's own: bos, marks, and pieces broken by a cut."""
_POOL = 8
"""Characters of functions for each token of a row with keys: about twice what it takes."""


@dataclass(frozen=True)
class Mixture:
    """How documents become sequences, as parts of 1. What is neither dialog nor key is code, and may have a gap."""

    infilling: float = 0.9  # of the documents that are code
    suffix_first: float = 0.5  # of those
    line_gaps: float = 0.5  # of those: the gap is of lines rather than of any characters
    functions: float = 0.3  # of the files that are code: taken apart into their functions
    dialogs: float = 0.0  # of all tokens
    keys: float = 0.0  # of all tokens
    exercises: float = 0.0  # of all tokens: functions and classes from the world of exercises
    questions: float = 0.0  # of all tokens: dialogs about those
    exercise_infilling: float = 0.5  # of the exercises
    answers_only: bool = True  # a dialog's question is read and not learned
    longest_answer: int | None = None  # tokens of a dialog's answer; longer ones are left out
    longest_function: int | None = None  # the same of a file's functions

    def __post_init__(self) -> None:
        parts = (self.infilling, self.suffix_first, self.line_gaps, self.functions, self.exercise_infilling)
        shares = (self.dialogs, self.keys, self.exercises, self.questions)
        if not all(0 <= part <= 1 for part in (*parts, *shares, sum(shares))):
            raise ValueError(f"{self}: each is a part of 1, and so are dialogs, keys, exercises and questions together")


def encode_corpus(
    tokenizer: Tokenizer, sources: Iterable[Source], length: int, mixture: Mixture, seed: str
) -> Iterator[list[int]]:
    """The sequences of one pass over `sources`, none longer than `length`, as the mixture has them.

    The kind that is furthest behind its share of the tokens so far goes next; where there is none left, a file is read
    for it, and for nothing else: so no text comes twice in a pass. It ends when a file is wanted and all are read.
    """
    rng = random.Random(seed)
    shares = {"dialogs": mixture.dialogs, "keys": mixture.keys}
    shares |= {"exercises": mixture.exercises, "questions": mixture.questions}
    shares["code"] = 1 - sum(shares.values())
    shares = {kind: part for kind, part in shares.items() if part > 0}
    spent = dict.fromkeys(shares, 0)
    code: deque[Document] = deque()
    talks: deque[Turn] = deque()
    pool: deque[str] = deque()
    files = iter(sources)
    world, questions = stream.documents(seed), stream.dialogs(seed)
    with_gaps = replace(mixture, infilling=mixture.exercise_infilling)
    while True:
        kind = min(shares, key=lambda kind: spent[kind] / shares[kind])
        if kind in ("exercises", "questions"):
            if kind == "exercises":
                sequence = encode_document(tokenizer, Document(next(world), ends=True), length, with_gaps, rng)
            else:
                system, request, answer = next(questions)
                sequence = encode_turn(tokenizer, Turn(request, answer, system), mixture.answers_only)
            if len(sequence) <= length:
                spent[kind] += len(sequence)
                yield sequence
            continue
        lacks = {"code": not code, "dialogs": not talks, "keys": sum(map(len, pool)) < _POOL * length}
        if lacks[kind]:
            source = next(files, None)
            if source is None:
                return
            if kind == "dialogs":
                talks.extend(turns(source.text, rng))
            elif kind == "keys":
                pool.extend(function.code for function in functions(source.text))
            elif rng.random() < mixture.functions:
                code.extend(cut_functions(tokenizer, source, mixture.longest_function or length))
            else:
                code.extend(cut_source(tokenizer, source, length))
            continue
        if kind == "dialogs":
            sequence = encode_turn(tokenizer, talks.popleft(), mixture.answers_only)
            if sum(token >= 0 for token in sequence) > (mixture.longest_answer or length):
                continue
        elif kind == "keys":
            sequence = _encode_keys(tokenizer, pool, length, rng)
        else:
            sequence = encode_document(tokenizer, code.popleft(), length, mixture, rng)
        if len(sequence) <= length:
            spent[kind] += len(sequence)
            yield sequence


def encode_plain(tokenizer: Tokenizer, sources: Iterable[Source], length: int) -> Iterator[tuple[list[int], int]]:
    """All of `sources` once, as plain documents: what held-out loss is measured on. With each its bytes of text."""
    for source in sources:
        for document in cut_source(tokenizer, source, length):
            yield tokenizer.encode(document.text, bos=True, eos=document.ends), len(document.text.encode())


def cut_source(tokenizer: Tokenizer, source: Source, length: int) -> Iterator[Document]:
    """A file's documents, each of so few tokens that any form of it fits a row of `length`."""
    return cut(source.text, length - _SPARE, lambda lines: [len(tokenizer.encode_infilling(line)) for line in lines])


def cut_functions(tokenizer: Tokenizer, source: Source, longest: int) -> Iterator[Document]:
    """A file's functions of at most `longest` tokens, each a document."""
    for function in functions(source.text):
        if len(tokenizer.encode_infilling(function.code)) <= longest:
            yield Document(function.code, ends=True)


def encode_document(
    tokenizer: Tokenizer, document: Document, length: int, mixture: Mixture, rng: random.Random
) -> list[int]:
    """A document as it is or, at the mixture's rate, with its middle moved to the end."""
    if rng.random() < mixture.infilling:
        form = suffix_first if rng.random() < mixture.suffix_first else prefix_first
        parts = split_lines if rng.random() < mixture.line_gaps else split
        sequence = form(tokenizer, parts(document.text, rng))
        if len(sequence) <= length:
            return sequence
    return tokenizer.encode(document.text, bos=True, eos=document.ends)


def encode_turn(tokenizer: Tokenizer, turn: Turn, answers_only: bool) -> list[int]:
    """A finished turn, its question's ids turned over if only the answer is to be learned."""
    whole = tokenizer.encode(turn.text, bos=True, eos=True)
    asked = tokenizer.encode(turn.question, bos=True, eos=False)
    assert whole[: len(asked)] == asked, "no piece reaches over the space after a tag"
    return [~token for token in asked] + whole[len(asked) :] if answers_only else whole


def _encode_keys(tokenizer: Tokenizer, pool: deque[str], length: int, rng: random.Random) -> list[int]:
    document = with_keys(pool, length - _SPARE, lambda text: len(tokenizer.encode_infilling(text)), rng)
    if document is None:
        raise ValueError(f"rows of {length} tokens have no room for a key; make them longer, or leave keys at 0")
    return tokenizer.encode(document.text, bos=True, eos=True)


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
    packed = np.full((len(filled), length), PADDING, dtype=np.int16)
    for target, row in zip(packed, filled, strict=True):
        rng.shuffle(row)  # or every row would begin with its longest sequence
        ids = [token for sequence in row for token in sequence]
        target[: len(ids)] = ids
    return packed
