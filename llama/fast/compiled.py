"""The model compiled for fixed shapes: a few graphs that every step of every prompt fits into.

A compiler wants to know sizes; a conversation has none. So a step is rounded up, in three ways: rows and new tokens
are padded to the next size of a short list, and attention is given as many slots as the next power of two. What pads
is written behind what is read (the cache's invariant), so nobody ever sees it. Every size is compiled once, before the
first answer; after that nothing is compiled any more, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama.cache import KVCache, Span
from llama.fast.packing import close_
from llama.model import Transformer

TOKENS = (1, 16, 128)
"""New tokens of a step, besides a whole chunk of a prompt."""
FEWEST_SLOTS = 128


class CompiledHidden:
    """`Transformer.hidden` in static shapes, for the model's own cache."""

    def __init__(self, model: Transformer, chunk: int, **compiler: Any) -> None:
        """`chunk` is the most tokens that are read at once; `compiler` are torch.compile's options."""
        self.model, self.cache = model, model.own_cache()
        self.rows = _sizes(1, self.cache.rows)
        self.slots = _sizes(min(FEWEST_SLOTS, self.cache.slots), self.cache.slots)
        self.tokens = sorted({t for t in (*TOKENS, chunk) if t <= min(chunk, self.cache.slots)})
        self.plain = model.hidden
        self.tables = model.rotation(self.cache.slots)
        for tensor in (*self.cache.keys, *self.cache.values, *self.tables):
            torch._dynamo.mark_static_address(tensor)  # so that CUDA graphs may write to it
        self.step = torch.compile(self._step, dynamic=False, fullgraph=True, **compiler)

    def __call__(
        self, tokens: Tensor, start_pos: int | Sequence[int] | Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """As `Transformer.hidden`; another cache than the model's own, or none, is left to that."""
        if cache is not self.cache or start_pos is None:
            return self.plain(tokens, start_pos, cache)
        B, T = tokens.shape
        starts = self.cache.span(start_pos, B, T).positions[:, 0].expand(B)
        last = int(starts.max())
        parts, at = [], 0
        while at < T:
            # The smallest size that holds the rest; at the cache's end, where padding has no room, smaller ones.
            fitting = [size for size in self.tokens if last + at + size <= self.cache.slots]
            size = next((size for size in fitting if size >= T - at), fitting[-1])
            taken = min(size, T - at)
            parts.append(self._padded(tokens[:, at : at + taken], starts + at, size, last + at))
            at += taken
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _padded(self, tokens: Tensor, starts: Tensor, size: int, last: int) -> Tensor:
        B, T = tokens.shape
        rows = next(rows for rows in self.rows if rows >= B)
        slots = next(slots for slots in self.slots if slots >= last + size)
        padded = torch.zeros(rows, size, dtype=torch.int64, device=tokens.device)
        padded[:B, :T] = tokens
        # A row that pads may hold a prompt that has been read: it is written behind the longest one.
        first = torch.full((rows, 1), last, dtype=torch.int64, device=tokens.device)
        first[:B, 0] = starts
        hidden: Tensor = self.step(padded, first + torch.arange(size, device=tokens.device), slots)
        return hidden[:B, :T]

    def _step(self, tokens: Tensor, positions: Tensor, slots: int) -> Tensor:
        span = Span(positions, slots, None, self.cache.keys[0].dtype)
        cos, sin = (table[positions].unsqueeze(2) for table in self.tables)
        h = self.model.tok_embeddings(tokens)
        for i, layer in enumerate(self.model.layers):
            h = layer(h, (cos, sin), span, partial(self.cache.extend, i, span))
        normed: Tensor = self.model.norm(h)
        return normed

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        """Every (rows, tokens, slots) that a step may have."""
        for slots in self.slots:
            for size in self.tokens:
                if size <= slots:
                    yield from ((rows, size, slots) for rows in self.rows)


def compile_(model: Transformer, chunk: int = 512, progress: bool = True, **compiler: Any) -> Transformer:
    """Compiles every shape that `model` will be asked for, with its own cache, and puts the result in the place of
    `model.hidden`. The first time takes minutes; the compiler keeps what it made on disk, and the next start reads
    it. Raises ValueError where there is no C++ compiler.
    """
    device = model.norm.weight.device
    if compiler.get("backend", "inductor") == "inductor":
        if device.type == "cpu":
            _require_compiler()
        else:
            compiler = {"mode": "reduce-overhead", **compiler}
    made = CompiledHidden(model, chunk, **compiler)
    shapes = list(made.shapes())
    if device.type == "cpu":
        close_(model)
        with torch.inference_mode():  # what is closed learns how wide it is
            nothing = torch.zeros(1, 1, dtype=torch.int64)
            model.logits(made._step(nothing, nothing, made.slots[0]))
    # torch.compile counts the shapes of a function, and by default gives up after eight.
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=len(shapes) + 8):
        for rows, size, slots in tqdm(shapes, desc="compiling", unit="shape", disable=not progress, leave=False):
            positions = torch.arange(size, device=device).expand(rows, size).contiguous()
            made.step(torch.zeros(rows, size, dtype=torch.int64, device=device), positions, slots)
    model.hidden = made  # type: ignore[method-assign]
    return model


def _sizes(first: int, last: int) -> list[int]:
    """first, doubled until it reaches `last`, and that."""
    found = [first]
    while found[-1] < last:
        found.append(min(2 * found[-1], last))
    return found


def _require_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ValueError(
            "compiling for a CPU needs a C++ compiler, and there is neither g++ nor clang++ here: install one "
            "(apt install g++), name it in the environment variable CXX, or leave --compile out"
        ) from error
