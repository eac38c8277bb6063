"""Work in slices that fill the model's rows, under a progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from llama.generation import Llama

T = TypeVar("T")


def batches(llama: Llama, items: Sequence[T], what: str, progress: bool) -> Iterator[Sequence[T]]:
    """Slices of max_batch_size. The bar, on rank 0 alone, counts items."""
    size = llama.model.args.max_batch_size
    with tqdm(total=len(items), desc=what, leave=False, disable=not (progress and llama.ranks.leads)) as bar:
        for first in range(0, len(items), size):
            batch = items[first : first + size]
            yield batch
            bar.update(len(batch))
