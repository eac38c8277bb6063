"""Servers for tests: real ones, by uvicorn in a thread, on a port that the system chooses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from scripted_llama import Scripted

from llama.serve.app import Settings, create_app
from llama.serve.engine import Engine
from llama.serve.metrics import Metrics
from llama.serve.running import Server, address, listen


@dataclass
class Served:
    url: str
    engine: Engine
    llama: Any
    server: Server

    @property
    def model(self) -> Any:
        return self.llama.model

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **more)

    def is_idle(self) -> bool:
        return not self.engine._live and all(request.gone for request in self.llama.loop._rows)


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


@contextmanager
def serving(
    llama: Any = None, *, drain: float = 5.0, engine: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Served]:
    llama = llama or Scripted()
    metrics = Metrics("codellama-test")
    made = Engine(llama, **{"watch": metrics, **(engine or {})})
    told = Settings(**{"model_name": "codellama-test", "metrics": metrics, **settings})
    server = Server(create_app(made, told), made, drain=drain)
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield Served(address(listening), made, llama, server)
    finally:
        if hasattr(llama.model, "gate"):
            llama.model.gate.set()
        server.should_exit = True
        thread.join(15)
        listening.close()
        assert not thread.is_alive(), "the server did not end"
