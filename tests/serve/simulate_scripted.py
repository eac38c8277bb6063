"""The real loop around a model that computes nothing: what each step moves on, as the simulation traces it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llama import parallel
from llama.cache import KVCache, Span
from llama.decoding import Loop
from llama.prompts import Prompt
from llama.requests import Request
from llama.sampling import Sampling
from llama.serve.simulate import Simulated
from llama.tokenizer import Tokenizer

WORDS = 8


class Scripted:
    """Stands in for a Transformer: every token is followed by token 7."""

    def __init__(self, rows: int, slots: int) -> None:
        self.args = SimpleNamespace(max_seq_len=slots, vocab_size=1 << 20)
        self.cache = KVCache(1, 1, 2, rows, slots, dtype=torch.float32, device=torch.device("cpu"))
        self.calls: list[tuple[int, int, list[int]]] = []  # first row, T, where each row's tokens stand

    def own_cache(self) -> KVCache:
        return self.cache

    def hidden(self, tokens: Tensor, span: Span, cache: KVCache) -> Tensor:
        starts = list(span.starts) if len(span.starts) == len(tokens) else list(span.starts) * len(tokens)
        self.calls.append((span.row, span.T, starts))
        return torch.zeros(*tokens.shape, 1)

    def logits(self, h: Tensor) -> Tensor:
        found = torch.zeros(*h.shape[:-1], WORDS)
        found[..., 7] = 1
        return found


class Watched(Loop):
    """Writes down what each half of a step moves on, by the callers' numbers of the requests."""

    trace: list[Any]

    def _read(self, row: int) -> None:
        rows = [request.row for request in self._rows]
        super()._read(row)
        first, T, starts = self.model.calls.pop()  # type: ignore[operator]
        self.trace.append(("read", list(zip(rows[first : first + len(starts)], starts, strict=True)), T))

    def _decode(self, n: int) -> None:
        rows = [request.row for request in self._rows]
        super()._decode(n)
        _, _, starts = self.model.calls.pop()  # type: ignore[operator]
        self.trace.append(("decode", rows[: len(starts)], max(starts) + 1))


def tokens_of(number: int, sequence: Simulated) -> list[int]:
    """A prompt with bos, its group's beginning and then tokens of its own."""
    shared = sequence.shared if sequence.group >= 0 else 1
    beginning = [1, *(100_000 + 1000 * sequence.group + i for i in range(shared - 1))]
    own = [200_000 + 997 * number + i for i in range(max(0, sequence.prompt - len(beginning)))]
    return (beginning + own)[: sequence.prompt]


def real_trace(
    tokenizer: Tokenizer, sequences: list[Simulated], rows: int, slots: int, chunk: int
) -> tuple[list[Any], list[tuple[float, float]]]:
    """What the real loop does where each half of a step takes one second, and of each request when its first and its
    last token came."""
    loop = Watched(Scripted(rows, slots), parallel.start(1), chunk=chunk)  # type: ignore[arg-type]
    loop.trace = []
    requests = [
        Request(tokenizer, Prompt(tokens_of(i, s), frozenset()), s.answer, Sampling(0.0), row=i)
        for i, s in enumerate(sequences)
    ]
    joined, clock, times = 0, 0.0, [[-1.0, -1.0] for _ in requests]
    while joined < len(requests) or not all(request.gone for request in requests):
        if all(request.gone for request in requests[:joined]):
            clock = max(clock, sequences[joined].arrival)
        while joined < len(requests) and sequences[joined].arrival <= clock:
            loop.join(requests[joined])
            joined += 1
        before = len(loop.trace)
        loop.step()
        clock += len(loop.trace) - before
        for request, own in zip(requests, times, strict=True):
            if request.written and own[0] < 0:
                own[0] = clock
            if request.gone and own[1] < 0:
                own[1] = clock
    return loop.trace, [(first, last) for first, last in times]
