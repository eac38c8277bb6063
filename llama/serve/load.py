"""A load generator for any server that speaks OpenAI's `/v1/completions` or `/v1/chat/completions`.

In a *closed* loop each of N clients asks again as soon as it has its answer: how much does the server do at most? In an
*open* loop requests arrive by chance at a given rate, whether the server is ready or not (Poisson), and each waits from
the moment it should have been sent: what do clients wait at that load? Both report the time to the first token (TTFT),
the times between the tokens, and whole answers.

Times are taken where bytes arrive, in a protocol of a few lines on asyncio: a client library would take longer for an
event than a small model for a token. What the generator itself is late by is measured beside it, as `lag`.

For soak tests, some clients misbehave: they leave in each phase, send half of a request, or nonsense. The others must
get their answers all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import ssl
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from llama.evals.table import render
from llama.options import (
    Above,
    Amount,
    Count,
    Counts,
    MaybeCount,
    MaybeOut,
    MaybeText,
    Numbers,
    Positional,
    Seed,
    Share,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = re.findall(
    r"\w+",
    "value index buffer config result parse token stream error number table node path state cache method return class "
    "self list item count start width total input output format string data model query update filter merge",
)
"""What prompts are made of."""
ENDS = ("length", "stop")
Unit = Literal["tokens", "words", "ids"]


# HTTP ----------------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A request without a whole answer: its message is a word or two, by which errors are counted."""


@dataclass
class Reply:
    """A response as it arrives."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """The body's bytes, and when they came."""

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


