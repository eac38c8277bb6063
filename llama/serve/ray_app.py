"""Ray Serve: replicas on one machine or many, each a whole server, behind one address.

    serve run llama.serve.ray_app:app
    serve run llama.serve.ray_app:build ckpt_dir=/models/CodeLlama-7b replicas=1:8 max_seq_len=4096 quantize=int8

Two deployments: `Front` receives HTTP requests, and `Replica` answers them with the very application of `codellama
serve`. In between Ray Serve chooses a replica by `ByPrefix`: the one that has answered a prompt with the same
beginning, since its cache holds it, unless others have much less to do. Replicas come and go with the requests that
are under way. A replica that dies takes its own requests with it: those of which nothing has been sent yet are asked
again elsewhere, and the others end with an error in the shape of their API.
"""

# mypy: disable-error-code="import-not-found"
# Ray is a heavy extra, which is checked for types only where it is installed.
from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse

try:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ModuleNotFoundError as error:
    remedy = "pip install 'codellama[ray]'"
    raise ModuleNotFoundError(f"llama.serve.ray_app needs Ray Serve: {remedy} ({error})", name=error.name) from error

from llama.serve.errors import Described, shape_of
from llama.serve.replies import dumped, reply

LOG = logging.getLogger("llama.serve")
TRIES = 3
"""Replicas that are asked one after the other before a client hears that none has answered."""
BLOCK, BLOCKS = 128, 64
"""Beginnings of prompts are compared in blocks of so many characters, and so many of them."""
KNOWN = 20_000
"""Blocks of which a router remembers who has them."""
SLACK = 4
"""The replica that holds a prompt's beginning may have so many more requests than another one, and is asked still."""
WORDS = ("replicas", "num_cpus", "num_gpus", "model_name", "max_queue", "api_key", "request_timeout")
"""What `build` takes besides the arguments of `llama.load`."""


@dataclass(frozen=True)
class Asked:
    """An HTTP request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    blocks: Sequence[bytes] = ()
    """What a router knows the prompt's beginning by: `blocks_of`."""


Head = tuple[int, list[tuple[bytes, bytes]]]


def blocks_of(body: bytes) -> list[bytes]:
    """A hash for each beginning of a prompt, block by block: equal hashes mean equal beginnings."""
    try:
        found = json.loads(body)
    except ValueError:
        return []
    given = found if isinstance(found, dict) else {}
    names = ("input_extra", "messages", "prompt", "inputs", "input_prefix")  # in the order in which models read them
    text = "\0".join(json.dumps(given[name]) for name in names if given.get(name)).rstrip('"]} ')
    chain = hashlib.blake2b(digest_size=12)
    blocks: list[bytes] = []
    for at in range(0, min(len(text), BLOCK * BLOCKS), BLOCK):
        chain.update(text[at : at + BLOCK].encode())
        if at + BLOCK <= len(text) or not blocks:
            blocks.append(chain.digest())
    return blocks


class Holders:
    """Which replica has answered a prompt with which beginning: the last `KNOWN` blocks."""

    def __init__(self) -> None:
        self._of: OrderedDict[bytes, Any] = OrderedDict()

    def note(self, blocks: Sequence[bytes], replica: Any) -> None:
        for block in blocks:
            self._of[block] = replica
            self._of.move_to_end(block)
        while len(self._of) > KNOWN:
            self._of.popitem(last=False)

    def of(self, blocks: Sequence[bytes], alive: Sequence[Any]) -> Any:
        """The one with the longest of these beginnings; None where nobody has any."""
        return next((found for block in reversed(blocks) if (found := self._of.get(block)) in alive), None)


