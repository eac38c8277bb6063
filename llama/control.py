"""Processes that do the same: what one tells the others, and how they notice when one dies or hangs.

Inside a collective the backend notices, in words of its own. Outside of one, while each rank reads files or compiles,
nobody does: so every rank shows that it lives. Nothing here knows what a Llama is.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist

from llama.errors import LostRank

MESSAGE = 512
"""Bytes of the message that carries a small object: its length in 8 bytes, and its pickle."""
HOUR, WEEK = 3600.0, 7 * 24 * 3600.0
LOSS = re.compile(
    "(closed|reset) by (remote )?peer|broken pipe|timed out|timeout|refused|failed to (connect|recv)|remote process"
    "|aborted",
    re.IGNORECASE,
)
"""How gloo, NCCL and the store report a lost rank. Their other errors are of sizes that differ, memory, taken ports."""


def is_loss(error: RuntimeError) -> bool:
    """Whether a backend's error says that another rank is lost."""
    text = str(error).partition("Exception raised from")[0]  # without the C++ stack, which has its own words
    return (isinstance(error, dist.DistError) or "gloo" in text.lower()) and bool(LOSS.search(text))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this block, which would leave half of something. In the main thread; others don't get
    it. Not where the program around Python (R, say) handles it, whose handler could not be put back."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pressed: list[object] = []
    before = signal.signal(signal.SIGINT, lambda *frame: pressed.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)  # for whoever handled it before: a block around this one, or the program


@contextlib.contextmanager
def waiting(group: dist.ProcessGroup, seconds: float, afterwards: float) -> Iterator[None]:
    """Collectives of `group` wait for so long in this block."""
    set_timeout(group, seconds)
    try:
        yield
    finally:
        set_timeout(group, afterwards)


def set_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class Alone(dist.ProcessGroup):
    """A group of one process, in which nothing is communicated. It needs no backend, which would open ports."""


