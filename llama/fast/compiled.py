"""The model compiled for fixed shapes: a few graphs that every step of every prompt fits into.

A compiler wants to know sizes; a conversation has none. So there are graphs of two kinds. A *decode* graph reads a new
token, or a token and what was proposed after it, of the first rows of the cache: there is one for each number of rows.
A *prompt* graph reads a piece of one row's prompt; which row is a number that it is given. Steps are rounded up to the
next size of each kind, and attention is given as many slots as the next of a few sizes. Tokens of padding repeat the
last one at its position, so they write once more what it writes; rows of padding keep what they hold. Every graph is
compiled before the first answer; after that nothing is compiled any more, whatever is asked.

On a GPU the decode graphs are recorded as CUDA graphs too, by hand: those that torch.compile records itself belong to
the thread that recorded them (pytorch/pytorch#123177), and steps are taken by any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llama.cache import KVCache, Span
from llama.fast.packing import close_
from llama.model import Start, Transformer

EXACT_ROWS = 8
"""Rows up to which each number of them has decode graphs of its own; beyond, each power of two."""
PIECES = (32, 128)
"""New tokens of a prompt graph, besides a whole chunk."""
FEWEST_SLOTS = 512
WARM_UP = 2
"""Calls before a CUDA graph is recorded, in which libraries choose their kernels and take their memory."""


class Shape(NamedTuple):
    """Of a graph: decode, or `prompt`."""

    rows: int
    tokens: int
    slots: int
    prompt: bool


class CompiledHidden:
    """`Transformer.hidden` in static shapes, for the model's own cache."""

    def __init__(self, model: Transformer, chunk: int, lookup: int = 0, **compiler: Any) -> None:
        """`chunk` is the most tokens of a prompt that are read at once, `lookup` the most that are proposed after a
        row's last token; `compiler` are torch.compile's options."""
        self.model, self.cache = model, model.own_cache()
        rows, slots = self.cache.rows, self.cache.slots
        self.rows = [*range(1, min(EXACT_ROWS, rows)), *_sizes(min(EXACT_ROWS, rows), rows)]
        self.slots = _sizes(min(FEWEST_SLOTS, slots), slots)
        self.prompt_slots = self.slots[::-2][::-1]  # a prompt's arithmetic is in its matrices: every other will do
        longest = min(chunk, slots)
        self.pieces = [*(size for size in PIECES if size < longest), longest]
        self.steps = sorted({1, min(1 + lookup, slots)})
        self.plain = model.hidden
        self.tables = model.rotation(slots)
        self.dtype, self.device = model.norm.weight.dtype, model.norm.weight.device
        self.decode: Callable[..., Tensor] = torch.compile(self._decode, dynamic=False, fullgraph=True, **compiler)
        self.read: Callable[..., Tensor] = torch.compile(self._read, dynamic=False, fullgraph=True, **compiler)
        self.recorded: dict[Shape, Recorded] = {}

    def __call__(self, tokens: Tensor, start_pos: Start | None = None, cache: KVCache | None = None) -> Tensor:
        """As `Transformer.hidden`; whole sequences, and another cache than the one it was compiled for, are left to
        that."""
        B, T = tokens.shape
        if start_pos is not None and cache is None:
            cache = self.model.own_cache()
        if start_pos is None or cache is not self.cache or not tokens.numel():
            return self.plain(tokens, start_pos, cache)
        span = start_pos if isinstance(start_pos, Span) else cache.span(start_pos, B, T)
        # The next run of a recorded graph writes where this one did: what it gives is copied at once.
        out = torch.empty(B, T, self.model.args.dim, dtype=self.dtype, device=self.device)
        with torch.inference_mode():  # as it was compiled
            positions = span.positions.expand(B, T)
            if span.row == 0 and self.steps[-1] >= T:
                shape = self._shape(B, T, max(span.starts) + T, prompt=False)
                out.copy_(self._run(shape, tokens, positions)[:B, :T])
                return out
            for i in range(B):
                start = span.starts[i if len(span.starts) > 1 else 0]
                for at in range(0, T, self.pieces[-1]):
                    end = min(at + self.pieces[-1], T)
                    shape = self._shape(1, end - at, start + end, prompt=True)
                    part = tokens[i : i + 1, at:end], positions[i : i + 1, at:end]
                    out[i, at:end] = self._run(shape, *part, row=span.row + i)[0, : end - at]
        return out

    def _shape(self, rows: int, tokens: int, end: int, prompt: bool) -> Shape:
        """The smallest graph for so many rows and tokens, the last of which is before the slot `end`."""
        sizes = ([1], self.pieces, self.prompt_slots) if prompt else (self.rows, self.steps, self.slots)
        found = [next(size for size in of if size >= n) for of, n in zip(sizes, (rows, tokens, end), strict=True)]
        return Shape(found[0], found[1], found[2], prompt)

    def _run(self, shape: Shape, tokens: Tensor, positions: Tensor, row: int = 0) -> Tensor:
        """The hidden states of a graph's shape, which the next run overwrites."""
        inputs = [_padded(tensor, shape) for tensor in (tokens, positions)]
        if shape.prompt:
            return self.read(shape.slots, *inputs, torch.full((1,), row, device=self.device))
        if shape.rows > EXACT_ROWS:
            inputs.append(torch.arange(shape.rows, device=self.device) < len(tokens))
        graph = self.recorded.get(shape)
        return graph(inputs) if graph else self.decode(shape.slots, *inputs)

    # What is compiled ------------------------------------------------------------------------------------------------

    def _decode(self, slots: int, tokens: Tensor, positions: Tensor, real: Tensor | None = None) -> Tensor:
        """Of the cache's first rows. With `real` (rows,), those where it is False are padding: they keep what they
        hold."""
        rows = torch.arange(len(tokens), device=self.device)[:, None]

        def extend(store: Tensor, x: Tensor) -> Tensor:
            new = self.cache.pack(x)  # (rows, T, K, D)
            # A single write: of two, a compiler makes copies of the whole cache.
            kept = new if real is None else torch.where(real[:, None, None, None], new, store[rows, :, positions])
            store[rows, :, positions] = kept
            return self.cache.unpack(store[: len(tokens), :, :slots])

        return self._blocks(slots, tokens, positions, extend)

    def _read(self, slots: int, tokens: Tensor, positions: Tensor, row: Tensor) -> Tensor:
        """Of one row, whose number is `row` (1,)."""

        def extend(store: Tensor, x: Tensor) -> Tensor:
            store[row[:, None], :, positions] = self.cache.pack(x)
            return self.cache.unpack(store[row, :, :slots])  # a copy of the row

        return self._blocks(slots, tokens, positions, extend)

    def _blocks(self, slots: int, tokens: Tensor, positions: Tensor, extend: Callable[..., Tensor]) -> Tensor:
        """As `Transformer.hidden`; `extend` takes a layer's keys or values, and the new ones, to those visible."""
        span = Span((), tokens.shape[1], slots, self.dtype, self.device, _positions=positions)
        rotation = self.tables[0][positions].unsqueeze(2), self.tables[1][positions].unsqueeze(2)
        h = self.model.tok_embeddings(tokens)
        for layer, *stores in zip(self.model.layers, self.cache.keys, self.cache.values, strict=True):

            def both(*new: Tensor, stores: Sequence[Tensor] = stores) -> tuple[Tensor, Tensor]:
                return extend(stores[0], new[0]), extend(stores[1], new[1])

            h = layer(h, rotation, span, both)
        normed: Tensor = self.model.norm(h)
        return normed

    # Before the first step -------------------------------------------------------------------------------------------

    def shapes(self) -> Iterator[Shape]:
        """Every one that a step may have."""
        for slots in self.slots:
            yield from (Shape(rows, tokens, slots, False) for tokens in self.steps for rows in self.rows)
        for slots in self.prompt_slots:
            yield from (Shape(1, tokens, slots, True) for tokens in self.pieces)

    def compile(self, shape: Shape) -> None:
        """Makes one of them, by a step that is one."""
        zeros = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64, device=self.device)
        self._run(shape, zeros, zeros)
        if self.device.type == "cuda" and not shape.prompt:
            inputs = [zeros, zeros.clone()]
            if shape.rows > EXACT_ROWS:
                inputs.append(torch.ones(shape.rows, dtype=torch.bool, device=self.device))
            before = next(iter(self.recorded.values()), None)
            pool = before.graph.pool() if before else None
            self.recorded[shape] = Recorded(partial(self.decode, shape.slots), inputs, pool)


