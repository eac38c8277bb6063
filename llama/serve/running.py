"""Running: a uvicorn server that drains before it ends, and that waits for nobody's headers for ever."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama.serve.engine import Engine

HEADER_SECONDS = 20.0
"""A request's head that has not arrived after so long is given up (slow loris)."""


class Connection(H11Protocol):
    """An HTTP connection on which a request that has begun must go on."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Whether a head has begun and isn't complete."""
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if begun and self._limit is None:
            self._limit = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not begun:
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # of a reset connection, uvicorn's timer would keep all for 75 s

    def _forget(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. ValueError where the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        remedy = "choose another --port (0 for any free one), or --host"
        raise ValueError(f"{host} port {port} can't be listened to ({error.strerror or error}): {remedy}") from error


class Server(uvicorn.Server):
    """SIGTERM or Ctrl-C lets what runs go on for `drain` seconds; a second one ends it at once."""

    def __init__(self, app: ASGIApp, engine: Engine, *, drain: float = 30.0) -> None:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, http=Connection, ws="none", lifespan="on",
            timeout_graceful_shutdown=5, timeout_keep_alive=75, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self.engine, self.seconds = engine, drain
        self._own_loop: asyncio.AbstractEventLoop | None = None
        engine.on_loss = self.end

    def end(self) -> None:
        """Lets the server end now. From any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._own_loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.engine.draining or self._own_loop is None:
            self.should_exit = self.force_exit = True
            return
        self.engine.draining = True
        asyncio.run_coroutine_threadsafe(self.drain(), self._own_loop)

    async def drain(self) -> None:
        await self.engine.drain(self.seconds)
        self.end()


def ignore_signals() -> None:
    """For ranks that follow: rank 0 hears the signal too, and tells them when to end."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    found: Any = listening.getsockname()
    host = f"[{found[0]}]" if ":" in found[0] else found[0]
    return f"http://{host}:{found[1]}"
