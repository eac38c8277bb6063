"""Tensor parallelism: one model on several ranks, and one process that needs none of it.

Every rank holds a *shard* of each matrix, cut so that attention heads and feed-forward columns stay whole: what is
cut by columns needs no communication until what is cut by rows sums it up, one all-reduce after attention and one
after the feed-forward layer (Megatron-LM, arXiv 1909.08053, section 3). The layers and their communication are
fairscale's; this is the only file that knows it. Under torchrun the ranks find each other through its store; alone,
a process is its own group of one, through a store in its own memory: no port, no launcher, no environment variable.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as groups
from fairscale.nn.model_parallel import layers, mappings
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INIT_STD = 0.02  # of freshly made weights, normal; as GPT-2's
MESSAGE = 512
"""Bytes of the message that carries a small object: its length in 8 bytes, and its pickle."""
HOUR, WEEK = 3600.0, 7 * 24 * 3600.0
LOSS = re.compile(
    "(closed|reset) by (remote )?peer|broken pipe|timed out|timeout|refused|failed to (connect|recv)|remote process"
    "|aborted",
    re.IGNORECASE,
)
"""How gloo, NCCL and the store report a lost rank. Their other errors are of sizes that differ, memory, taken ports."""


class LostRank(RuntimeError):
    """Another rank of this run has ended, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share one model."""

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
            text = str(error).partition("Exception raised from")[0]  # without the C++ stack, which has its own words
            if (isinstance(error, dist.DistError) or "gloo" in text.lower()) and LOSS.search(text):
                raise self.lost() from None
            raise

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank; the others pass one of the same shape and dtype, which is overwritten."""
        if self.world_size > 1:
            with self.named_loss():
                dist.broadcast(tensor, groups.get_model_parallel_src_rank(), group=groups.get_model_parallel_group())
        return tensor

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
        verdict = torch.tensor([good], dtype=torch.uint8)
        with self.named_loss(), _waiting(self.control, self.timeout, afterwards=WEEK):
            dist.all_reduce(verdict, dist.ReduceOp.MIN, group=self.control)
        return bool(verdict)

    def patience(self) -> contextlib.AbstractContextManager[None]:
        """In this block the model's collectives wait for an hour: ranks compile their graphs at different speed."""
        if self.world_size == 1:
            return contextlib.nullcontext()
        return _waiting(groups.get_model_parallel_group(), HOUR, afterwards=self.timeout)

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
        heartbeat = _Heartbeat(self)
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

    together = all_ranks


