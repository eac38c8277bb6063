"""Prometheus metrics under vLLM's names, with our prefix, so that dashboards need one replacement.

The engine says what happens (`Watch`), and gauges read the engine when they are asked. Each server has a registry of
its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from llama.requests import Request
from llama.serve.engine import Timing, Watch

if TYPE_CHECKING:
    from llama.serve.engine import Engine

PREFIX = "codellama_"
CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics(Watch):
    """What one engine has done since it was started."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that got a row.")
        self._written = self._counter("generation_tokens", "Tokens that were written.")
        self._asked = self._counter("prefix_cache_queries", "Tokens of prompts that were looked up in the cache.")
        self._hits = self._counter("prefix_cache_hits", "Those of them that a row of the cache held already.")
        self._ends = Counter(
            f"{PREFIX}request_success", "Requests that ended, by the reason.", ("model_name", "finished_reason"),
            registry=self.registry,
        )  # fmt: skip
        self._failures = Counter(
            f"{PREFIX}request_failure", "Requests that were refused, or not answered, by the kind of error.",
            ("model_name", "err"), registry=self.registry,
        )  # fmt: skip
        self._queue = self._histogram("request_queue_time_seconds", "From joining to a row.", SECONDS)
        self._first = self._histogram("time_to_first_token_seconds", "From joining to the first token.", SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "From one token to the next.", SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From joining to the end.", SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "From a row to the first token.", SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", SECONDS)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(PREFIX + name, meaning, ("model_name",), registry=self.registry).labels(self._model)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(PREFIX + name, meaning, ("model_name",), buckets=buckets, registry=self.registry)
        return made.labels(self._model)

    def observe(self, engine: Engine) -> None:
        """Lets the gauges read this engine."""
        for name, meaning, read in (
            ("num_requests_running", "Requests that have a row.", lambda: engine.running),
            ("num_requests_waiting", "Requests that wait for one.", lambda: engine.waiting),
            ("kv_cache_usage_perc", "The share of the cache's slots in use: 1 is all.", lambda: engine.cache_use),
        ):
            gauge = Gauge(PREFIX + name, meaning, ("model_name",), registry=self.registry)
            gauge.labels(self._model).set_function(read)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def failed(self, kind: str) -> None:
        """A request was answered with an error of some kind: validation, overloaded, generation …"""
        self._failures.labels(self._model, kind).inc()

    # What the engine says --------------------------------------------------------------------------------------------

    def seated(self, request: Request, timing: Timing) -> None:
        n = len(request.prompt.tokens)
        self._queue.observe(timing.queue)
        self._prompt.inc(n)
        self._prompts.observe(n)
        self._asked.inc(n)
        self._hits.inc(request.reused)

    def wrote(self, request: Request, timing: Timing, tokens: int, seconds: float) -> None:
        self._written.inc(tokens)
        if timing.first:
            for _ in range(tokens):
                self._between.observe(seconds / tokens)
        else:
            self._first.observe(seconds)

    def ended(self, request: Request, timing: Timing, reason: str) -> None:
        self._ends.labels(self._model, reason).inc()
        self._whole.observe(timing.ended - timing.joined)
        self._answers.observe(request.written)
        if timing.first:
            self._prefill.observe(timing.prefill)
            self._decode.observe(timing.decode)
