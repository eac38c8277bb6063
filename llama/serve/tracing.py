"""Traces by OpenTelemetry: a span for each request, and one in it for each phase: queue, prefill, decode.

A client's `traceparent` is the parent of all. The spans are made when the request has ended, from the times that the
engine took, so that tracing costs nothing while a request runs.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from llama.serve.service import Call

REMEDY = "traces need OpenTelemetry: pip install 'codellama[tracing]'"


def tracer_to(endpoint: str, service_name: str = "codellama") -> Any:
    """A tracer that sends to an OTLP endpoint by HTTP. ValueError where OpenTelemetry is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(REMEDY) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider.get_tracer("llama.serve")


class Traced:
    """Wraps an application: every request that asks the model becomes a span."""

    def __init__(self, app: ASGIApp, tracer: Any, model_name: str) -> None:
        """ValueError where OpenTelemetry is missing."""
        try:
            from opentelemetry.propagate import extract
            from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        except ImportError as error:
            raise ValueError(REMEDY) from error
        self.app, self.tracer, self.model_name = app, tracer, model_name
        self._extract, self._inside = extract, set_span_in_context
        self._server, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.time_ns(), 0

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            call = scope.get("codellama.call")
            if call is not None:
                self._tell(scope, call, begun, status)

    def _tell(self, scope: Scope, call: Call, begun: int, status: int) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        sampling, timing = call.requests[0].sampling, call.stream.timings[0]
        attributes = {
            "http.request.method": scope["method"], "url.path": scope["path"], "http.response.status_code": status,
            "gen_ai.request.id": scope.get("codellama.id", ""), "gen_ai.response.model": self.model_name,
            "gen_ai.usage.input_tokens": call.prompt_tokens, "gen_ai.usage.output_tokens": call.completion_tokens,
            "gen_ai.request.temperature": sampling.temperature, "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.max_tokens": call.requests[0].limit, "gen_ai.request.n": call.ask.n,
            "gen_ai.latency.time_in_queue": timing.queue,
            "gen_ai.latency.time_to_first_token": timing.first - timing.joined if timing.first else 0.0,
        }  # fmt: skip
        span = self.tracer.start_span("llm_request", self._extract(headers), self._server, attributes, start_time=begun)
        now, clock = time.time_ns(), time.monotonic()
        context = self._inside(span)
        moments = (
            ("queue", timing.joined, timing.seated or timing.ended),
            ("prefill", timing.seated, timing.first or timing.ended),
            ("decode", timing.first, timing.last),
        )
        for name, start, end in moments:
            if start and end:
                phase = self.tracer.start_span(name, context, start_time=now - round(1e9 * (clock - start)))
                phase.end(now - round(1e9 * (clock - end)))
        if not 0 < status < 500:
            span.set_status(self._failed)
        span.end(now)