class _Heartbeat(threading.Thread):
    """Shows the other ranks that this one lives, and learns through the store they share how each ended its block.

    Python threads run while a rank reads files or compiles, so a rank whose count stands still has died or is stopped.
    This thread alone uses the store: where the rank that hosts it is stopped, a call never returns.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(daemon=True)
        self.ranks, self.ended, self.rounds = ranks, threading.Event(), 0
        self.error: BaseException | None = None  # this rank's, when its block has `ended`
        self.errors: dict[int, BaseException | None] = {}

    def others(self) -> list[BaseException | None]:
        """What each rank raised, in their order; or that it is lost."""
        rounds = -1
        while self.is_alive() and self.rounds != rounds:
            rounds = self.rounds
            self.join(self.ranks.timeout)
        return [self.errors.get(rank, self.ranks.lost()) for rank in range(self.ranks.world_size)]

    def run(self) -> None:
        assert self.ranks.control is not None
        with contextlib.suppress(RuntimeError):  # the store's, where its host has gone
            store = dist.distributed_c10d._get_default_store()
            store = store.clone() if hasattr(store, "clone") else store  # torch's way to share one between threads
            self._meet(dist.distributed_c10d.PrefixStore(f"all_ranks.{self.ranks.control.group_name}", store))

    def _meet(self, store: dist.distributed_c10d.PrefixStore) -> None:
        rank, world_size, timeout = self.ranks.rank, self.ranks.world_size, self.ranks.timeout
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
                    self.errors[other] = self.ranks.lost(f"rank {other}")
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


@contextlib.contextmanager
def _waiting(group: dist.ProcessGroup, seconds: float, afterwards: float) -> Iterator[None]:
    """Collectives of `group` wait for so long in this block."""
    _set_timeout(group, seconds)
    try:
        yield
    finally:
        _set_timeout(group, afterwards)


def _set_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def default_device() -> torch.device:
    """A GPU where there is one: this rank's under torchrun, Apple's for a single process; else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    mps = torch.backends.mps.is_available() and int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("mps" if mps else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a CUDA GPU that has it, float16 on an older one and on Apple's (macOS before 14 has no bfloat16),
    float32 elsewhere (a CPU is slow in float16)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def _own_device(given: torch.device | str | None, world_size: int) -> torch.device:
    """`given` on this rank: "cuda" is the GPU of its LOCAL_RANK. Raises ValueError where it can't be used."""
    try:
        device = default_device() if given is None else torch.device(given)
        if device.type == "cuda" and world_size > 1:
            own, gpus = int(os.environ.get("LOCAL_RANK", device.index or 0)), torch.cuda.device_count()
            if own >= gpus or device.index not in (None, own):
                raise ValueError(
                    f"device {device} for the rank with LOCAL_RANK {own} (GPUs that PyTorch finds: {gpus}): each rank "
                    "needs a GPU of its own, so start as many ranks at most and give --device cuda without a number"
                )
            device = torch.device("cuda", own)
            torch.cuda.set_device(device)  # NCCL uses the current one
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {given} can't be used here ({reason}): give cpu, cuda, cuda:N or mps") from None
    return device


def start(
    model_parallel_size: int | None = None,
    *,
    device: torch.device | str | None = None,
    timeout: float = 60.0,
    init_method: str | None = None,
) -> Ranks:
    """Joins the processes that torchrun started into groups of `model_parallel_size` (default: all of them).

    Calling it again returns the groups there are. `timeout`, in seconds, is how long a rank waits for the others in
    a collective before it gives up. `init_method` is torch.distributed's ("file:///..."; default: torchrun's).
    `device="cuda"` is this rank's own GPU; with several ranks it becomes the process's current one, as NCCL needs it.
    Raises ValueError where the number of processes is no multiple of `model_parallel_size`, or it is not the one
    the groups were started with, or a rank can't use its device; LostRank where other ranks don't come.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    size = world_size if model_parallel_size is None else model_parallel_size
    if size < 1 or world_size % size:
        raise ValueError(
            f"model_parallel_size {size} with {world_size} process{'es' if world_size > 1 else ''}: start a multiple "
            f"of {size} processes (torchrun --nproc_per_node {size} ...), or pass model_parallel_size=None"
        )
    ranks = Ranks(int(os.environ.get("RANK", 0)), size, torch.device("cpu"), None, timeout)
    with ranks.named_loss():
        if not dist.is_initialized() and world_size == 1:
            _start_alone()
        elif not dist.is_initialized():
            gpus = torch.cuda.is_available() and str(device or default_device()).startswith("cuda")
            backend, wait = "nccl" if gpus else "gloo", timedelta(seconds=timeout)
            dist.init_process_group(backend, init_method, wait, world_size, ranks.rank)
        if not groups.model_parallel_is_initialized():
            with contextlib.redirect_stdout(io.StringIO()):  # it reports its sizes by print()
                groups.initialize_model_parallel(size)
        if groups.get_model_parallel_world_size() != size:
            raise ValueError(
                f"model_parallel_size {size}, but this process already belongs to a group of "
                f"{groups.get_model_parallel_world_size()}; use that, or start afresh"
            )
        ranks = replace(ranks, rank=groups.get_model_parallel_rank(), control=_control_group(size, timeout))
    with ranks.all_ranks():  # a device may suit one rank alone
        return replace(ranks, device=_own_device(device, world_size))


class _Alone(dist.ProcessGroup):
    """A group of one process. fairscale skips communication in it, so it needs no backend, which would open ports."""


def _start_alone() -> None:
    if not hasattr(dist.Backend, "ALONE"):
        dist.Backend.register_backend(
            "alone",
            lambda store, rank, size, timeout: _Alone(rank, size),  # type: ignore[call-arg]
            devices=["cpu", "cuda", "mps"],
        )
    dist.init_process_group("alone", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _control_group(size: int, timeout: float) -> dist.ProcessGroup | None:
    if size == 1:
        return None
    _set_timeout(groups.get_model_parallel_group(), timeout)
    mine = None
    for first in range(0, dist.get_world_size(), size):  # every process takes part in making every group
        members = list(range(first, first + size))
        # With this timeout a rank that dies now does not hold the others.
        group = dist.new_group(members, backend="gloo", timeout=timedelta(seconds=timeout))
        if dist.get_rank() in members:
            _set_timeout(group, WEEK)
            mine = group
    return mine


def stop() -> None:
    """Leaves the groups, so that the process ends without a complaint or may start others."""
    groups.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def shards() -> int:
    """Into how many ranks the layers made now are cut. Starts a group of one where there is none."""
    if not groups.model_parallel_is_initialized():
        start()
    return int(groups.get_model_parallel_world_size())


def share(whole: int, rank: int, ranks: int, unit: int = 1, repeat: bool = False) -> tuple[int, int]:
    """Where rank `rank`'s part of a dimension of size `whole` begins, and its size: a number of whole `unit`s.

    With `repeat`, neighbouring ranks hold the same unit where there are fewer units than ranks. Raises ValueError
    where the units can't be shared evenly.
    """
    units = whole // unit
    parts = min(units, ranks) if repeat else ranks
    if units % parts or ranks % parts:
        raise ValueError(f"{units} can't be shared by {ranks} ranks: choose a --nproc_per_node that divides it, or 1")
    size = units // parts * unit
    return rank * parts // ranks * size, size


def _weight(rows: int, columns: int, cut: int, unit: int = 1, repeat: bool = False) -> nn.Parameter:
    """This rank's part of a (rows, columns) matrix cut on dimension `cut`; every rank draws the whole one, so with
    one seed the model is the same however many ranks share it. On the meta device nothing is drawn."""
    ranks = shards()
    start, size = share((rows, columns)[cut], groups.get_model_parallel_rank(), ranks, unit, repeat)
    part = torch.empty((size, columns) if cut == 0 else (rows, size))
    if not part.is_meta:
        part.copy_(torch.empty(rows, columns).normal_(std=INIT_STD).narrow(cut, start, size))
    return nn.Parameter(part)


# fairscale's layers, with its communication between ranks. Their constructors are replaced: those fill a whole float32
# matrix in memory for each shard and can't be made on the meta device. So are their forwards, by the same steps with a
# name for the multiplication, and with none of the communication where one process holds all: then nothing but a
# matrix product is left to trace and compile.


class ParallelEmbedding(layers.ParallelEmbedding):  # type: ignore[misc]
    """(B, T) ids to (B, T, dim); each rank looks up its part of the dim, then all gather."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = _weight(num_embeddings, embedding_dim, cut=1)

    def forward(self, tokens: Tensor) -> Tensor:
        part = F.embedding(tokens, self.weight)
        return part if part.shape[-1] == self.embedding_dim else mappings.gather_from_model_parallel_region(part)


class ColumnParallelLinear(layers.ColumnParallelLinear):  # type: ignore[misc]
    """(..., in) to (..., out / ranks), or to (..., out) on every rank with `gather_output`. No bias.

    The output is cut between units of `unit` features. With `repeat`, neighbouring ranks hold the same unit where
    there are more ranks than units; a gradient of such a weight is this rank's part of it. `product` may be replaced
    by any function of x that multiplies by this rank's weight: packed, quantised, fused.
    """

    def __init__(
        self, in_features: int, out_features: int, gather_output: bool = False, unit: int = 1, repeat: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.gather_output = in_features, out_features, gather_output
        self.ranks = shards()
        self.weight = _weight(out_features, in_features, 0, unit, repeat)

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return self.product(x)
        part = self.product(mappings.copy_to_model_parallel_region(x))
        return mappings.gather_from_model_parallel_region(part) if self.gather_output else part

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RowParallelLinear(layers.RowParallelLinear):  # type: ignore[misc]
    """(..., in / ranks) to (..., out), summed over the ranks. No bias. `product` as ColumnParallelLinear's."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.ranks = shards()
        self.weight = _weight(out_features, in_features, cut=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.total(self.product(x))

    def total(self, part: Tensor) -> Tensor:
        """The sum of the ranks' parts."""
        if torch.compiler.is_compiling() and self.ranks > 1:
            # fairscale's sum marks its input as changed, which a compiler can't follow.
            part = all_reduce(part, "sum", groups.get_model_parallel_group())
        elif self.ranks > 1:
            part = mappings.reduce_from_model_parallel_region(part)
        return part

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