def start_alone() -> None:
    """torch.distributed for one process, through a store in its own memory."""
    if not hasattr(dist.Backend, "ALONE"):
        dist.Backend.register_backend(
            "alone",
            lambda store, rank, size, timeout: Alone(rank, size),  # type: ignore[call-arg]
            devices=["cpu", "cuda", "mps"],
        )
    dist.init_process_group("alone", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def start_together(backend: str, init_method: str | None, timeout: float, world_size: int, rank: int) -> None:
    """torch.distributed for several processes."""
    dist.init_process_group(backend, init_method, timedelta(seconds=timeout), world_size, rank)
    # gloo's threads let go of the last message a little later than we do, and need Python for it: a process that ended
    # first would be aborted (SIGABRT) in one of some twenty runs.
    atexit.register(time.sleep, 0.05)


class Silence(io.TextIOWrapper):
    """A standard output that drops what is printed until its `end`, and then passes it on to the one it stands for."""

    def __init__(self, instead_of: TextIO) -> None:
        encoding = getattr(instead_of, "encoding", None) or "utf-8"
        super().__init__(io.BufferedWriter(io.FileIO(os.devnull, "w")), encoding=encoding, errors="replace")
        self.instead_of, self.silent = instead_of, True

    def write(self, text: str) -> int:
        return len(text) if self.silent else self.instead_of.write(text)

    def flush(self) -> None:
        if not self.silent:
            self.instead_of.flush()

    def end(self) -> None:
        """Puts back what it stands for, where nobody has put something else there since; who has may still hold it."""
        self.silent = False
        if sys.stdout is self:
            sys.stdout = self.instead_of

    def __del__(self) -> None:
        self.buffer.close()  # or Python would warn of it


SILENCES: list[Silence] = []
"""Those that have not ended: more than one where `sys.stdout` was replaced in between."""


def set_silence(silent: bool | None) -> None:
    """Silences `sys.stdout`, or ends that; None leaves it as it is.

    Only what Python prints is dropped, as in the published package. The descriptor stays open: NCCL's log, child
    processes and `sys.__stdout__` still reach the terminal.
    """
    if silent and sys.stdout is not None and sys.stdout not in SILENCES:
        sys.stdout.flush()
        SILENCES.append(Silence(sys.stdout))
        sys.stdout = SILENCES[-1]
    while silent is False and SILENCES:
        SILENCES.pop().end()


@dataclass(frozen=True)
class Processes:
    """This process among those that do the same: they talk, wait for each other, and notice when one is lost."""

    rank: int
    """0 to world_size - 1. Rank 0 samples, reads and prints; the others follow."""
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None
    """A gloo group for Python objects that waits for days: in a chat, rank 0 waits for a person."""
    timeout: float = 60.0
    """Seconds that a rank waits for the others in a collective."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def lost(self, which: str = "another rank") -> LostRank:
        """The error to raise where `which` rank is lost."""
        return LostRank(
            f"rank {self.rank} noticed that {which} of this run has ended or has not answered for {self.timeout:g} s: "
            "read that rank's own output, then start again, with a larger --timeout if it was only slow"
        )

    @contextlib.contextmanager
    def named_loss(self) -> Iterator[None]:
        """Turns what gloo, NCCL or the store raise in this block about a lost rank into LostRank, one sentence."""
        try:
            yield
        except RuntimeError as error:
            if is_loss(error):
                raise self.lost() from None
            raise

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the ranks count on each other: Ctrl-C waits for its end, and a lost rank is named."""
        return contextlib.nullcontext() if self.world_size == 1 else self._undisturbed()

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with uninterrupted(), self.named_loss():
            yield

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable object on every rank. The others may wait for it as long as it takes.

        A pickle of up to MESSAGE - 8 bytes travels in one message: each decode step sends one.
        """
        if self.control is None:
            return value
        pickled = pickle.dumps(value) if self.leads else b""
        message = bytearray(len(pickled).to_bytes(8, "little") + pickled).ljust(MESSAGE)
        with self.named_loss():
            self.control.broadcast(torch.frombuffer(message, dtype=torch.uint8, count=MESSAGE), 0).wait()
            size = int.from_bytes(message[:8], "little")
            if size > MESSAGE - 8:
                message = message.ljust(8 + size)
                self.control.broadcast(torch.frombuffer(message, dtype=torch.uint8, offset=MESSAGE), 0).wait()
        return value if self.leads else pickle.loads(memoryview(message)[8 : 8 + size])

    def agree(self, good: bool) -> bool:
        """Whether every rank says True. Raises LostRank where another has said nothing for `timeout` seconds."""
        if self.control is None:
            return good
        verdict = torch.tensor([good], dtype=torch.uint8, device="cpu")
        with self.named_loss(), waiting(self.control, self.timeout, afterwards=WEEK):
            dist.all_reduce(verdict, dist.ReduceOp.MIN, group=self.control)
        return bool(verdict)

    @contextlib.contextmanager
    def all_ranks(self) -> Iterator[None]:
        """What one rank raises in this block, all raise at its end, so that none waits for one that has gone.

        Where rank 0 itself succeeded, it raises the first other rank's error: it is the one that prints. A rank may
        take as long as it needs in its block. Raises LostRank where another has not been in it for `timeout` seconds:
        it is dead or stopped, or has not come to it.
        """
        if self.control is None:
            yield
            return
        heartbeat = Heartbeat(self.rank, self.world_size, self.timeout, self.control.group_name, self.lost)
        heartbeat.start()
        try:
            with self.named_loss():
                yield
        except BaseException as raised:
            heartbeat.error = raised
            if not isinstance(raised, Exception):
                raise
        finally:
            heartbeat.ended.set()
        errors = [error for error in (heartbeat.error, *heartbeat.others()) if error is not None]
        if errors:  # a cause comes before a LostRank, which may be its effect
            raise min(errors, key=lambda error: isinstance(error, LostRank))


class Heartbeat(threading.Thread):
    """Shows the other ranks that this one lives, and learns through the store they share how each ended its block.

    Python threads run while a rank reads files or compiles, so a rank whose count stands still has died or is stopped.
    This thread alone uses the store: where the rank that hosts it is stopped, a call never returns.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, group: str, lost: Callable[[str], LostRank]) -> None:
        """`lost` makes the error for a rank of which nothing is heard for `timeout` seconds."""
        super().__init__(daemon=True)
        self.rank, self.world_size, self.timeout, self.group, self.lost = rank, world_size, timeout, group, lost
        self.ended, self.rounds = threading.Event(), 0
        self.error: BaseException | None = None  # this rank's, when its block has `ended`
        self.errors: dict[int, BaseException | None] = {}

    def others(self) -> list[BaseException | None]:
        """What each rank raised, in their order; or that it is lost."""
        rounds = -1
        while self.is_alive() and self.rounds != rounds:
            rounds = self.rounds
            self.join(self.timeout)
        return [self.errors.get(rank, self.lost("another rank")) for rank in range(self.world_size)]

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store's, where its host has gone
            store = dist.distributed_c10d._get_default_store()
            store = store.clone() if hasattr(store, "clone") else store  # torch's way to share one between threads
            self._meet(dist.distributed_c10d.PrefixStore(f"all_ranks.{self.group}", store))

    def _meet(self, store: dist.distributed_c10d.PrefixStore) -> None:
        rank, world_size, timeout = self.rank, self.world_size, self.timeout
        block = store.add(f"blocks.{rank}", 1)
        counts, silent, now = [b""] * world_size, [0.0] * world_size, time.monotonic()
        while len(self.errors) < world_size:
            if not self.ended.wait(min(1.0, timeout / 5)):
                store.add(f"{block}.count.{rank}", 1)
            elif rank not in self.errors:
                store.set(f"{block}.error.{rank}", pickle.dumps(_picklable(self.error)))  # type: ignore[arg-type]
            else:
                time.sleep(0.01)
            then, now = now, time.monotonic()
            for other in set(range(world_size)) - self.errors.keys():
                if store.check([f"{block}.error.{other}"]):
                    self.errors[other] = pickle.loads(store.get(f"{block}.error.{other}"))
                    continue
                count = store.get(f"{block}.count.{other}") if store.check([f"{block}.count.{other}"]) else b""
                # At most 2 s a round: while this process was stopped itself (Ctrl-Z), so were the others.
                silent[other] = silent[other] + min(now - then, 2.0) if count == counts[other] else 0.0
                counts[other] = count
                if silent[other] > timeout and self.ended.is_set():
                    self.errors[other] = self.lost(f"rank {other}")
            self.rounds += 1
        # The rank that hosts the store may end next: each waits until all that live have read it.
        living = world_size - sum(isinstance(error, LostRank) for error in self.errors.values())
        store.add(f"{block}.left", 1)
        while int(store.get(f"{block}.left")) < living and time.monotonic() < now + timeout:
            time.sleep(0.001)


def _picklable(error: BaseException | None) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