class Wire(asyncio.Protocol):
    """A connection that one request at a time uses: HTTP/1.1 with chunked, counted or unending bodies."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.open, self.uses = False, 0
        self._reply, self._buffer = Reply(), b""
        self._left: float | None = None  # bytes of the body or chunk; None: in the head
        self._chunked = self._last = self._keeps = False
        self._done: asyncio.Future[Reply] | None = None
        self.on_body: Callable[[Reply], object] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._left == float("inf"):
            self._finish()
        elif self._done is not None and not self._done.done():
            self._done.set_exception(Failed("disconnected"))

    @property
    def heard(self) -> bool:
        """Whether anything came of the last response."""
        return bool(self._buffer or self._reply.status)

    def send(self, request: bytes) -> asyncio.Future[Reply]:
        assert self.transport is not None
        self._reply, self._buffer, self._left = Reply(), b"", None
        self._chunked = self._last = False
        self._done = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody has looked at it
        self.uses += 1
        self.transport.write(request)
        return self._done

    def close(self) -> None:
        """At once: the other side sees the connection reset or ended."""
        self.open = False
        if self._done is not None and not self._done.done():
            self._done.cancel()
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        before = len(self._reply.pieces)
        try:
            while self._buffer and self._step(now):
                pass
        except (ValueError, IndexError):
            if self._done is not None and not self._done.done():
                self._done.set_exception(Failed("no HTTP"))
            self.close()
        if self.on_body is not None and len(self._reply.pieces) > before:
            self.on_body(self._reply)

    def _step(self, now: float) -> bool:
        """Takes one part off the buffer; False where more bytes are needed for the next."""
        if self._left is None:
            head, found, rest = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return False
            self._buffer = rest
            self._head(head.decode("latin-1"))
            return True
        if self._chunked and self._left == 0:
            line, found, rest = self._buffer.partition(b"\r\n")
            if not found:
                return False
            self._buffer = rest
            if self._last:  # trailers, up to an empty line
                if not line:
                    self._finish()
            elif line:  # empty after each chunk
                self._left = int(line.partition(b";")[0], 16)
                self._last = not self._left
            return True
        taken = self._buffer if self._left >= len(self._buffer) else self._buffer[: int(self._left)]
        self._buffer = self._buffer[len(taken) :]
        self._left -= len(taken)
        self._reply.pieces.append((now, taken))
        if not (self._left or self._chunked):
            self._finish()
        return True

    def _head(self, head: str) -> None:
        status, *lines = head.split("\r\n")
        names = {
            name.strip().lower(): value.strip().lower() for name, _, value in (line.partition(":") for line in lines)
        }
        self._reply.status = int(status.split()[1])
        self._keeps = names.get("connection", "keep-alive") != "close"
        if "chunked" in names.get("transfer-encoding", ""):
            self._chunked, self._left = True, 0
        elif self._reply.status in (204, 304) or names.get("content-length") == "0":
            self._finish()
        else:
            self._keeps = self._keeps and "content-length" in names
            self._left = int(names["content-length"]) if "content-length" in names else float("inf")

    def _finish(self) -> None:
        self._left = None
        if self._done is not None and not self._done.done():
            self._done.set_result(self._reply)
        if not self._keeps and self.transport is not None:
            self.transport.close()
            self.open = False


class Server:
    """Where requests go, and the connections that are kept."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises ValueError for what is no http or https address."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server: give one such as http://127.0.0.1:8000")
        self.host, self.secure = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.secure else 80)
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._headers += f"Authorization: Bearer {key}\r\n" if key else ""
        self._kept: list[Wire] = []

    def request(self, path: str, body: bytes | None = None) -> bytes:
        method = "GET" if body is None else "POST"
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        return f"{method} {self.base}{path} HTTP/1.1\r\n{self._headers}{length}\r\n".encode() + (body or b"")

    async def wire(self) -> Wire:
        """A connection that nobody uses."""
        while self._kept:
            wire = self._kept.pop()
            if wire.open:
                return wire
        try:
            encrypted = ssl.create_default_context() if self.secure else None
            made = asyncio.get_running_loop().create_connection(Wire, self.host, self.port, ssl=encrypted)
            return (await made)[1]
        except OSError as error:
            raise Failed("no connection") from error

    def keep(self, wire: Wire) -> None:
        if wire.open:
            self._kept.append(wire)

    async def call(self, path: str, body: Any = None) -> Any:
        """A whole answer in JSON. ValueError where there is none."""
        sent = None if body is None else json.dumps(body).encode()
        try:
            wire = await self.wire()
            reply = await asyncio.wait_for(wire.send(self.request(path, sent)), 60)
            self.keep(wire)
            found = json.loads(reply.body)
        except (Failed, ValueError, asyncio.TimeoutError) as error:
            what = f"{self.host}:{self.port}{self.base}{path}"
            raise ValueError(f"{what} gives no answer ({error or 'timeout'}): is a server running there?") from error
        if reply.status != 200:
            raise ValueError(f"{self.base}{path} answers with {reply.status}: {str(found)[:200]}")
        return found

    def close(self) -> None:
        for wire in self._kept:
            wire.close()


# What is asked -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """How requests look."""

    prompt: int = 200
    """Its length, in `unit`."""
    answer: int = 64
    """Tokens."""
    shared: int = 0
    """How much of each prompt's beginning is the same in all, in `unit`."""
    unit: Unit = "tokens"
    """`tokens` are words, as many as a first answer's usage says is right; `ids` are drawn below `vocabulary`."""
    vocabulary: int = 4000
    chat: bool = False
    model: str | None = None
    """None: the first that the server names."""
    temperature: float = 0.0
    seed: int = 0

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, number: int, words: float = 1.0) -> dict[str, Any]:
        """That of request `number`, with so many words for each unit."""
        own, common = random.Random(f"{self.seed} {number}"), random.Random(self.seed)
        counts = round(self.shared * words), round(max(self.prompt - self.shared, 0) * words)
        pairs = tuple(zip((common, own), counts, strict=True))
        body: dict[str, Any] = {
            "model": self.model or "default",
            "max_tokens": self.answer,
            "temperature": self.temperature,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "min_tokens": self.answer,
        }
        if self.unit == "ids" and not self.chat:
            return {**body, "prompt": [draw.randrange(259, self.vocabulary) for draw, n in pairs for _ in range(n)]}
        text = " ".join(draw.choice(WORDS) for draw, n in pairs for _ in range(n))
        return {**body, "messages": [{"role": "user", "content": text}]} if self.chat else {**body, "prompt": text}


