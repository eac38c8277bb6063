"""What context is worth: the loss by a token's place in its document.

Documents of at least `length` tokens are read once, from their beginning, and every token is scored with all that
stands before it. A model that uses its context does better the further it has read; one that is past the context it
was trained on does worse, often abruptly. Every bin holds the same documents, so what differs between two bins is the
place alone; comparing lengths on different documents would compare the documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llama.evals.batches import batches
from llama.evals.intervals import Estimate, ratio
from llama.evals.sources import Source, choose_files, with_text
from llama.generation import Llama
from llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Bin:
    """Tokens at positions `start` to `end` - 1; bos stands at 0, so a token's position is what it can see."""

    start: int
    end: int
    nats_per_token: Estimate
    bits_per_byte: Estimate


@dataclass(frozen=True)
class Positions:
    """Intervals are over documents."""

    length: int
    documents: tuple[str, ...]
    bins: tuple[Bin, ...]


def loss_by_position(
    llama: Llama,
    sources: Sequence[Source],
    length: int | None = None,
    bins: int = 16,
    documents: int | None = None,
    progress: bool = False,
) -> Positions:
    """The first `length` tokens (bos included; default max_seq_len) of each document that has as many, in `bins`
    equal parts. `documents` takes that many, by a hash of their paths. Raises ValueError where no document is long
    enough, and for a length or a number of bins that can't be.
    """
    room = llama.model.args.max_seq_len
    length = room if length is None else length
    if not 2 <= length <= room:
        raise ValueError(f"a length of {length}; give 2 to {room}, or build with a larger max_seq_len")
    if not 1 <= bins < length:
        raise ValueError(f"{bins} bins for {length} tokens; give 1 to {length - 1}")
    read = long_documents(llama.tokenizer, sources, length, documents)
    edges = [1 + (length - 1) * i // bins for i in range(bins + 1)]
    rows = [ids[:length] for ids in read.values()]
    nats: list[list[float]] = []
    for batch in batches(llama, rows, "documents", progress):
        for details in llama.score(batch):
            loss = np.array([-p for p in details["logprobs"][1:] if p is not None])
            nats.append(_sums(loss, edges))
    sizes = [_sums(np.array(bytes_of(llama.tokenizer, ids)[1:], dtype=np.float64), edges) for ids in rows]
    found = []
    for i, (start, end) in enumerate(pairwise(edges)):
        loss_here, bytes_here = [row[i] for row in nats], [row[i] for row in sizes]
        per_token = ratio(loss_here, [end - start] * len(rows))
        found.append(Bin(start, end, per_token, ratio([value / math.log(2) for value in loss_here], bytes_here)))
    return Positions(length, tuple(read), tuple(found))


def long_documents(
    tokenizer: Tokenizer, sources: Sequence[Source], length: int, n: int | None = None
) -> dict[str, list[int]]:
    """The ids, bos first, of `n` documents (None: all) that have at least `length` of them, chosen by a hash of their
    paths and in the order of these. Raises ValueError, with the longest there is, where none has."""
    read = {source.path: tokenizer.encode(source.text, bos=True, eos=False) for source in with_text(sources)}
    enough = [source for source in sources if len(read.get(source.path, ())) >= length]
    if not enough:
        longest = max(read, key=lambda path: len(read[path]))
        raise ValueError(
            f"no document has {length} tokens, the longest {len(read[longest])} ({longest}): give longer files, "
            "several joined, or a shorter length"
        )
    return {source.path: read[source.path] for source in choose_files(enough, n)}


def _sums(values: NDArray[np.float64], edges: Sequence[int]) -> list[float]:
    """Of the values at positions 1, 2, …, within each bin."""
    return [float(values[start - 1 : end - 1].sum()) for start, end in pairwise(edges)]


def bytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """How many bytes of UTF-8 text each id of a sequence that begins with bos stands for; their sum is the text's."""
    sizes = []
    for at, token in enumerate(ids):
        if tokenizer.sp_model.is_control(token):
            sizes.append(0)
        elif tokenizer.byte_of(token):
            sizes.append(1)
        else:
            text = tokenizer.token_piece(token).replace("▁", " ")
            # The space that SentencePiece puts before every text is none of the text's.
            sizes.append(len(text.encode()) - (at == 1 and text.startswith(" ")))
    return sizes
