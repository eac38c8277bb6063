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
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as groups
from fairscale.nn.model_parallel import layers, mappings
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce

from llama.control import HOUR, WEEK, Processes, set_silence, set_timeout, start_alone, start_together, waiting
from llama.system import default_device, own_device

INIT_STD = 0.02  # of freshly made weights, normal; as GPT-2's


@dataclass(frozen=True)
class Ranks(Processes):
    """The processes that share one model."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank; the others pass one of the same shape and dtype, which is overwritten."""
        if self.world_size > 1:
            with self.named_loss():
                dist.broadcast(tensor, groups.get_model_parallel_src_rank(), group=groups.get_model_parallel_group())
        return tensor

    def patience(self) -> contextlib.AbstractContextManager[None]:
        """In this block the model's collectives wait for an hour: ranks compile their graphs at different speed."""
        if self.world_size == 1:
            return contextlib.nullcontext()
        return waiting(groups.get_model_parallel_group(), HOUR, afterwards=self.timeout)


def start(
    model_parallel_size: int | None = None, *, device: torch.device | str | None = None, timeout: float = 60.0,
    init_method: str | None = None, silence: bool | None = True,
) -> Ranks:  # fmt: skip
    """Joins the processes that torchrun started into groups of `model_parallel_size` (default: all of them).

    Calling it again returns the groups there are. `timeout`, in seconds, is how long a rank waits for the others in
    a collective before it gives up. `init_method` is torch.distributed's ("file:///..."; default: torchrun's).
    `device="cuda"` is this rank's own GPU; with several ranks it becomes the process's current one, as NCCL needs it.
    What processes other than the first print to `sys.stdout` is dropped until `stop`, so that a script prints once;
    with `silence=False` all print (None: as before).
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
            start_alone()
        elif not dist.is_initialized():
            gpus = torch.cuda.is_available() and str(device or default_device()).startswith("cuda")
            start_together("nccl" if gpus else "gloo", init_method, timeout, world_size, ranks.rank)
        if not groups.model_parallel_is_initialized():
            with contextlib.redirect_stdout(io.StringIO()):  # it reports its sizes by print()
                groups.initialize_model_parallel(size)
        if groups.get_model_parallel_world_size() != size:
            there = groups.get_model_parallel_world_size()
            raise ValueError(f"model_parallel_size {size}, but this process is in a group of {there}: use that")
        ranks = replace(ranks, rank=groups.get_model_parallel_rank(), control=_control_group(size, timeout))
    set_silence(silence and dist.get_rank() > 0)
    with ranks.all_ranks():  # a device may suit one rank alone
        return replace(ranks, device=own_device(device, world_size))


def _control_group(size: int, timeout: float) -> dist.ProcessGroup | None:
    if size == 1:
        return None
    set_timeout(groups.get_model_parallel_group(), timeout)
    mine = None
    for first in range(0, dist.get_world_size(), size):  # every process takes part in making every group
        members = list(range(first, first + size))
        # With this timeout a rank that dies now does not hold the others.
        group = dist.new_group(members, backend="gloo", timeout=timedelta(seconds=timeout))
        if dist.get_rank() in members:
            set_timeout(group, WEEK)
            mine = group
    return mine


def stop() -> None:
    """Leaves the groups, so that the process ends without a complaint or may start others. It may print again."""
    set_silence(False)
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
