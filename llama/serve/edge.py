"""The edge: what every request passes before an endpoint sees it, and what is written down afterwards.

Plain ASGI, one layer: a request id, the key, the body with its limits, and the log. The body is read here, whole: so
it is counted before it is parsed, also where its length isn't announced, and what comes after it on the connection is
its end alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.serve.errors import Described, shape_of
from llama.serve.replies import reply

LOG = logging.getLogger("llama.serve")
BODY_SECONDS = 60.0
"""A body that has not arrived after so long is given up (slow loris)."""
PAGE = ("/", "/index.html", "/page.js", "/page.css", "/favicon.ico")
"""The page's own files need no key: it asks for one."""


class Edge:
    """Wraps an application."""

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str] = (), open_paths: Sequence[str] = ("/health",),
        body_limit: int = 2_000_000,
    ) -> None:  # fmt: skip
        """Requests need one of `keys`, if there are any, but for `open_paths` and what is below them."""
        self.app, self.body_limit = app, body_limit
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._open = tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        own = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        scope["codellama.id"], begun, status = own, time.monotonic(), 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", own.encode())]
            await send(message)

        try:
            refused = self._refused(scope, headers)
            if refused is None:
                scope, receive, refused = await self._with_body(scope, receive, headers)
            if refused is not None:
                shape = shape_of(scope["path"])
                more = {"WWW-Authenticate": "Bearer"} if refused.kind == "unauthorized" else {"Connection": "close"}
                await reply(shape.body(refused), shape.status(refused), more)(scope, receive, send_marked)
            else:
                await self.app(scope, receive, send_marked)
        finally:
            _log(scope, own, status, time.monotonic() - begun)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> Described | None:
        path = scope["path"]
        public = path in PAGE and scope["method"] in ("GET", "HEAD")
        public = public or any(path == one or path.startswith(one.rstrip("/") + "/") for one in self._open)
        if self._keys and not public and scope["method"] != "OPTIONS":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            key = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            digest = hashlib.sha256(key.encode("latin-1", "replace")).digest()
            # Each is compared, and in constant time: how long it takes says nothing of a key.
            if not any([hmac.compare_digest(digest, one) for one in self._keys]):  # noqa: C419
                remedy = "send one of this server's keys as `Authorization: Bearer KEY`"
                return Described("unauthorized", 401, f"the API key is missing or wrong: {remedy}")
        length = headers.get("content-length", "")
        return self._too_large() if length.isdigit() and int(length) > self.body_limit else None

    def _too_large(self) -> Described:
        return Described("too_large", 413, f"the body has more than the {self.body_limit:,} bytes that are allowed")

    async def _with_body(
        self, scope: Scope, receive: Receive, headers: dict[str, str]
    ) -> tuple[Scope, Receive, Described | None]:
        """The scope, and a `receive` that has the whole body; or why there is none."""
        body, gone = bytearray(), False

        async def read() -> None:
            nonlocal gone
            more = True
            while more and len(body) <= self.body_limit:
                message = await receive()
                gone = message["type"] == "http.disconnect"
                body.extend(message.get("body", b""))
                more = bool(message.get("more_body", False)) and not gone

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            return scope, receive, Described("slow", 408, f"the body did not arrive within {BODY_SECONDS:g} s")
        if len(body) > self.body_limit:
            return scope, receive, self._too_large()
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            if waiting:
                return waiting.pop()
            return {"type": "http.disconnect"} if gone else await receive()

        plain = headers.get("content-type", "").partition(";")[0].strip() in ("", "application/x-www-form-urlencoded")
        if scope["method"] == "POST" and plain and "origin" not in headers:
            # curl -d says that it sends a form. A browser does so for a page of another origin, which may not.
            fixed = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
            scope = {**scope, "headers": [*fixed, (b"content-type", b"application/json")]}
        return scope, replayed, None


class JSONLines(logging.Formatter):
    """A log of one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        told |= fields if isinstance(fields, dict) else {"message": record.getMessage()}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told)


def _log(scope: Scope, own: str, status: int, seconds: float) -> None:
    """One line for a request. A path may hold anything, so it is shortened and quoted."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    told: dict[str, Any] = {"id": own, "method": scope["method"], "path": scope["path"][:200], "status": status or 499}
    told["seconds"] = round(seconds, 4)
    call = scope.get("codellama.call")
    if call is not None:
        timing = call.stream.timings[0]
        told |= {"prompt_tokens": call.prompt_tokens, "completion_tokens": call.completion_tokens}
        told |= {"cached_tokens": call.cached_tokens, "queue": round(timing.queue, 4)}
        told["first_token"] = round(timing.first - timing.joined, 4) if timing.first else None
    told |= {"prompt": text} if (text := scope.get("codellama.prompt")) is not None else {}
    LOG.info(" ".join(f"{k}={v!r}" for k, v in told.items()), extra={"fields": told})
