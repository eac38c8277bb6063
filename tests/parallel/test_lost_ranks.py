"""A rank that dies or hangs ends the others with one sentence; one that is only slow is waited for."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group

from llama import control, parallel, system
from llama.control import MESSAGE, Heartbeat
from llama.errors import LostRank
from llama.parallel import Ranks
from parallel.ranks import RankFailed, on_ranks, outcomes

SENTENCE = "of this run has ended or has not answered for"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _loss(act: Callable[[], Any]) -> tuple[str, float]:
    """What LostRank said, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(LostRank) as raised:
        act()
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return str(raised.value), time.monotonic() - began


# --- a rank that dies, hangs or stops --------------------------------------------------------------------------------


def _killed_in_a_collective(init_method: str, collective: str, killed: int) -> tuple[str, float]:
    ranks = parallel.start(init_method=init_method, device="cpu", timeout=30)
    layer = parallel.RowParallelLinear(4, 4)

    def forward() -> None:
        with ranks.named_loss():
            layer(torch.zeros(1, 4 // ranks.world_size))

    act = {
        "forward": forward,
        "broadcast_object": lambda: ranks.broadcast_object(1),
        "agree": lambda: ranks.agree(True),
    }
    for step in range(3):
        act[collective]()
        if step == 2 and ranks.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
    return _loss(act[collective])


@pytest.mark.parametrize(("collective", "killed"), [("forward", 1), ("broadcast_object", 0), ("agree", 1)])
def test_a_rank_that_is_killed_in_a_collective_ends_the_other_at_once(collective: str, killed: int) -> None:
    results = outcomes(_killed_in_a_collective, 2, collective, killed, limit=20)
    assert str(results[killed]) == f"rank {killed} died"
    said, seconds = results[1 - killed]
    assert SENTENCE in said
    assert f"rank {1 - killed} noticed" in said
    assert "\n" not in said
    assert seconds < 10  # of 30 that it would wait for one that hangs


def _gone_while_loading(init_method: str, port: int | None, gone: int, way: signal.Signals) -> tuple[str, float]:
    address = init_method if port is None else f"tcp://127.0.0.1:{port}"
    ranks = parallel.start(init_method=address, device="cpu", timeout=2)

    def load() -> None:
        with ranks.all_ranks():
            if ranks.rank == gone:
                time.sleep(0.3)  # a process that stops while it has the file locked holds the others' threads too
                os.kill(os.getpid(), way)

    return _loss(load)


@pytest.mark.parametrize("gone", [1, 0])
@pytest.mark.parametrize("way", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_gone_while_all_load_ends_the_others(way: signal.Signals, gone: int) -> None:
    """Through a file that survives it, or a TCP store that rank 0 hosts: it may stop answering, or end, with rank 0."""
    port = _free_port() if gone == 0 else None
    results = outcomes(_gone_while_loading, 3, port, gone, way, limit=30, stopped=gone)
    assert isinstance(results[gone], RankFailed)
    for rank in {0, 1, 2} - {gone}:
        said, seconds = results[rank]
        assert f"rank {rank} noticed that {'rank 1' if gone == 1 else 'another rank'} {SENTENCE} 2 s" in said
        assert seconds < 8


def _host_leaves_first(_: str, port: int) -> str:
    """Rank 0 hosts the store and ends with an error that the other, slow to look, must still read there."""
    ranks = parallel.start(init_method=f"tcp://127.0.0.1:{port}", device="cpu", timeout=20)
    sleep = time.sleep
    with mock.patch.object(time, "sleep", lambda seconds: sleep(seconds if ranks.leads else 0.3)):
        try:
            with ranks.all_ranks():
                if ranks.leads:
                    raise ValueError("no such folder")
        except Exception as error:
            if ranks.leads:
                os._exit(1)
            return str(error)
    return "no error"


def test_the_rank_that_hosts_the_store_ends_after_the_others_have_read_its_error() -> None:
    assert outcomes(_host_leaves_first, 2, _free_port(), limit=20)[1] == "no such folder"


def _cause_behind_a_loss(init_method: str) -> str:
    """Rank 1 fails before a collective that rank 0 is in: rank 0 loses it there, and learns why at the block's end."""
    ranks = parallel.start(init_method=init_method, device="cpu", timeout=1)
    try:
        with ranks.all_ranks():
            if ranks.rank == 1:
                raise ValueError("no compiler")
            dist.all_reduce(torch.zeros(1), group=get_model_parallel_group())
    except Exception as error:
        return str(error)
    return "no error"


def test_why_a_rank_left_is_said_rather_than_that_it_left() -> None:
    assert on_ranks(_cause_behind_a_loss, 2) == ["no compiler"] * 2


def _interrupted(init_method: str) -> str:
    ranks = parallel.start(init_method=init_method, device="cpu", timeout=20)
    try:
        with ranks.all_ranks():
            if ranks.rank == 1:
                raise KeyboardInterrupt
    except BaseException as error:
        return type(error).__name__
    return "no error"


def test_an_interrupt_of_one_rank_reaches_all() -> None:
    assert on_ranks(_interrupted, 2, limit=15) == ["KeyboardInterrupt"] * 2


def test_ctrl_c_waits_for_the_end_of_the_outermost_block_and_goes_to_the_programs_own_handler() -> None:
    heard: list[str] = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append("program"))
    try:
        with control.uninterrupted():
            with contextlib.suppress(KeyError), control.uninterrupted():
                signal.raise_signal(signal.SIGINT)
                heard.append("inner")
                raise KeyError
            heard.append("outer")
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == ["inner", "outer", "program"]


def _blocks_of_two_groups(init_method: str) -> list[str]:
    ranks = parallel.start(2, init_method=init_method, device="cpu", timeout=20)
    group, said = int(os.environ["RANK"]) // 2, []
    for block in range(3):
        try:
            with ranks.all_ranks():
                if ranks.rank == 1 and block < 2:
                    raise ValueError(f"group {group}, block {block}")
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_blocks_and_groups_are_not_confused() -> None:
    results = on_ranks(_blocks_of_two_groups, 4)
    assert results == [[f"group {g}, block 0", f"group {g}, block 1", ""] for g in (0, 0, 1, 1)]


# --- ranks that live -------------------------------------------------------------------------------------------------

FULL = MESSAGE - 8 - (len(pickle.dumps(b"x" * 300)) - 300)
"""So many bytes fill the one message to its last."""
SIZES = [10, FULL - 1, FULL, FULL + 1, 3_000_000]


def _reduce(ranks: Ranks) -> None:
    with ranks.named_loss():
        dist.all_reduce(torch.zeros(1), group=get_model_parallel_group())


def _living(init_method: str) -> dict[str, Any]:
    """All that ranks tell each other. Rank 1 sleeps longer than the timeout where it may, and returns first."""
    ranks = parallel.start(init_method=init_method, device="cpu", timeout=1.5)
    other = ranks.rank == 1
    found: dict[str, Any] = {}
    for size in SIZES:
        sent = (bytes(range(256)) * (size // 256 + 1))[:size]
        found[f"{size} bytes"] = ranks.broadcast_object(None if other else sent) == sent
    found["object"] = ranks.broadcast_object(None if other else {"tokens": [1, 2]})
    found["verdicts"] = [ranks.agree(True), ranks.agree(not other), ranks.agree(other), ranks.agree(False)]
    with ranks.all_ranks():
        time.sleep(2.5 if other else 0)
    with ranks.patience():
        time.sleep(2.5 if other else 0)
        _reduce(ranks)
    if not other:
        found["agree"] = _loss(lambda: ranks.agree(True))
        found["reduce"] = _loss(lambda: _reduce(ranks))
    return found


@pytest.mark.slow
def test_ranks_that_live_are_waited_for_and_understood() -> None:
    first, second = on_ranks(_living, 2, limit=40)
    for found in (first, second):
        assert all(found[f"{size} bytes"] for size in SIZES), found
        assert found["object"] == {"tokens": [1, 2]}
        assert found["verdicts"] == [True, False, False, False]
    for said, seconds in (first["agree"], first["reduce"]):  # after patience the timeout is what it was
        assert SENTENCE in said
        assert 1 < seconds < 8


def test_time_for_which_all_ranks_were_stopped_is_no_silence() -> None:
    """Ctrl-Z and fg: the clock has gone on, but no rank could show that it lives."""
    store, ahead = dist.HashStore(), [0.0]  # type: ignore[attr-defined]
    ranks = [Ranks(rank, 2, torch.device("cpu"), None, 5.0) for rank in (0, 1)]
    first, second = (Heartbeat(own.rank, 2, 5.0, "group", own.lost) for own in ranks)
    with mock.patch.object(control, "time", mock.Mock(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep)):
        meetings = [threading.Thread(target=beat._meet, args=(store,)) for beat in (first, second)]
        for meeting in meetings:
            meeting.start()
        first.ended.set()
        time.sleep(0.2)
        ahead[0] = 1000.0
        time.sleep(0.2)
        second.ended.set()
        for meeting in meetings:
            meeting.join(10)
    assert first.errors == second.errors == {0: None, 1: None}


def test_alone_there_is_nothing_to_wait_for() -> None:
    ranks = parallel.start(device="cpu", timeout=7)
    assert ranks.timeout == 7
    assert (ranks.agree(True), ranks.agree(False)) == (True, False)
    with ranks.patience(), ranks.named_loss(), ranks.all_ranks():
        pass


# --- which errors are a loss -----------------------------------------------------------------------------------------

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
LOSSES = [
    RuntimeError(f"{GLOO}pair.cc:547] Connection closed by peer [127.0.0.1]:38212"),
    RuntimeError(f"{GLOO}unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation to complete"),
    RuntimeError(f"{GLOO}pair.cc:534] Read error [127.0.0.1]:5512: Connection reset by peer"),
    dist.DistNetworkError("failed to recv, got 0 bytes\nException raised from recvBytes at Utils.hpp:678"),
    dist.DistStoreError("Timed out after 3 seconds waiting for clients. 1/2 clients joined."),
    dist.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:2461, remote process exited or there was a network error, NCCL version "
        "2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting."
    ),
    dist.DistBackendError("NCCL communicator was aborted on rank 0."),
]
OTHERS = [
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    RuntimeError(f"{GLOO}pair.cc:471] op.preamble.length <= op.nbytes. 8 vs 4"),
    dist.DistNetworkError(
        "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, "
        "name: EADDRINUSE, message: address already in use\nException raised from makeWithPort (timeout: 3)"
    ),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:268, invalid usage, Duplicate GPU detected : rank 1"),
    ValueError("gloo timed out"),
    TimeoutError("timed out"),
]


@pytest.mark.parametrize("error", LOSSES, ids=lambda error: str(error)[-40:])
def test_what_libraries_say_of_a_lost_rank_becomes_one_sentence(error: Exception) -> None:
    def act() -> None:
        with Ranks(3, 4, torch.device("cpu"), None, 12.0).named_loss():
            raise error

    said, _ = _loss(act)
    assert said.startswith(f"rank 3 noticed that another rank {SENTENCE} 12 s: ")
    assert "--timeout" in said


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, Ranks(0, 2, torch.device("cpu"), None).named_loss():
        raise error
    assert raised.value is error


def _port_in_use(_: str, port: int) -> None:
    parallel.start(init_method=f"tcp://127.0.0.1:{port}", device="cpu", timeout=3)


def test_a_port_in_use_is_not_a_lost_rank() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first, _ = outcomes(_port_in_use, 2, taken.getsockname()[1], limit=20, stopped=1)
    assert "EADDRINUSE" in str(first)


# --- devices ---------------------------------------------------------------------------------------------------------


def _fake_gpus(count: int) -> Any:
    """A machine with GPUs: what is asked of them is answered, and no tensor is made."""
    return mock.patch.multiple(
        torch.cuda, is_available=lambda: count > 0, device_count=lambda: count, set_device=mock.Mock()
    )


def _take_gpus(init_method: str, asked: list[str | None], count: int) -> list[str]:
    """What each call of start() gave, by gloo in NCCL's place."""
    said = []
    init, empty = dist.init_process_group, torch.empty
    with (
        _fake_gpus(count),
        mock.patch.object(dist, "init_process_group", lambda backend, *rest: init("gloo", *rest)),
        mock.patch.object(torch, "empty", lambda *sizes, device=None, **rest: empty(*sizes, **rest)),
    ):
        for device in asked:
            try:
                said.append(str(parallel.start(device=device, init_method=init_method, timeout=20).device))
                torch.cuda.set_device.assert_called_with(torch.device(said[-1]))  # type: ignore[attr-defined]
            except ValueError as error:
                said.append(str(error))
    return said


def test_each_rank_takes_its_own_gpu_or_all_say_why_not() -> None:
    first, second = on_ranks(_take_gpus, 2, ["cuda", None, "cuda:0", "cuda:1"], 2)
    assert first[:2] == ["cuda:0", "cuda:0"]
    assert second[:2] == ["cuda:1", "cuda:1"]
    assert first[2] == second[2]
    assert "device cuda:0 for the rank with LOCAL_RANK 1" in first[2]
    assert "device cuda:1 for the rank with LOCAL_RANK 0" in first[3]
    assert "give --device cuda without a number" in first[3]


def test_more_ranks_than_gpus_are_refused_by_all_before_nccl() -> None:
    for (said,) in on_ranks(_take_gpus, 2, ["cuda"], 1):
        assert "LOCAL_RANK 1 (GPUs that PyTorch finds: 1)" in said
        assert "each rank needs a GPU of its own" in said


def _set_on_own_gpu(init_method: str) -> tuple[str, str]:
    os.environ.pop("LOCAL_RANK")
    with _fake_gpus(4), mock.patch.object(torch, "empty"):
        alone = system.own_device("cuda:3", 1), system.own_device("cuda", 1)
        assert not torch.cuda.set_device.called  # type: ignore[attr-defined]
    return str(alone[0]), str(alone[1])


def test_one_process_may_choose_any_gpu_and_changes_nothing() -> None:
    assert on_ranks(_set_on_own_gpu, 1) == [("cuda:3", "cuda")]


@pytest.mark.parametrize("device", ["warp", "cuda:x", "mps" if not torch.backends.mps.is_available() else "cuda"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"device {device} can't be used here") as raised:
        parallel.start(device=device)
    assert "\n" not in str(raised.value)


def test_dtypes_are_16_bits_wide_where_a_gpu_computes() -> None:
    assert system.default_dtype(torch.device("mps")) == torch.float16
    assert system.default_dtype(torch.device("cpu")) == torch.float32
    for major, dtype in ((9, torch.bfloat16), (7, torch.float16)):  # an older GPU only emulates bfloat16
        with (
            _fake_gpus(1),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=mock.Mock(major=major)),
        ):
            assert system.default_dtype(torch.device("cuda:0")) == dtype
