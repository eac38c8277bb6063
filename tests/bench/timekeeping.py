"""Time that tests make: a clock that moves when it is told to, and models that take as long as they are meant to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llama.bench.rounds import Timer
from llama.bench.subject import Work

WORK = Work(layers=1000, head=100, kv_slot=10, score=8, number_bytes=2, weight_bytes=2.0, arithmetic="float32")


class Clock:
    """Seconds that pass only by `spend`. `pace` makes all that follows slower."""

    def __init__(self) -> None:
        self.now, self.pace = 0.0, 1.0

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.pace

    def __call__(self) -> float:
        return self.now

    @property
    def timer(self) -> Timer:
        return Timer(self)


class Paced:
    """A subject that computes nothing: `step` takes so many seconds, `head` so many, reading so many a token."""

    work = WORK

    def __init__(self, clock: Clock, step: float, head: float = 0.0, read: float = 0.0, overhead: float = 0.0) -> None:
        self.clock, self.seconds, self.before = clock, (step, head, read), overhead
        self.calls: list[str] = []

    def room(self, rows: int, slots: int) -> None:
        self.calls.append(f"room {rows} {slots}")

    def read(self, prompts: Sequence[list[int]]) -> Tensor:
        self.clock.spend(self.seconds[2] * len(prompts) * len(prompts[0]))
        self.calls.append("read")
        return torch.zeros(len(prompts), 16)

    def step(self, tokens: Tensor, position: int) -> Tensor:
        self.clock.spend(self.seconds[0])
        self.calls.append(f"step {position}")
        return torch.zeros(len(tokens), 16)

    def stream(self, prompts: Sequence[list[int]], n: int) -> Iterator[int]:
        self.read(prompts)
        for i in range(n):
            yield 1
            if i < n - 1:
                self.clock.spend(self.seconds[0] + self.before)

    def head(self, tokens: Tensor) -> Tensor:
        self.clock.spend(self.seconds[1])
        return torch.zeros(len(tokens), 16)

    def cache_bytes(self, rows: int, tokens: int) -> int:
        return 0
