"""Replies: JSON, streams of events, and what happens when the client goes away.

A client that disconnects is noticed in any phase: whoever waits for an answer waits for the end of the connection as
well. Starlette notices it only when it sends, which during a long prompt is too late.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
PING = 15.0
"""Seconds of silence after which a stream of server-sent events gets a comment, so that proxies keep it open."""


class Gone(Exception):
    """The client has disconnected: nobody reads an answer."""


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes one for each call


def dumped(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which a client may have sent, becomes U+FFFD."""
    return _encode(value).encode("utf-8", "replace")


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumped(value), status, dict(headers or {}), "application/json")


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumped(value) + b"\n\n"


MARK = "\0text"


class Template:
    """Events that differ in one text alone: what is the same in all of them is made once."""

    def __init__(self, event: bytes) -> None:
        """`event` has MARK where the text comes."""
        self._parts = event.split(dumped(MARK))

    def __call__(self, text: str) -> bytes:
        return dumped(text).join(self._parts)


DONE = b"data: [DONE]\n\n"


def ndjson(value: Any) -> bytes:
    """One line of newline-delimited JSON."""
    return dumped(value) + b"\n"


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(http: HTTPRequest, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client has gone; then raises Gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(http.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class Source(Protocol):
    """Where the parts of a stream come from."""

    @property
    def has_more(self) -> bool:
        """Whether the next part, or the end, comes without waiting."""

    def close(self) -> None: ...


class EventStream(Response):
    """A body that comes in parts. Its generator is closed when the client goes away, wherever it waits."""

    def __init__(
        self, parts: AsyncGenerator[bytes, None], source: Source, media_type: str = "text/event-stream"
    ) -> None:
        """`source` is closed at the end, however it comes: a generator that was never begun has no end of its own.
        Parts that come without waiting are written at once."""
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type)
        del self.headers["content-length"]
        self._parts, self._source, self._last = parts, source, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            tasks += [asyncio.create_task(work) for work in (self._pump(send), disconnected(receive))]
            if self.media_type == "text/event-stream":
                tasks.append(asyncio.create_task(self._ping(send)))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            self._source.close()
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
            await self._parts.aclose()

    async def _pump(self, send: Send) -> None:
        held: list[bytes] = []
        async for part in self._parts:
            held.append(part)
            if not self._source.has_more:
                self._last = time.monotonic()
                await send({"type": "http.response.body", "body": b"".join(held), "more_body": True})
                held.clear()
        await send({"type": "http.response.body", "body": b"".join(held), "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(max(0.1, self._last + PING - time.monotonic()))
            if time.monotonic() - self._last >= PING:
                self._last = time.monotonic()
                await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
