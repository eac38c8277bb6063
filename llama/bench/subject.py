"""What is measured: a model that reads prompts, gives the scores after the next token, and writes.

Every variant of ours, and every peer, is put to the same five calls, so that one protocol measures all. `Ours` is a
Llama as its users have it: `read` is the prefill of the loop, in chunks, and `stream` the loop itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama.generation import Llama
from llama.model import Transformer
from llama.parallel import shards
from llama.prompts import Prompt


@dataclass(frozen=True)
class Work:
    """What a model must do, on one rank: what it is measured against. Counts are of numbers."""

    layers: int
    """Weights of the matrices of all blocks."""
    head: int
    """Weights of the output matrix."""
    kv_slot: int
    """What the cache holds of one token."""
    score: int
    """Operations by which a token attends to one other, in all blocks."""
    number_bytes: int
    """Of a number in the cache."""
    weight_bytes: float
    """Of a weight as it lies in memory."""
    arithmetic: str
    """The dtype in which matrices are multiplied."""

    def step_bytes(self, rows: int, visible: float) -> float:
        """What the next token of each of `rows` rows makes necessary to read: every weight once, and the cache."""
        cache = rows * visible * self.kv_slot * self.number_bytes
        return (self.layers + self.head) * self.weight_bytes + cache

    def prompt_operations(self, tokens: int) -> float:
        """What reading one prompt makes necessary to compute: the blocks for every token, each attending to itself
        and those before, and the scores after the last."""
        pairs = tokens * (tokens + 1) / 2
        return 2.0 * self.layers * tokens + 2.0 * self.head + self.score * pairs


def work_of(model: Transformer, bits: float | None = None, arithmetic: str | None = None) -> Work:
    """Of a fresh model, nothing packed, nothing dropped: what it would be with weights of `bits` bits, multiplied in
    another dtype than its own."""
    matrices = [weight for weight in model.layers.parameters() if weight.dim() == 2]
    own = model.output.weight
    args = model.args
    return Work(
        layers=sum(weight.numel() for weight in matrices),
        head=own.numel(),
        kv_slot=2 * args.n_layers * model.kv_heads * args.head_dim,
        score=4 * args.n_layers * args.n_heads * args.head_dim // shards(),
        number_bytes=own.itemsize,
        weight_bytes=own.itemsize if bits is None else bits / 8,
        arithmetic=arithmetic or str(own.dtype).removeprefix("torch."),
    )


class Subject(Protocol):
    """A model under test. All rows of a call are equally long."""

    work: Work

    def room(self, rows: int, slots: int) -> None:
        """Makes room for so much, and forgets what was read."""

    def read(self, prompts: Sequence[list[int]]) -> Tensor:
        """Reads prompts from position 0 on; (B, V), the scores after each."""

    def step(self, tokens: Tensor, position: int) -> Tensor:
        """Reads (B, 1) tokens at a position up to which all was read; (B, V), the scores after them."""

    def stream(self, prompts: Sequence[list[int]], n: int) -> Iterator[int]:
        """Reads prompts and writes `n` tokens to each, greedily, as a user's program gets them; yields when some are
        known of row 0, and how many. With more than one token, not before every row has its first."""

    def head(self, tokens: Tensor) -> Tensor:
        """(B, T) tokens to (B, V): what a step does before and after its blocks, without them."""

    def cache_bytes(self, rows: int, tokens: int) -> int:
        """By how much its cache is still to grow for so many tokens; 0 where `room` takes it all."""


class Ours:
    """A Llama, its model in whatever way it was changed."""

    def __init__(self, llama: Llama, work: Work, settle_: Callable[[Llama], object] | None = None) -> None:
        """`settle_` changes the model once more whenever it has a new cache: what is compiled depends on that."""
        self.llama, self.work, self.settle_ = llama, work, settle_

    def room(self, rows: int, slots: int) -> None:
        model = self.llama.model
        # The limits size the cache and nothing else, so a model may be given others.
        model.args.max_batch_size, model.args.max_seq_len, model.cache = rows, slots, None
        cache = model.own_cache()
        for store in (*cache.keys, *cache.values):
            store.zero_()  # the system gives memory when it is first written: now, not while something is measured
        if self.settle_ is not None:
            self.settle_(self.llama)

    @torch.inference_mode()
    def read(self, prompts: Sequence[list[int]]) -> Tensor:
        model, chunk = self.llama.model, self.llama.prefill_chunk
        tokens = torch.tensor(prompts)
        for at in range(0, tokens.shape[1], chunk):
            hidden = model.hidden(tokens[:, at : at + chunk].to(self.llama.ranks.device), at, model.own_cache())
        return model.logits(hidden[:, -1])

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: int) -> Tensor:
        model = self.llama.model
        return model.logits(model.hidden(tokens, position, model.own_cache()))[:, -1]

    def stream(self, prompts: Sequence[list[int]], n: int) -> Iterator[int]:
        asked = [Prompt(list(tokens), frozenset()) for tokens in prompts]  # nothing ends them but their length
        for event in self.llama.stream(asked, 1, temperature=0.0, reuse=False):
            asked[event.row].tokens.extend(event.tokens)
        known = 1  # and what was read stands in the cache, so that all rows go on from their first tokens at once
        if n == 1:
            yield known
            return
        for event in self.llama.stream(asked, n - 1, temperature=0.0):
            if event.row == 0 and event.tokens:
                yield known + len(event.tokens)
                known = 0

    @torch.inference_mode()
    def head(self, tokens: Tensor) -> Tensor:
        model = self.llama.model
        return model.logits(model.norm(model.tok_embeddings(tokens))[:, -1])

    def cache_bytes(self, rows: int, tokens: int) -> int:
        return 0
