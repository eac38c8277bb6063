"""The application: the APIs' endpoints, what stands around them, and the page.

Everything that an endpoint needs is passed to it when its routes are made; there is no other state. Errors of every
kind end in one handler, which answers in the shape of the API that the path belongs to.
"""

from __future__ import annotations

import logging
import mimetypes
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp

from llama.serve import llamacpp, ollama, openai_api, tgi
from llama.serve.assemble import Assembler
from llama.serve.edge import Edge
from llama.serve.engine import Engine
from llama.serve.errors import described, shape_of
from llama.serve.metrics import CONTENT_TYPE, Metrics
from llama.serve.replies import Gone, reply
from llama.serve.service import Check, Facts, Service
from llama.serve.tracing import Traced

LOG = logging.getLogger("llama.serve")
PAGE = Path(__file__).parent / "page"
FILES = ("page.js", "page.css")
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Headers of the page: it takes nothing from other hosts, and runs no script but its own."""


@dataclass(frozen=True)
class Settings:
    """What a server is told besides its model."""

    model_name: str = "codellama"
    keys: Sequence[str] = ()
    """API keys; none for a server that asks for none."""
    open_paths: Sequence[str] = ("/health",)
    """Paths that need no key."""
    body_limit: int = 2_000_000
    """Bytes."""
    cors: Sequence[str] = ()
    """Origins whose pages may ask this server; "*" for all."""
    check: Check | None = None
    suffix_first: bool = False
    heal: bool = True
    log_prompts: bool = False
    metrics: Metrics | None = None
    tracer: Any = None
    facts: Facts = field(default_factory=Facts)
    page: Path = PAGE


def create_app(engine: Engine, settings: Settings | None = None) -> ASGIApp:
    """An ASGI application around an engine, which it starts and stops."""
    settings = settings or Settings()
    metrics = settings.metrics
    assembler = Assembler(
        engine.tokenizer, engine.args.max_seq_len, suffix_first=settings.suffix_first, heal=settings.heal
    )
    service = Service(
        engine, settings.model_name, assembler=assembler, check=settings.check, log_prompts=settings.log_prompts,
        facts=settings.facts,
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(
        title="Code Llama", version=settings.facts.version, description=__doc__, lifespan=lifespan,
        strict_content_type=True,
    )  # fmt: skip
    for api in (openai_api, tgi, llamacpp, ollama):
        app.include_router(api.routes(service), tags=[api.__name__.rpartition(".")[2]])
    if metrics is not None:
        metrics.observe(engine)

        @app.get("/metrics")
        async def read_metrics() -> Response:
            return Response(metrics.render(), media_type=CONTENT_TYPE)

    _add_page(app, settings.page)

    async def failed(http: HTTPRequest, error: Exception) -> Response:
        if isinstance(error, Gone):
            return Response(status_code=499)  # nobody reads it
        found, shape = described(error), shape_of(http.url.path)
        if metrics is not None:
            metrics.failed(found.kind)
        if found.kind == "internal":
            LOG.error("request %s failed", http.scope.get("codellama.id"), exc_info=error)
        wait = {"Retry-After": str(engine.retry_after)} if found.status in (429, 503) else {}
        inherited = dict(getattr(error, "headers", None) or {})  # such as Allow
        return reply(shape.body(found), shape.status(found), {**inherited, **wait})

    for kind in (ValueError, RequestValidationError, HTTPException, RuntimeError, Gone, Exception):
        app.add_exception_handler(kind, failed)
    wrapped: ASGIApp = app
    if settings.tracer is not None:
        wrapped = Traced(wrapped, settings.tracer, settings.model_name)
    wrapped = Edge(wrapped, keys=settings.keys, open_paths=settings.open_paths, body_limit=settings.body_limit)
    if settings.cors:
        wrapped = CORSMiddleware(
            wrapped, allow_origins=list(settings.cors), allow_methods=["*"], allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )  # fmt: skip
    return wrapped


def _add_page(app: FastAPI, folder: Path) -> None:
    """The page's files, by their names: no path leads elsewhere. Without them, only POST / is answered."""

    def add(path: str, name: str) -> None:
        async def file() -> Response:  # without parameters: FastAPI would read them from the query
            return FileResponse(folder / name, media_type=mimetypes.guess_type(name)[0], headers=SECURITY)

        if (folder / name).is_file():
            app.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)

    add("/", "index.html")
    for name in FILES:
        add(f"/{name}", name)