class Recorded:
    """A function as a CUDA graph: all its kernels by one call."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any) -> None:
        """`function` is compiled already; `pool` is the memory of graphs that don't run at the same time."""
        self.inputs, self.graph = inputs, torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(inputs[0].device)
        aside = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*inputs)
        now.wait_stream(aside)
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.out = function(*inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the next call overwrites."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.out


def compile_(
    model: Transformer, chunk: int = 512, progress: bool = True, lookup: int = 0, **compiler: Any
) -> Transformer:
    """Compiles every graph that `model` will be asked for, with its own cache, and puts the result in the place of
    `model.hidden`. `chunk` and `lookup` are the loop's: the most tokens of a prompt read at once, and the most proposed
    after a row's last. What the cache holds is forgotten. The first time takes minutes; the compiler keeps what it made
    on disk, and the next start reads it. Raises ValueError where there is no C++ compiler.
    """
    on_cpu = model.norm.weight.device.type == "cpu"
    if on_cpu and compiler.get("backend", "inductor") == "inductor":
        _require_compiler()
    made = CompiledHidden(model, chunk, lookup, **compiler)
    shapes = list(made.shapes())
    # torch.compile counts the shapes of a function, and of all functions together, and by default gives up early.
    limits = {"recompile_limit": len(shapes) + 8, "accumulated_recompile_limit": len(shapes) + 256}
    with torch.inference_mode(), torch._dynamo.config.patch(limits):
        if on_cpu:
            close_(model)
            nothing = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
            model.logits(made._decode(made.slots[0], nothing, nothing))  # what is closed learns how wide it is
        for shape in tqdm(shapes, desc="compiling", unit="graph", disable=not progress, leave=False):
            made.compile(shape)
    made.cache.forget()
    model.hidden = made  # type: ignore[method-assign]
    return model


def _padded(x: Tensor, shape: Shape) -> Tensor:
    """(B, T) to a graph's rows and tokens, int64: a row's last is repeated, and rows of zeros follow. Always a copy: a
    view of what was made elsewhere would be something else to the compiler."""
    B, T = x.shape
    wide = torch.cat((x, x[:, -1:].expand(-1, shape.tokens - T)), 1).to(torch.int64)
    return F.pad(wide, (0, 0, 0, shape.rows - B)) if shape.rows > B else wide


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
