"""Rounds: what is compared takes turns, so that a slow moment of the machine hits all alike.

A round runs every task once, beginning with another one each time, so that none is always the one after a pause or
after the one that heats the processor. A ratio is taken within each round, between two neighbours in time, and the
median of those ratios is the figure: what a drift of the clock multiplies above and below the line cancels out.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Timer:
    """A clock, in seconds, that is read when the device has done what it was told."""

    clock: Callable[[], float] = time.perf_counter
    synchronize: Callable[[], None] = _nothing

    @classmethod
    def of(cls, device: torch.device) -> Timer:
        """The one for work on `device`."""
        if device.type == "cuda":
            return cls(synchronize=lambda: torch.cuda.synchronize(device))
        return cls(synchronize=torch.mps.synchronize) if device.type == "mps" else cls()

    def now(self) -> float:
        self.synchronize()
        return self.clock()


Task = Callable[[Timer], float]
"""Does its work once, and returns the seconds that count of it."""


def timed(work: Callable[[], object]) -> Task:
    """All of `work` counts."""

    def task(timer: Timer) -> float:
        begin = timer.now()
        work()
        return timer.now() - begin

    return task


def interleave(
    tasks: Mapping[Name, Task],
    rounds: int,
    timer: Timer,
    warm_up: int = 1,
    what: str = "",
    progress: bool = False,
) -> dict[Name, list[float]]:
    """The seconds of each task in each of `rounds` rounds, after `warm_up` rounds that don't count.

    The number of rounds is given, never found from the time that they take: ranks that share a model must all do the
    same. Raises ValueError where there is nothing to do.
    """
    if not tasks or rounds < 1 or warm_up < 0:
        raise ValueError(f"{len(tasks)} tasks in {rounds} rounds after {warm_up}; give at least one task and one round")
    names, found = list(tasks), {name: [0.0] * rounds for name in tasks}
    gc.collect()
    for i in tqdm(range(-warm_up, rounds), desc=what, unit="round", leave=False, disable=not progress):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds = tasks[name](timer)
            if i >= 0:
                found[name][i] = seconds
    return found


@dataclass(frozen=True)
class Spread:
    """What some rounds gave: the middle one, the smallest and the largest."""

    median: float
    low: float
    high: float
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(top: Sequence[float], bottom: Sequence[float]) -> list[float]:
    """Round by round, `top` over `bottom`."""
    return [a / b for a, b in zip(top, bottom, strict=True)]