@dataclass
class Sample:
    """One request. Times are seconds since the beginning of the run."""

    number: int
    due: float
    """When it should be sent, by its schedule."""
    first: float = 0.0
    """Its first token."""
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between tokens, or groups of tokens that came in one event."""
    prompt: int = 0
    cached: int = 0
    tokens: int = 0
    error: str = ""
    behaviour: str = ""
    """How the client misbehaved; empty for one that did not."""

    @property
    def ttft(self) -> float:
        return self.first - self.due


def read_stream(reply: Reply, sample: Sample, begin: float, chat: bool) -> None:
    """What a stream of server-sent events says, into `sample`. Raises Failed where it is no whole answer."""
    if reply.status != 200:
        raise Failed(str(reply.status))
    rest, events, last, ended = b"", 0, 0.0, False
    for at, piece in reply.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                ended = True
                continue
            try:
                event = json.loads(data)
            except ValueError:
                raise Failed("no JSON") from None
            if "error" in event:
                raise Failed("error event")
            usage = event.get("usage") or {}
            sample.prompt = usage.get("prompt_tokens", sample.prompt)
            sample.tokens = usage.get("completion_tokens", sample.tokens)
            sample.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", sample.cached) or 0
            for choice in event.get("choices") or ():
                ended = ended or choice.get("finish_reason") is not None
                if (choice.get("delta") or {}).get("content") if chat else choice.get("text"):
                    if events:
                        sample.gaps.append(at - last)
                    else:
                        sample.first = at - begin
                    events, last = events + 1, at
    if not ended:
        raise Failed("cut off")
    sample.tokens = sample.tokens or events
    sample.end = reply.pieces[-1][0] - begin
    sample.first = sample.first or sample.end  # an answer without text


# Those that misbehave ------------------------------------------------------------------------------------------------

NONSENSE: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b'{"prompt": 3}',
    b'{"prompt": {"a": [1]}, "max_tokens": 4}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "max_tokens": 1e99}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": [99999999], "max_tokens": 1}',
    b'{"prompt": [-1], "max_tokens": 1}',
    b'{"prompt": "' + b"a " * 200_000 + b'", "max_tokens": 4}',
    b'{"prompt": "\\ud800", "max_tokens": 2}',
    b'{"messages": "no"}',
)
BEHAVIOURS = ("connects", "half", "asks", "reads", "midway", "nonsense", "slow")
"""Leaves after connecting, in the middle of its request, right after it, with the first byte of the answer, or with the
third event; sends nonsense; sends its request byte by byte, and gives up."""


async def misbehave(server: Server, asked: Asked, sample: Sample, begin: float, words: float, patience: float) -> None:
    """Raises Failed where the server does not take it as it should: nonsense gets an error of the client's (4xx)."""
    draw = random.Random(f"{asked.seed} {sample.number} misbehaves")
    whole = server.request(asked.path, json.dumps(asked.body(sample.number, words)).encode())
    wire = await server.wire()
    try:
        if sample.behaviour == "half":
            wire.send(whole[: draw.randrange(1, len(whole))])
            await asyncio.sleep(draw.random() / 20)
        elif sample.behaviour == "asks":
            wire.send(whole)
            await asyncio.sleep(draw.random() / 5)
        elif sample.behaviour in ("reads", "midway"):
            wanted, enough = 1 if sample.behaviour == "reads" else 3, asyncio.Event()

            def hear(reply: Reply) -> None:
                if len(reply.pieces) >= wanted:
                    enough.set()

            wire.on_body = hear
            done = wire.send(whole)
            both: list[asyncio.Future[Any]] = [done, asyncio.ensure_future(enough.wait())]
            await asyncio.wait(both, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            both[1].cancel()
            if not (enough.is_set() or done.done()):
                raise Failed("timeout")
        elif sample.behaviour == "nonsense":
            reply = await asyncio.wait_for(wire.send(server.request(asked.path, draw.choice(NONSENSE))), patience)
            if reply.status >= 500:
                raise Failed(str(reply.status))
        elif sample.behaviour == "slow":
            done = wire.send(whole[:1])
            for byte in whole[1:40]:
                await asyncio.sleep(0.02)
                if done.done() or wire.transport is None or wire.transport.is_closing():
                    break
                wire.transport.write(bytes([byte]))
    except (asyncio.TimeoutError, TimeoutError):
        raise Failed("timeout") from None
    finally:
        wire.on_body = None
        wire.close()
    sample.end = time.perf_counter() - begin


# A run ---------------------------------------------------------------------------------------------------------------


@dataclass
class LoadResult:
    """What a run measured."""

    url: str
    asked: Asked
    clients: int | None
    rate: float | None
    seconds: float
    samples: list[Sample]
    interrupted: bool = False
    lag: list[float] = field(default_factory=list)
    """By how much the generator's own clock was late, every 10 ms."""
    memory: list[tuple[int, int]] = field(default_factory=list)
    """After how many requests the server's process had how many bytes."""

    @property
    def name(self) -> str:
        """The loop in words: 8 clients, 2.5/s."""
        return f"{self.clients} client{'s' * (self.clients > 1)}" if self.clients else f"{self.rate:g}/s"

    @property
    def good(self) -> list[Sample]:
        """Whole answers to clients that behaved."""
        return [sample for sample in self.samples if not (sample.error or sample.behaviour)]

    @property
    def errors(self) -> dict[str, int]:
        """Of the clients that behaved, by kind."""
        return dict(Counter(sample.error for sample in self.samples if sample.error and not sample.behaviour))

    def growth(self) -> float | None:
        """By which share the server's memory grew from a quarter of the requests to the last; None if it is unknown."""
        later = [size for done, size in self.memory if done >= len(self.samples) / 4]
        return later[-1] / later[0] - 1 if len(later) > 1 else None

    def summary(self) -> dict[str, Any]:
        """All figures, flat. Seconds."""
        good = self.good
        gaps = [gap for sample in good for gap in sample.gaps]
        tokens = sum(sample.tokens for sample in good)
        return {
            "clients": self.clients,
            "rate": self.rate,
            "requests": len(good),
            "seconds": self.seconds,
            **_percentiles("ttft", [sample.ttft for sample in good]),
            **_percentiles("gap", gaps),
            **_percentiles("end_to_end", [sample.end - sample.due for sample in good]),
            "requests_per_second": len(good) / self.seconds if self.seconds else 0.0,
            "tokens_per_second": tokens / self.seconds if self.seconds else 0.0,
            "prompt_tokens": statistics.mean(s.prompt for s in good) if good else 0.0,
            "cached_tokens": statistics.mean(s.cached for s in good) if good else 0.0,
            "answer_tokens": tokens / len(good) if good else 0.0,
            "errors": self.errors,
            "lag_p99": _percentile(self.lag, 0.99),
            "interrupted": self.interrupted,
        }

    def soak(self) -> str:
        """How those that misbehaved were taken, what was lost, and the server's memory."""
        lines = []
        for behaviour in dict.fromkeys(sample.behaviour for sample in self.samples):
            own = [sample for sample in self.samples if sample.behaviour == behaviour]
            errors = Counter(sample.error for sample in own if sample.error)
            lines.append([behaviour or "behaves", len(own), len(own) - errors.total(), _counted(errors)])
        hung = sum(sample.error == "timeout" for sample in self.samples)
        lost = sum(self.errors.values()) - self.errors.get("429", 0) - self.errors.get("timeout", 0)
        text = render(["clients", "requests", "as it should be", "else"], lines)
        text += f"\n{lost} lost, {hung} hung, {self.errors.get('429', 0)} refused (429)"
        if (growth := self.growth()) is not None:
            text += f"; memory {self.memory[-1][1] / 2**20:,.0f} MiB, {growth:+.1%} since a quarter of the requests"
        return text


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{percent}": _percentile(values, percent / 100) for percent in (50, 95, 99)}


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _counted(errors: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in errors.most_common()) or "none"


def run_load(
    url: str, asked: Asked | None = None, *, clients: int | None = None, rate: float | None = None,
    requests: int | None = None, seconds: float | None = None, key: str | None = None, timeout: float = 300.0,
    warm_up: int = 1, misbehaving: float = 0.0, pid: int | None = None, progress: bool = False,
) -> LoadResult:  # fmt: skip
    """Asks a server in a closed loop of `clients`, or in an open one at `rate` requests a second, until `requests` were
    sent or `seconds` are over. `timeout` is of one answer. A share `misbehaving` of the clients does; `pid` is the
    server's process, whose memory is watched. Ctrl-C ends it and keeps what was measured. Raises ValueError for what
    can't be, and where no server answers."""
    if (clients is None) == (rate is None):
        raise ValueError("give clients (a closed loop), or rate (an open one)")
    if requests is None and seconds is None:
        raise ValueError("a run needs an end: give requests or seconds")
    run = _Run(Server(url, key), asked or Asked(), requests, seconds, timeout, misbehaving, pid, progress)
    return asyncio.run(run.measure(url, clients, rate, warm_up))


class _Run:
    def __init__(
        self, server: Server, asked: Asked, requests: int | None, seconds: float | None, timeout: float,
        misbehaving: float, pid: int | None, progress: bool,
    ) -> None:  # fmt: skip
        self.server, self.asked, self.requests, self.seconds = server, asked, requests, seconds
        self.timeout, self.misbehaving, self.pid, self.progress = timeout, misbehaving, pid, progress
        self.samples: list[Sample] = []
        self.lag: list[float] = []
        self.memory: list[tuple[int, int]] = []
        self.words = 1.0
        self.begin = 0.0
        self.next = self.finished = 0

    async def measure(self, url: str, clients: int | None, rate: float | None, warm_up: int) -> LoadResult:
        await self._prepare(warm_up)
        self.begin = time.perf_counter()
        sending = asyncio.ensure_future(self._closed(clients) if clients else self._open(rate or 1.0))
        beside = [asyncio.ensure_future(self._watch_clock()), asyncio.ensure_future(self._watch())]
        interrupted = False
        with _on_interrupt(sending.cancel):
            try:
                await sending
            except asyncio.CancelledError:
                interrupted = True
        ended = time.perf_counter() - self.begin
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        self.server.close()
        done = [sample for sample in self.samples if sample.end or sample.error]
        return LoadResult(url, self.asked, clients, rate, ended, done, interrupted, self.lag, self.memory)

    async def _prepare(self, warm_up: int) -> None:
        """The model's name, words for each token, and a first answer that doesn't count."""
        if self.asked.model is None:
            listed = await self.server.call("/v1/models")
            self.asked = replace(self.asked, model=listed["data"][0]["id"])
        for i in range(max(warm_up, self.asked.unit == "tokens")):
            sample = Sample(-1 - i, 0.0)
            await self._ask(sample)
            if sample.error:
                raise ValueError(f"the server's first answer failed ({sample.error}): see what it says to one request")
            if self.asked.unit == "tokens" and sample.prompt:
                self.words *= self.asked.prompt / sample.prompt

    async def _closed(self, clients: int) -> None:
        async def client() -> None:
            while (sample := self._sample(time.perf_counter() - self.begin)) is not None:
                await self._one(sample)

        async with _all(client() for _ in range(clients)) as tasks:
            await asyncio.gather(*tasks)

    async def _open(self, rate: float) -> None:
        draw, due = random.Random(self.asked.seed), 0.0
        running: set[asyncio.Task[None]] = set()
        try:
            while (sample := self._sample(due := due + draw.expovariate(rate))) is not None:
                await asyncio.sleep(max(0.0, due - (time.perf_counter() - self.begin)))
                task = asyncio.ensure_future(self._one(sample))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()

    def _sample(self, due: float) -> Sample | None:
        """The next request; None where the run is over."""
        if (self.requests is not None and self.next >= self.requests) or (self.seconds and due >= self.seconds):
            return None
        draw = random.Random(f"{self.asked.seed} {self.next}")
        behaviour = draw.choice(BEHAVIOURS) if draw.random() < self.misbehaving else ""
        sample = Sample(self.next, due, behaviour=behaviour)
        self.samples.append(sample)
        self.next += 1
        return sample

    async def _one(self, sample: Sample) -> None:
        if sample.behaviour:
            with _recorded(sample):
                await misbehave(self.server, self.asked, sample, self.begin, self.words, self.timeout)
        else:
            await self._ask(sample)
        self.finished += 1
        if self.pid is not None and self.finished % 20 == 0:
            self.memory.append((self.finished, resident(self.pid)))

    async def _ask(self, sample: Sample) -> None:
        body = json.dumps(self.asked.body(sample.number, self.words)).encode()
        wire: Wire | None = None
        with _recorded(sample):
            try:
                request = self.server.request(self.asked.path, body)
                wire = await self.server.wire()
                try:
                    reply = await asyncio.wait_for(wire.send(request), self.timeout)
                except Failed:
                    if wire.uses == 1 or wire.heard:
                        raise
                    wire = await self.server.wire()  # the server had closed a connection that was kept
                    reply = await asyncio.wait_for(wire.send(request), self.timeout)
                self.server.keep(wire)
                read_stream(reply, sample, self.begin, self.asked.chat)
            except (asyncio.TimeoutError, TimeoutError):
                raise Failed("timeout") from None
            finally:
                if wire is not None and not sample.end:
                    wire.close()

    async def _watch_clock(self) -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            self.lag.append(time.perf_counter() - due)

    async def _watch(self) -> None:
        from tqdm import tqdm

        with tqdm(total=self.requests, unit="request", leave=False, disable=None if self.progress else True) as bar:
            while True:
                await asyncio.sleep(0.25)
                bar.update(self.finished - bar.n)


@contextlib.contextmanager
def _recorded(sample: Sample) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        sample.error = str(error)


@contextlib.asynccontextmanager
async def _all(coroutines: Any) -> Any:
    """Tasks that end with the block."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _on_interrupt(stop: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C calls `stop` while the block runs, where this is the main thread."""
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        loop.add_signal_handler(signal.SIGINT, stop)
    except (NotImplementedError, RuntimeError):  # Windows
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def resident(pid: int) -> int:
    """Bytes of memory that a process has now, with those of its children; 0 where that can't be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError, ValueError):
        return 0
    return pages * 4096 + sum(resident(int(child)) for child in children)


# For people ----------------------------------------------------------------------------------------------------------


def table(results: Sequence[LoadResult]) -> str:
    """A row for each run. Milliseconds but for rates."""
    columns = "requests|TTFT p50|p95|p99|between tokens p50|p95|p99|end to end p50|p95|requests/s|tokens/s|errors"
    lines = []
    for result in results:
        found = result.summary()
        times = (
            "ttft_p50",
            "ttft_p95",
            "ttft_p99",
            "gap_p50",
            "gap_p95",
            "gap_p99",
            "end_to_end_p50",
            "end_to_end_p95",
        )
        lines.append([
            result.name + (" (interrupted)" if result.interrupted else ""),
            found["requests"],
            *(f"{found[time] * 1e3:,.1f}" for time in times),
            f"{found['requests_per_second']:.2f}",
            f"{found['tokens_per_second']:,.1f}",
            _counted(Counter(result.errors)),
        ])  # fmt: skip
    text = render(["ms", *columns.split("|")], lines)
    late = max((result.summary()["lag_p99"] for result in results), default=0.0)
    if late > 0.005:
        text += f"\nnote: the load generator itself was late by {late * 1e3:.0f} ms (p99): ask from another machine"
    return text


def draw(results: Sequence[LoadResult], figure: Figure) -> None:
    """TTFT and times between tokens of each run as cumulative shares, and tokens a second."""
    left, middle, right = figure.subplots(1, 3)
    names = [result.name for result in results]
    for result, name in zip(results, names, strict=True):
        gaps = [gap for sample in result.good for gap in sample.gaps]
        for axes, values in ((left, [sample.ttft for sample in result.good]), (middle, gaps)):
            ordered = sorted(values)
            axes.plot([v * 1e3 for v in ordered], [(i + 1) / len(ordered) for i in range(len(ordered))], label=name)
    for axes, title in ((left, "time to the first token"), (middle, "between two tokens")):
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelsize=6)
        axes.set_xlabel("ms")
        axes.set_title(title)
        axes.axhline(0.95, color="gray", linestyle="dotted")
        axes.legend()
    left.set_ylabel("share of requests, of tokens")
    right.bar(names, [result.summary()["tokens_per_second"] for result in results])
    right.set_title("tokens/s")
    right.tick_params(axis="x", rotation=20)


def command(
    url: Positional[str] = "http://127.0.0.1:8000",
    *,
    clients: Counts = (1, 8, 16),
    rates: Numbers = (),
    requests: Count = 64,
    seconds: Above = 600.0,
    prompt: Count = 200,
    answer: Count = 64,
    shared: Amount = 0,
    unit: Unit = "tokens",
    vocabulary: Count = 4000,
    chat: bool = False,
    model: MaybeText = None,
    api_key: MaybeText = None,
    temperature: Share = 0.0,
    timeout: Above = 300.0,
    misbehaving: Share = 0.0,
    pid: MaybeCount = None,
    seed: Seed = 0,
    out: MaybeOut = None,
) -> None:
    """Measures a server at URL: TTFT, times between tokens, whole answers, requests and tokens a second.

    Any server that streams OpenAI's /v1/completions will do. Ctrl-C ends it, and keeps what was measured.

    Args:
        url: of the server.
        clients: closed loops, one run for each number of clients, that ask again when they have an answer.
        rates: open loops, one run for each: so many requests a second, at times drawn by chance.
        requests: of each run.
        seconds: that a run takes at most.
        prompt: its length.
        answer: tokens of an answer.
        shared: so much of each prompt's beginning is the same in all.
        unit: of prompt and shared: tokens (of words, by what the server counts), words, or ids drawn by chance.
        vocabulary: ids are drawn below this one.
        chat: ask /v1/chat/completions.
        model: its name (default: the first that the server has).
        api_key: of the server.
        temperature: of the answers.
        timeout: seconds after which an answer counts as lost.
        misbehaving: the share of clients that leave early, send half a request or nonsense.
        pid: the server's process, whose memory is watched.
        seed: of prompts and times.
        out: a folder for load.json and the picture load.png.
    """
    if out is not None:
        _require_matplotlib()
    asked = Asked(prompt, answer, shared, unit, vocabulary, chat, model, temperature, seed)
    loops: list[dict[str, Any]] = [*({"clients": n} for n in clients), *({"rate": rate} for rate in rates)]
    results: list[LoadResult] = []
    for loop in loops:
        results.append(
            run_load(
                url, asked, **loop, requests=requests, seconds=seconds, key=api_key, timeout=timeout,
                misbehaving=misbehaving, pid=pid, progress=True,
            )
        )  # fmt: skip
        if results[-1].interrupted:
            break
    if misbehaving:
        print("\n\n".join(result.soak() for result in results) + "\n")
    print(table(results))
    if out is not None:
        save(results, Path(out))


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError("the picture is drawn by matplotlib: pip install 'codellama[plot]', or leave --out away")


def save(results: Sequence[LoadResult], folder: Path) -> None:
    """Writes load.json (settings, figures and every request) and load.png."""
    from llama.evals.record import origin, picture
    from llama.system import replacing

    runs = [
        {**result.summary(), "memory": result.memory, "samples": [asdict(sample) for sample in result.samples]}
        for result in results
    ]
    facts = {**origin(), "url": results[0].url, "asked": asdict(results[0].asked), "runs": runs}
    with replacing(folder / "load.json") as temporary:
        temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    with picture(folder / "load.png", 13) as figure:
        draw(results, figure)