class ByPrefix(RequestRouter):  # type: ignore[misc]
    """Ray Serve's router of requests to replicas."""

    def initialize_state(self, **_: Any) -> None:
        self._holders = Holders()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups in the order in which they are asked; within one, the replica with the shortest queue is.

        What is chosen is noted now: requests that come at the same time with the same beginning go there, too.
        """
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        blocks = _blocks(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, wait before the next attempt
        holder = self._holders.of(blocks, list(by_id))
        queues = {one: self.replica_queue_len_cache.get(one) or 0 for one in by_id}
        if not queues:
            return []
        if holder is None or queues[holder] > min(queues.values()) + SLACK:
            holder = min(random.sample(list(queues), len(queues)), key=queues.__getitem__)
        self._holders.note(blocks, holder)
        return [[by_id[holder]], [replica for one, replica in by_id.items() if one != holder]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Some versions of Ray say so where the first choice was full."""
        self._holders.note(_blocks(pending_request), replica_id)


def _blocks(pending_request: PendingRequest | None) -> Sequence[bytes]:
    """Of a request's `Asked`, whose class may be a copy: Ray sends a router as code."""
    arguments = pending_request.args if pending_request is not None else ()
    return getattr(arguments[0], "blocks", ()) if arguments else ()


@dataclass(frozen=True)
class Wanted:
    """What a replica is made of."""

    loading: dict[str, Any] = field(default_factory=dict)
    """Arguments of `llama.load`."""
    model_name: str | None = None
    max_queue: int = 128
    request_timeout: float = 600.0
    keys: tuple[str, ...] = ()


class Replica:
    """A Llama, its engine, and the application of `codellama serve` around it."""

    def __init__(self, wanted: Wanted) -> None:
        from llama.front import load
        from llama.serve.app import Settings, create_app
        from llama.serve.cli import facts_of, name_of
        from llama.serve.engine import Engine
        from llama.serve.metrics import Metrics

        llama, loading = load(**wanted.loading), wanted.loading
        name = wanted.model_name or name_of(loading.get("ckpt_dir"))
        metrics, facts = Metrics(name), facts_of(llama, name, loading.get("quantize"))
        self._engine = Engine(llama, max_queue=wanted.max_queue, request_timeout=wanted.request_timeout, watch=metrics)
        settings = Settings(model_name=name, keys=wanted.keys, metrics=metrics, facts=facts)
        self._app = create_app(self._engine, settings)
        self._engine.start()
        self._own_name = str(serve.get_replica_context().replica_id.unique_id).encode()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.stop()

    def check_health(self) -> None:
        """Ray Serve calls it, and replaces a replica that raises."""
        if self._engine.lost is not None:
            raise self._engine.lost
        if not self._engine.is_ready:
            raise RuntimeError("the engine's thread has ended")

    async def answer(self, asked: Asked) -> AsyncGenerator[Head | bytes, None]:
        """Status and headers, then the body in parts as they come. Whoever closes it has gone away."""
        messages: asyncio.Queue[Any] = asyncio.Queue()
        body = [{"type": "http.request", "body": asked.body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Any:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": asked.method, "scheme": "http",
            "path": asked.path, "raw_path": asked.path.encode(), "query_string": asked.query, "root_path": "",
            "headers": list(asked.headers), "client": None, "server": None,
        }  # fmt: skip
        work: asyncio.Task[None] = asyncio.ensure_future(self._app(scope, receive, messages.put))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], [*message["headers"], (b"x-codellama-replica", self._own_name)]
                elif message.get("body"):
                    yield message["body"]
        finally:
            gone.set()
            await asyncio.wait([work], timeout=5)
            work.cancel()


