"""Requests that nobody would write, by the OpenAPI schema: none may be a 500. And many clients at a time, a third of
which go away or send nonsense: none hangs, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_llama import Scripted
from servers import Served, serving, until

from llama.serve.engine import Engine
from llama.serve.service import Call

ENDPOINTS = [
    "/v1/completions", "/v1/chat/completions", "/v1/fim/completions", "/generate", "/generate_stream", "/", "/infill",
    "/completion", "/tokenize", "/detokenize", "/apply-template", "/api/generate", "/api/chat", "/api/show",
]  # fmt: skip


@pytest.fixture(scope="module")
def hardy() -> Iterator[Served]:
    with serving(Scripted(rows=4, slots=64)) as found:
        yield found


@pytest.fixture(scope="module")
def schema(hardy: Served) -> Any:
    with hardy.client() as http:
        return http.get("/openapi.json").json()


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["<FILL_ME>", "<PRE> a <SUF>b <MID>", "user", "json_object", "\ud800", "[INST]", "word " * 80]),
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def fields_of(schema: Any, path: str) -> dict[str, Any]:
    place = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return dict(schema["components"]["schemas"][place.rpartition("/")[2]]["properties"])


def body_for(schema: Any, path: str, draw: Any) -> dict[str, Any]:
    """Some of the fields that the schema names, most of them with values of the right type."""
    body: dict[str, Any] = {}
    for name, told in fields_of(schema, path).items():
        kinds = [told.get("type"), *(one.get("type") for one in told.get("anyOf", []))]
        needed = name in ("prompt", "inputs", "messages", "input_prefix", "input_suffix", "content", "tokens")
        if not (draw(st.booleans()) if not needed else draw(st.integers(0, 19))):
            continue
        if draw(st.integers(0, 5)) == 0:
            body[name] = draw(anything)
        elif name == "messages":
            message = {
                "role": draw(st.sampled_from(["user", "system", "assistant"])),
                "content": draw(st.text(max_size=9)),
            }
            body[name] = [message] if draw(st.booleans()) else [message, {"role": "user", "content": "x"}]
        elif "string" in kinds:
            body[name] = draw(st.text(max_size=20) | st.sampled_from(["<FILL_ME>", "<PRE> a <SUF>b <MID>", "ret"]))
        elif "integer" in kinds or "number" in kinds:
            body[name] = draw(st.integers(0, 5) | st.floats(0, 1.5))
        elif "boolean" in kinds:
            body[name] = draw(st.booleans())
        elif "array" in kinds:
            body[name] = draw(st.lists(st.text(min_size=1, max_size=4) | st.integers(0, 4200), max_size=3))
        else:
            body[name] = draw(anything)
    return body


def fuzz(hardy: Served, schema: Any, examples: int) -> None:
    seen: dict[int, int] = {}
    with hardy.client() as http:

        @settings(max_examples=examples, suppress_health_check=list(HealthCheck), derandomize=examples < 1000)
        @given(st.data())
        def one(data: st.DataObject) -> None:
            path = data.draw(st.sampled_from(ENDPOINTS))
            body = body_for(schema, path, data.draw)
            text = json.dumps(body)  # with NaN and Infinity, as Python's clients send them
            response = http.post(path, content=text, headers={"Content-Type": "application/json"})
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            assert response.status_code in (200, 400, 422, 429), (path, text, response.text)
            if response.headers["content-type"].startswith("application/json"):
                response.json()
            else:
                assert '"server_error"' not in response.text

        one()
    assert seen.get(200, 0) >= examples // 50, seen
    until(hardy.is_idle)


def test_bodies_from_the_schema_are_never_a_500(hardy: Served, schema: Any) -> None:
    fuzz(hardy, schema, 60)


@pytest.mark.slow
def test_ten_thousand_bodies_are_never_a_500(hardy: Served, schema: Any) -> None:
    fuzz(hardy, schema, 10_000)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(hardy: Served, schema: Any) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error

    found = schemathesis.openapi.from_dict(schema)
    found.config.update(base_url=hardy.url)
    for result in found.get_all_operations():
        operation = result.ok()

        @settings(max_examples=60, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def one(case: Any) -> None:
            case.call_and_validate(base_url=hardy.url, checks=[not_a_server_error])

        one()


def resident(pid: int | str = "self") -> int:
    """Bytes that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def storm(url: str, n: int, clients: int, at: int = 0, pid: int | str = "self") -> tuple[dict[str, int], int]:
    """`n` requests by so many clients. Counts how they ended; and memory after the request `at`."""
    ends: dict[str, int] = {}
    noted, left, rng = 0, iter(range(n)), random.Random(1)
    limits = httpx.Limits(max_connections=clients)

    async def one(http: httpx.AsyncClient, i: int) -> str:
        kind = ("good", "good", "stream", "good", "nonsense", "leaves", "stream", "cancels", "hasty")[i % 9]
        body: dict[str, Any] = {"prompt": f"{rng.randrange(40)} count:", "max_tokens": 20, "temperature": 0}
        if kind == "nonsense":
            wrong: Any = rng.choice([{"prompt": 5}, {"prompt": "x", "n": -1}, {"prompt": "x " * 900}, [], {"stop": 3}])
            return f"nonsense {(await http.post('/v1/completions', json=wrong)).status_code}"
        if kind == "good":
            response = await http.post("/v1/completions", json=body)
            assert response.json()["choices"][0]["text"] == "one two three four five six", (body, response.text)
            return "good"
        body |= {"prompt": f"{i} forever" if kind != "stream" else body["prompt"], "stream": kind != "hasty"}
        body["max_tokens"] = 20 if kind == "stream" else 200
        if kind == "hasty":
            try:
                await http.post("/v1/completions", json=body, timeout=rng.uniform(0.001, 0.05))
            except httpx.TimeoutException:
                return "hasty"
            return "hasty, but answered"
        async with http.stream("POST", "/v1/completions", json=body) as response:
            text, count = "", 0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    count += 1
                if kind in ("leaves", "cancels") and count > rng.randrange(5):
                    return kind
        assert text == "one two three four five six", (kind, body, text, count)
        return kind

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal noted
        for i in left:
            end = await asyncio.wait_for(one(http, i), 60)
            ends[end] = ends.get(end, 0) + 1
            if i == at:
                gc.collect()
                noted = resident(pid)

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return ends, noted


