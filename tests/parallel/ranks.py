"""Starts a few processes that run one function together, as torchrun would, and never waits for them for ever.

The processes find each other through a file, so there are no ports to clash over. They are forked from a server that
has imported torch once, which makes a start cheap, and shares nothing with the test's own process and its threads.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if "forkserver" in multiprocessing.get_all_start_methods():
    _processes: Any = multiprocessing.get_context("forkserver")
    _processes.set_forkserver_preload(["fairscale.nn.model_parallel.layers", "llama.checkpoint", "pytest"])
else:
    _processes = multiprocessing.get_context("spawn")


class RankFailed(RuntimeError):
    """What a rank raised, as text; or that it ended, or was ended, without a result."""


def _run(check: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and would outlive this one
    try:
        result: Any = check(f"file://{folder}/store", *args)
    except BaseException:
        result = RankFailed(f"rank {rank}: {traceback.format_exc()}")
    written = Path(folder, f"writing.{rank}")
    torch.save(result, written)
    written.rename(Path(folder, f"result.{rank}"))
    if not isinstance(result, RankFailed):
        time.sleep(3600)  # until it is ended: a rank that left now could cut off what it last sent to the others
    os._exit(1)


def outcomes(
    check: Callable[..., Any], world_size: int, *args: Any, limit: float = 60.0, stopped: int | None = None
) -> list[Any]:
    """What `check(init_method, *args)` returned on each rank, or the RankFailed that took its place.

    `check` is a function of a module. After `limit` seconds the ranks that still run are ended. Rank `stopped` is not
    waited for.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _processes.Process(target=_run, args=(check, rank, world_size, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + limit
        results = [Path(folder, f"result.{rank}") for rank in range(world_size)]
        while time.monotonic() < end and any(
            process.is_alive() and not result.exists()
            for rank, (process, result) in enumerate(zip(ranks, results, strict=True))
            if rank != stopped
        ):
            time.sleep(0.005)
        hung = [process.is_alive() for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        return [_result(results[rank], rank, hung[rank], limit) for rank in range(world_size)]


def _result(path: Path, rank: int, hung: bool, limit: float) -> Any:
    if path.exists():
        return torch.load(path, weights_only=False)
    return RankFailed(f"rank {rank} " + (f"still ran after {limit} s" if hung else "died"))


def on_ranks(check: Callable[..., Any], world_size: int, *args: Any, limit: float = 60.0) -> list[Any]:
    """What `check(init_method, *args)` returned on each rank; raises the first RankFailed there is."""
    results = outcomes(check, world_size, *args, limit=limit)
    for result in results:
        if isinstance(result, RankFailed):
            raise result
    return results