class Front:
    """Takes HTTP requests, and passes on what a replica answers, as it comes."""

    def __init__(self, replicas: Any, body_limit: int = 2_000_000) -> None:
        self._replicas, self._limit = replicas, body_limit

    async def __call__(self, http: HTTPRequest) -> Response:
        path, body = http.url.path, bytearray()
        async for part in http.stream():
            body += part
            if len(body) > self._limit:
                message = f"the body has more than the {self._limit:,} bytes that are allowed"
                return _refusal(path, Described("too_large", 413, message))
        whole = bytes(body)
        query = http.url.query.encode()
        asked = Asked(http.method, path, query, list(http.headers.raw), whole, blocks_of(whole))
        reasons: list[str] = []
        while len(reasons) < TRIES:
            parts = self._replicas.options(stream=True).answer.remote(asked)
            begun: list[Any] = []
            try:
                async for part in parts:
                    begun.append(part)
                    if len(begun) == 2:  # before the first of the body, nothing is lost if the replica is
                        break
            except ray.exceptions.RayActorError as error:
                reasons.append(type(error).__name__)
                LOG.warning("a replica was lost (%s), its request is asked again", reasons[-1])
                continue
            if not begun:
                reasons.append("no answer")
                continue
            (status, headers), first = begun[0], begun[1:]
            answer = StreamingResponse(self._rest(path, first, parts, _streams(headers)), status)
            answer.raw_headers = [(name, value) for name, value in headers if name.lower() != b"connection"]
            return answer
        message = f"{len(reasons)} replicas were lost with this request: send it again"
        return _refusal(path, Described("unavailable", 503, message))

    async def _rest(self, path: str, first: list[bytes], parts: Any, streams: str) -> AsyncGenerator[bytes, None]:
        ended = not first
        try:
            for part in first:
                yield part
            async for part in parts:
                yield part
            ended = True
        except ray.exceptions.RayActorError:
            ended = True
            if not streams:
                raise  # its length is known to the client, who sees that it is cut
            message = "the replica that wrote this answer was lost: send the request again"
            told = dumped(shape_of(path).body(Described("unavailable", 503, message)))
            yield b"data: " + told + b"\n\n" if streams == "text/event-stream" else told + b"\n"
        finally:
            if not ended:
                parts.cancel()


def _streams(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The kind of a stream; "" for an answer that comes whole."""
    kind = next((value for name, value in headers if name.lower() == b"content-type"), b"").decode("latin-1")
    kind = kind.partition(";")[0]
    return kind if kind in ("text/event-stream", "application/x-ndjson") else ""


def _refusal(path: str, error: Described) -> Response:
    shape = shape_of(path)
    return reply(shape.body(error), shape.status(error), {"Retry-After": "1"} if error.status == 503 else {})


def build(words: dict[str, str]) -> Any:
    """An application for `serve run llama.serve.ray_app:build NAME=VALUE …`: what `llama.load` takes, and `WORDS`.

    `replicas` is a number, or the fewest and the most of them, as in 1:8. ValueError for an unknown name.
    """
    from llama.front import load

    known = [name for name in inspect.signature(load).parameters if name not in ("load", "prepare", "options")]
    unknown = [name for name in words if name not in (*known, *WORDS)]
    if unknown:
        raise ValueError(f"there is no {unknown[0]}; there are {', '.join((*WORDS, *known))}")
    loading = {name: _value(text) for name, text in words.items() if name in known}
    rows = int(loading.setdefault("max_batch_size", 8))
    loading.setdefault("max_seq_len", 2048)
    wanted = Wanted(
        loading, words.get("model_name"), int(words.get("max_queue", 128)), float(words.get("request_timeout", 600)),
        (words["api_key"],) if "api_key" in words else (),
    )  # fmt: skip
    fewest, _, most = words.get("replicas", "1:4").partition(":")
    scaling = AutoscalingConfig(
        min_replicas=int(fewest), initial_replicas=int(fewest), max_replicas=int(most or fewest),
        target_ongoing_requests=rows, upscale_delay_s=10, downscale_delay_s=300,
    )  # fmt: skip
    resources = {name: float(words.get(name, usual)) for name, usual in (("num_cpus", 1), ("num_gpus", 0))}
    replicas = serve.deployment(
        Replica, name="Replica", autoscaling_config=scaling, ray_actor_options=resources, health_check_period_s=5,
        health_check_timeout_s=30, graceful_shutdown_timeout_s=60, max_ongoing_requests=rows + wanted.max_queue,
        request_router_config=RequestRouterConfig(request_router_class=ByPrefix),
    )  # fmt: skip
    front = serve.deployment(
        Front, name="Front", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, health_check_period_s=5
    )
    return front.bind(replicas.bind(wanted))


def _value(text: str) -> Any:
    """Numbers, true, false and null as JSON has them; any other word as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


app = build({})
"""With the embedded checkpoint, and 1 to 4 replicas."""