def check_storm(n: int, clients: int) -> int:
    """None lost, none hung, no row still taken. Returns the bytes that the process has grown by in the last part."""
    with serving(Scripted(rows=8, slots=256), engine={"max_queue": 1000}) as served:
        ends, noted = asyncio.run(storm(served.url, n, clients, n // 4))
        until(served.is_idle)
        assert sum(ends.values()) == n
        assert ends["good"] >= n // 3
        assert ends["stream"] >= n // 5
        assert not served.engine._live
        assert not served.engine._leaving
        until(lambda: gc.collect() >= 0 and not kept(served.engine))
        return resident() - noted


def kept(engine: Engine) -> int:
    """Calls of an engine that something still holds."""
    calls = [one for one in gc.get_objects() if type(one) is Call]
    return sum(call.stream._engine is engine for call in calls)


def test_a_connection_that_is_reset_keeps_nothing() -> None:
    """It kept its last request for 75 s: uvicorn cancels the keep-alive timer only where there was no error."""
    with serving() as served:
        for _ in range(3):
            body = b'{"prompt": "count:"}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
            with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as one:
                one.sendall(head % len(body) + b"\r\n" + body)
                assert b" 200 " in one.recv(65536)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: gc.collect() >= 0 and not kept(served.engine), 5)


def test_a_third_of_the_clients_misbehave_and_the_others_are_served() -> None:
    check_storm(180, 32)


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind() -> None:
    """The server is a process of its own, so that its clients' memory is not counted."""
    words = [sys.executable, str(Path(__file__).with_name("scripted_server.py"))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        url = process.stdout.readline().strip()
        ends, noted = asyncio.run(storm(url, 2000, 64, 500, process.pid))
        grown = resident(process.pid) - noted
        process.stdin.close()
    assert sum(ends.values()) == 2000
    assert grown <= 0.02 * noted, f"{grown / 1e6:.1f} MB of {noted / 1e6:.0f}"
