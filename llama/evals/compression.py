"""Bits per byte: how small a model could make a file, beside what `xz -9e` makes of it.

A model that gives the next token probability p can encode it in -log2 p bits (by arithmetic coding), so the sum over
a file is a file size, comparable across tokenizers and with any compressor. A file is longer than a context, so it is
read in windows that overlap: the first window scores all its tokens, each later one those that are new, and every
token is scored once. Smaller strides give tokens more context and cost more passes.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llama.evals.batches import batches
from llama.evals.intervals import Estimate, ratio
from llama.evals.sources import Source, with_text
from llama.generation import Llama

EXTREME = 9 | lzma.PRESET_EXTREME
Losses = NDArray[np.float64]
"""-ln p of each token of a sequence."""


@dataclass(frozen=True)
class Sizes:
    """What each of some files takes, in the order of `paths`."""

    paths: tuple[str, ...]
    bytes: tuple[int, ...]
    """Of the file itself, as UTF-8."""
    tokens: tuple[int, ...]
    model_bits: tuple[float, ...]
    xz_bits: tuple[int, ...]


@dataclass(frozen=True)
class Compression:
    """Intervals are over files."""

    length: int
    stride: int
    bits_per_byte: Estimate
    nats_per_token: Estimate
    xz_bits_per_byte: Estimate
    """Each file an archive of its own."""
    solid_xz_bits_per_byte: float
    """All files, in the order of their paths, in one archive."""
    of_xz: Estimate
    """The model's bits over xz's."""
    of_solid_xz: Estimate
    """The same, of the solid archive; it is one, so its size is taken as exact."""
    sizes: Sizes


def compression(
    llama: Llama,
    sources: Sequence[Source],
    length: int | None = None,
    stride: int | None = None,
    progress: bool = False,
) -> Compression:
    """Bits per byte of whole files by the model and by xz.

    Windows are of `length` tokens, bos included (default: max_seq_len; give the trained context where that is less),
    and begin every `stride` tokens (default: half a window). Raises ValueError where there is no text, and for a
    length or a stride that can't be.
    """
    files = sorted(with_text(sources), key=lambda source: source.path)
    ids = [llama.tokenizer.encode(source.text, bos=False, eos=False) for source in files]
    length = llama.model.args.max_seq_len if length is None else length
    stride = default_stride(length, stride)
    nats = nats_of(llama, ids, length, stride, progress)
    texts = [source.text.encode() for source in files]
    leads = progress and llama.ranks.leads
    alone = [xz_bits(text) for text in tqdm(texts, desc="xz -9e", leave=False, disable=not leads)]
    bits = [value / math.log(2) for value in nats]
    sizes = Sizes(
        tuple(source.path for source in files),
        tuple(len(text) for text in texts),
        tuple(len(tokens) for tokens in ids),
        tuple(bits),
        tuple(alone),
    )
    per_byte = ratio(bits, sizes.bytes)
    solid = xz_bits(b"".join(texts)) / sum(sizes.bytes)
    return Compression(
        length=length,
        stride=stride,
        bits_per_byte=per_byte,
        nats_per_token=ratio(nats, sizes.tokens),
        xz_bits_per_byte=ratio(alone, sizes.bytes),
        solid_xz_bits_per_byte=solid,
        of_xz=ratio(bits, alone),
        of_solid_xz=Estimate(per_byte.value / solid, per_byte.low / solid, per_byte.high / solid, per_byte.n),
        sizes=sizes,
    )


def xz_bits(data: bytes) -> int:
    """The size of `xz -9e`'s file, its container of some 60 bytes included."""
    # The preset's dictionary of 64 MiB, but no larger than the data needs: clearing it would take most of the time.
    size = min(1 << 26, max(1 << 16, 1 << len(data).bit_length()))
    return 8 * len(lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": EXTREME, "dict_size": size}]))


def windows(tokens: int, size: int, stride: int) -> Iterator[tuple[int, int]]:
    """Windows over a number of tokens: where each begins, and the first token that none before it has scored."""
    first = scored = 0
    while scored < tokens:
        yield first, scored
        scored = first + size
        first += stride


def nats_of(
    llama: Llama, sequences: Sequence[list[int]], length: int, stride: int, progress: bool = False
) -> list[float]:
    """-ln p of each sequence of ids without bos, summed over its windows."""
    return [math.fsum(losses) for losses in losses_of(llama, sequences, length, stride, progress)]


def losses_of(
    llama: Llama, sequences: Sequence[list[int]], length: int, stride: int | None = None, progress: bool = False
) -> list[Losses]:
    """-ln p of each token of sequences without bos, read in windows of `length` tokens, each beginning with bos and
    `stride` tokens after the one before (default: half a window)."""
    room = llama.model.args.max_seq_len
    if not 2 <= length <= room:
        raise ValueError(
            f"windows of {length} tokens; this model was built for windows of 2 to {room}: give another length or "
            "build with a larger max_seq_len"
        )
    size, stride = length - 1, default_stride(length, stride)  # beside bos
    if not 1 <= stride <= size:
        raise ValueError(f"a stride of {stride}; with windows of {length} tokens it must be 1 to {size}")
    jobs = [(i, *window) for i, ids in enumerate(sequences) for window in windows(len(ids), size, stride)]
    losses = [np.empty(len(ids)) for ids in sequences]
    for batch in batches(llama, jobs, f"windows of {length}", progress):
        found = llama.score([[llama.tokenizer.bos_id, *sequences[i][first : first + size]] for i, first, _ in batch])
        for (i, first, scored), details in zip(batch, found, strict=True):
            new = [-p for p in details["logprobs"][1 + scored - first :] if p is not None]
            losses[i][scored : scored + len(new)] = new
    return losses


def default_stride(length: int, stride: int | None) -> int:
    return max(1, length // 2) if stride is None else stride
