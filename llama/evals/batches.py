"""Work in slices, under a progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from llama.generation import Llama

T = TypeVar("T")
ROUNDS = 8
"""Items of a slice for each row. At a slice's end a row is free for about half an item's time, a sixteenth of all."""


def batches(llama: Llama, items: Sequence[T], what: str, progress: bool) -> Iterator[Sequence[T]]:
    """Slices of several times max_batch_size, so that the loop seldom has a free row and none to take it. The bar, on
    rank 0 alone, counts items."""
    size = ROUNDS * llama.model.args.max_batch_size
    with tqdm(total=len(items), desc=what, leave=False, disable=not (progress and llama.ranks.leads)) as bar:
        for first in range(0, len(items), size):
            batch = items[first : first + size]
            yield batch
            bar.update(len(batch))
