"""The load generator against a server of which every time and every mistake is known."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama.serve import load
from llama.serve.load import (
    BEHAVIOURS,
    Asked,
    Failed,
    LoadResult,
    Reply,
    Sample,
    Server,
    Wire,
    command,
    run_load,
    table,
)

GAP, DELAY = 0.004, 0.02


def started(gap: float, delay: float) -> tuple[subprocess.Popen[str], str]:
    script = str(Path(__file__).with_name("load_trivial.py"))
    process = subprocess.Popen([sys.executable, script, str(gap), str(delay)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process, url = started(GAP, DELAY)
    yield process, url
    process.kill()
    process.wait()


@pytest.fixture
def url(server: tuple[subprocess.Popen[str], str]) -> str:
    return server[1]


@pytest.mark.parametrize("chat", [False, True])
def test_a_closed_loop_measures_what_the_server_does(url: str, chat: bool) -> None:
    result = run_load(url, Asked(40, 10, chat=chat), clients=4, requests=20)
    found = result.summary()
    assert found["requests"] == 20
    assert found["errors"] == {}
    assert found["answer_tokens"] == 10
    assert found["cached_tokens"] == 3
    assert all(len(sample.gaps) == 9 for sample in result.good)
    assert min(sample.ttft for sample in result.good) >= DELAY
    assert found["ttft_p50"] < DELAY + 0.1  # a busy machine
    assert found["gap_p50"] == pytest.approx(GAP, rel=0.5)
    assert all(s.end - s.due >= DELAY + 9 * GAP - 1e-3 for s in result.good)
    assert found["requests_per_second"] == pytest.approx(20 / found["seconds"])


def test_prompts_have_as_many_tokens_as_were_asked_for(url: str) -> None:
    """This server counts two tokens a word; the first answer tells."""
    assert run_load(url, Asked(100, 2), clients=1, requests=3).summary()["prompt_tokens"] == 100
    assert run_load(url, Asked(100, 2, unit="words"), clients=1, requests=3).summary()["prompt_tokens"] == 200
    assert run_load(url, Asked(100, 2, unit="ids"), clients=1, requests=3).summary()["prompt_tokens"] == 200


def test_prompts_share_a_beginning_and_nothing_else() -> None:
    asked = Asked(30, 1, shared=10, unit="words")
    first, second = (asked.body(number)["prompt"].split() for number in (0, 1))
    assert first[:10] == second[:10]
    assert first[10:] != second[10:]
    assert asked.body(1) == asked.body(1)
    ids = Asked(30, 1, shared=10, unit="ids")
    assert ids.body(0)["prompt"][:10] == ids.body(1)["prompt"][:10]
    assert all(259 <= token < 4000 for token in ids.body(0)["prompt"])


def test_an_open_loop_keeps_its_schedule(url: str) -> None:
    """Requests are due at times that follow from the seed, whatever the server does, and wait from then on."""
    runs = [run_load(url, Asked(10, 5), rate=100.0, requests=60) for _ in range(2)]
    due = [[sample.due for sample in run.samples] for run in runs]
    assert due[0] == due[1] == sorted(due[0])
    assert due[0][-1] == pytest.approx(0.6, rel=0.4)
    for run in runs:
        assert len(run.good) == 60
        assert all(sample.ttft >= DELAY - 1e-3 for sample in run.good)
        assert run.seconds < due[0][-1] + DELAY + 4 * GAP + 1.0


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("breaks-429", "429"),
        ("breaks-500", "500"),
        ("breaks-cut", "cut off"),
        ("breaks-close", "disconnected"),
        ("breaks-garbage", "no JSON"),
        ("breaks-error", "error event"),
        ("breaks-silence", "timeout"),
    ],
)
def test_errors_are_counted_by_kind(url: str, model: str, error: str) -> None:
    asked = Asked(10, 5, unit="words", model=model)
    result = run_load(url, asked, clients=3, requests=6, timeout=0.4, warm_up=0)
    assert result.errors == {error: 6}
    assert result.summary()["requests"] == 0
    assert f"6 {error}" in table([result])


def test_clients_that_misbehave_harm_nobody(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    result = run_load(url, Asked(10, 8), clients=8, requests=120, misbehaving=0.5, pid=process.pid)
    assert result.errors == {}
    assert set(BEHAVIOURS) <= {sample.behaviour for sample in result.samples}
    assert not [sample for sample in result.samples if sample.error]
    assert len(result.samples) == 120
    text = result.soak()
    assert "0 lost, 0 hung, 0 refused" in text
    assert "memory" in text
    assert result.growth() == pytest.approx(0, abs=0.5)


def test_a_server_that_takes_nonsense_badly_is_found_out() -> None:
    """It closes the connection, or answers with 500, in place of a sentence about what is wrong."""

    async def taken(answer: bytes) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        sample = Sample(0, 0.0, behaviour="nonsense")
        try:
            await load.misbehave(Server(url), Asked(5, 5, model="m"), sample, 0.0, 1.0, 5.0)
        except Failed as error:
            return str(error)
        finally:
            listening.close()
        return ""

    assert asyncio.run(taken(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")) == "500"
    assert asyncio.run(taken(b"HTTP/1.1 400 X\r\nContent-Length: 2\r\n\r\n{}")) == ""
    assert asyncio.run(taken(b"")) == "disconnected"


def test_lost_and_hung_requests_are_told_apart() -> None:
    samples = [Sample(i, 0.0, error=error) for i, error in enumerate(("timeout", "cut off", "429", "500"))]
    text = LoadResult("", Asked(), 1, None, 1.0, samples).soak()
    assert text.endswith("2 lost, 1 hung, 1 refused (429)")


def test_ctrl_c_keeps_what_was_measured(url: str) -> None:
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = run_load(url, Asked(10, 10), clients=2, requests=100_000)
    timer.join()
    assert result.interrupted
    assert 2 <= len(result.good) < 1000
    assert "interrupted" in table([result])


def test_seconds_end_a_run(url: str) -> None:
    begin = time.monotonic()
    for loop in ({"clients": 2}, {"rate": 30.0}):
        result = run_load(url, Asked(10, 3), seconds=0.4, **loop)  # type: ignore[arg-type]
        assert result.good
        assert not result.interrupted
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "closed loop"),
        ({"clients": 1, "rate": 1.0, "requests": 1}, "closed loop"),
        ({"clients": 1}, "needs an end"),
    ],
)
def test_what_cannot_be_is_said(url: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run_load(url, **arguments)


@pytest.mark.parametrize(
    ("address", "says"), [("ftp://x", "no address"), ("http://", "no address"), ("http://127.0.0.1:9", "is a server")]
)
def test_where_there_is_no_server_a_sentence(address: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run_load(address, clients=1, requests=1)


class Socket:
    """A transport that takes everything."""

    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


BODY = b"data: {}\n\n" * 3 + "ü😀".encode()
HEADS = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%X;x=1\r\n%s\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:8], BODY[8:]))
    + b"0\r\nTrailer: 1\r\n\r\n",
    "counted": b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY),
    "until it closes": b"HTTP/1.0 200\r\nX: y\r\n\r\n" + BODY,
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_response_is_the_same_however_its_bytes_are_divided(kind: str) -> None:
    async def reply(cuts: list[int]) -> Reply:
        wire = Wire()
        wire.transport, wire.open = Socket(), True  # type: ignore[assignment]
        done = wire.send(b"")
        for begin, end in zip([0, *cuts], [*cuts, len(HEADS[kind])], strict=True):
            if begin < end:
                wire.data_received(HEADS[kind][begin:end])
        if kind == "until it closes":
            wire.connection_lost(None)
        return await asyncio.wait_for(done, 1)

    rng = random.Random(0)
    for cuts in [[], list(range(1, len(HEADS[kind]))), *([rng.randrange(len(HEADS[kind]))] for _ in range(30))]:
        found = asyncio.run(reply(cuts))
        assert found.status == 200
        assert found.body == BODY


def test_times_are_those_of_the_bytes() -> None:
    """Tokens that come together have no gap; a group is one event, and usage counts its tokens."""
    events = [b'data: {"choices": [{"text": "%s"}]}\n\n' % text for text in (b"", b"a", b"b", b"c")]
    usage = b'data: {"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}\n\n'
    whole = events[2] + events[3]
    pieces = [(1.0, events[0]), (2.0, events[1][:9]), (2.5, events[1][9:]), (4.0, whole), (5.0, usage + b": ping\n\n")]
    sample = Sample(0, 0.25)
    load.read_stream(Reply(200, pieces), sample, 0.5, chat=False)
    assert (sample.first, sample.gaps, sample.end, sample.tokens) == (2.0, [1.5, 0.0], 4.5, 7)
    assert sample.ttft == 1.75
    with pytest.raises(Failed, match="cut off"):
        load.read_stream(Reply(200, pieces[:-1]), sample, 0.5, chat=False)


def test_percentiles_are_those_of_the_definition() -> None:
    values = [float(i) for i in range(100)]
    random.Random(0).shuffle(values)
    samples = [Sample(i, 0.0, first=v, end=2 * v + 1, tokens=2, gaps=[v]) for i, v in enumerate(values)]
    found = LoadResult("", Asked(), 1, None, 10.0, samples).summary()
    assert [found[f"ttft_p{p}"] for p in (50, 95, 99)] == [50, 95, 99]
    assert found["tokens_per_second"] == 20
    assert found["requests_per_second"] == 10


def test_the_command_prints_a_table_and_writes_its_files(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(url, clients=(1, 3), rates=(50.0,), requests=6, prompt=10, answer=4, misbehaving=0.2, out=str(tmp_path))
    printed = capsys.readouterr().out
    assert "1 client " in printed
    assert "50/s" in printed
    assert "0 lost, 0 hung" in printed
    facts = json.loads((tmp_path / "load.json").read_text())
    assert [run["clients"] for run in facts["runs"]] == [1, 3, None]
    assert all(len(run["samples"]) == 6 for run in facts["runs"])
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(load, "run_load", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"pip install 'codellama\[plot\]'"):
        command(url, out=str(tmp_path))


@pytest.mark.slow
def test_two_thousand_events_a_second_do_not_distort_the_times() -> None:
    """40 answers at a time, each of an event every 20 ms: what is measured is what the server does, and the generator
    needs a small part of one core. (On a quiet machine; what others compute delays the server as well.)"""
    process, url = started(0.02, 0.05)
    try:
        used = time.process_time()
        result = run_load(url, Asked(100, 100), clients=40, seconds=8)
        used = time.process_time() - used
    finally:
        process.kill()
        process.wait()
    found = result.summary()
    events = sum(len(sample.gaps) + 1 for sample in result.good)
    print(table([result]))
    rate, share = events / found["seconds"], used / found["seconds"]
    print(f"{rate:,.0f} events/s, {used / events * 1e6:.0f} µs each, {share:.0%} of a core")
    assert rate > 1500
    assert found["gap_p50"] == pytest.approx(0.02, rel=0.03)
    assert found["gap_p95"] < 0.025
    assert used / events < 250e-6  # so that one core has time for 4,000 and more
