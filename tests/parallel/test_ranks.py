"""The ranks that share a model: how they find each other, how one rank's error reaches all, and that none hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llama import parallel
from llama.config import ModelArgs
from llama.model import Transformer
from parallel.ranks import RankFailed, on_ranks, outcomes


class Unpicklable(Exception):
    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def _start_with(init_method: str, sizes: list[int | None]) -> list[Any]:
    """What start() said to each model_parallel_size, one after the other in one process."""
    said: list[Any] = []
    for size in sizes:
        try:
            ranks = parallel.start(size, device="cpu", init_method=init_method)
            said.append((ranks.rank, ranks.world_size, ranks.leads, parallel.shards()))
        except ValueError as error:
            said.append(str(error))
    return said


def test_ranks_are_those_of_the_launcher() -> None:
    assert on_ranks(_start_with, 2, [None]) == [[(0, 2, True, 2)], [(1, 2, False, 2)]]


def test_starting_again_gives_the_groups_there_are() -> None:
    assert on_ranks(_start_with, 2, [2, 2, None]) == [[(0, 2, True, 2)] * 3, [(1, 2, False, 2)] * 3]


def test_more_processes_than_a_model_needs_form_several_groups() -> None:
    results = on_ranks(_start_with, 4, [2])
    assert results == [[(0, 2, True, 2)], [(1, 2, False, 2)], [(0, 2, True, 2)], [(1, 2, False, 2)]]


@pytest.mark.parametrize("size", [3, 4, -1, 0])
def test_a_size_the_processes_cannot_have_is_named(size: int) -> None:
    for (said,) in on_ranks(_start_with, 2, [size]):
        assert isinstance(said, str), said
        assert f"model_parallel_size {size} with 2 processes" in said
        assert "nproc_per_node" in said or "None" in said


def test_more_ranks_than_processes_names_the_launcher() -> None:
    ((said,),) = on_ranks(_start_with, 1, [2])
    assert "model_parallel_size 2 with 1 process:" in said
    assert "torchrun --nproc_per_node 2" in said


def test_another_size_after_the_start_is_refused() -> None:
    for first, second in on_ranks(_start_with, 2, [2, 1]):
        assert first[1] == 2
        assert "model_parallel_size 1, but this process is in a group of 2" in second


def _alone(_: str) -> tuple[list[str], bool]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    environment = dict(os.environ)
    args = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=8, hidden_dim=16)
    Transformer(args)(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    open_files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    links = [os.readlink(path) for path in open_files if os.path.lexists(path)]
    tables = [Path(f"/proc/self/net/{kind}") for kind in ("tcp", "tcp6", "udp", "udp6")]
    inodes = {line.split()[9] for table in tables if table.exists() for line in table.read_text().splitlines()[1:]}
    return [link for link in links if link[8:-1] in inodes], dict(os.environ) == environment


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open sockets in Linux's /proc")
def test_one_process_needs_no_environment_and_opens_no_port() -> None:
    ((sockets, environment_kept),) = on_ranks(_alone, 1)
    assert environment_kept
    assert sockets == []


def _stop_and_start(init_method: str) -> list[int]:
    said = []
    for n in range(2):
        parallel.start(init_method=f"{init_method}.{n}", device="cpu")
        said.append(parallel.shards())
        parallel.stop()
    return [*said, dist.is_initialized()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_process_can_stop_and_start_afresh(world_size: int) -> None:
    assert on_ranks(_stop_and_start, world_size) == [[world_size, world_size, False]] * world_size


def _broadcast(init_method: str) -> tuple[Any, Any]:
    ranks = parallel.start(2, init_method=init_method, device="cpu")
    group = int(os.environ["RANK"]) // 2
    tensor = ranks.broadcast(torch.tensor([ranks.rank + 10 * group]))
    return tensor.item(), ranks.broadcast_object({"from": (group, ranks.rank)})


def test_the_first_rank_of_each_group_broadcasts_to_it() -> None:
    results = on_ranks(_broadcast, 4)
    assert results == [(0, {"from": (0, 0)})] * 2 + [(10, {"from": (1, 0)})] * 2


def test_alone_a_broadcast_is_what_was_given() -> None:
    ranks = parallel.start(device="cpu")
    tensor = torch.arange(3)
    assert ranks.broadcast(tensor) is tensor
    assert ranks.broadcast_object("x") == "x"


def _raise_on_some(init_method: str, failing: dict[int, Exception | str]) -> Any:
    ranks = parallel.start(init_method=init_method, device="cpu", timeout=20)
    try:
        with ranks.all_ranks():
            error = failing.get(ranks.rank)
            if isinstance(error, str):
                raise Unpicklable("fault", error)
            if error is not None:
                raise error
    except Exception as raised:
        told = (type(raised).__name__, str(raised))
    else:
        told = None
    with ranks.all_ranks():  # and they can go on together
        pass
    return told


def test_an_error_of_one_rank_is_raised_by_all() -> None:
    missing = ValueError("there is no consolidated.01.pth")
    assert on_ranks(_raise_on_some, 3, {1: missing}) == [("ValueError", str(missing))] * 3


def test_rank_0_raises_its_own_error_first() -> None:
    results = on_ranks(_raise_on_some, 2, {0: KeyError("a"), 1: ValueError("b")})
    assert results == [("KeyError", "'a'"), ("ValueError", "b")]


def test_an_error_that_cannot_travel_arrives_as_its_text() -> None:
    results = on_ranks(_raise_on_some, 2, {1: "shard 1"})
    assert results == [("RuntimeError", "Unpicklable: fault in shard 1"), ("Unpicklable", "fault in shard 1")]


def test_without_an_error_all_go_on() -> None:
    assert on_ranks(_raise_on_some, 2, {}) == [None, None]


def test_alone_an_error_is_raised_as_it_is() -> None:
    error = ValueError("x")
    with pytest.raises(ValueError, match="x") as caught, parallel.start(device="cpu").all_ranks():
        raise error
    assert caught.value is error


def _compute_until_one_is_gone(init_method: str, way: str) -> None:
    ranks = parallel.start(init_method=init_method, device="cpu", timeout=2)
    model = Transformer(ModelArgs(dim=24, n_layers=1, n_heads=6, vocab_size=9, hidden_dim=24))
    for step in range(10_000):
        if step == 3 and ranks.rank == 1:
            while way == "hangs" and not os.path.exists(init_method[len("file://") :].replace("store", "result.0")):
                time.sleep(0.05)
            os._exit(1)
        with ranks.named_loss():
            model(torch.zeros(1, 3, dtype=torch.long))


def _load_until_one_is_gone(init_method: str, way: str) -> None:
    ranks = parallel.start(init_method=init_method, device="cpu", timeout=2)
    with ranks.all_ranks():
        if ranks.rank == 1:
            os._exit(1)


@pytest.mark.parametrize(
    ("doing", "way"),
    [(_compute_until_one_is_gone, "dies"), (_compute_until_one_is_gone, "hangs"), (_load_until_one_is_gone, "dies")],
)
def test_a_rank_that_is_gone_ends_the_others_within_the_timeout(doing: Any, way: str) -> None:
    results = outcomes(doing, 3, way, limit=30)
    for rank in (0, 2):
        assert isinstance(results[rank], RankFailed)
        assert "still ran" not in str(results[rank])
        assert "llama.errors.LostRank" in str(results[rank])
    assert str(results[1]) == "rank 1 died"
