"""The engine: one thread steps the loop, and any number of coroutines wait for what it writes.

A `Llama` computes in the thread that asks. A server has one event loop that must never wait for a matrix, so the loop's
steps get a thread of their own: `submit` puts requests into the queue and returns a `Stream`, whose events arrive by
`call_soon_threadsafe`, one call a step for all rows together. Closing a stream takes its requests out before the next
step, whether they wait, are being read, or write.

On several ranks the other processes run `follow`: they make the requests that rank 0 announces, and step when it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama.decoding import Loop
from llama.errors import LostRank, QueueFull
from llama.parallel import Ranks
from llama.requests import Event, Request
from llama.tokenizer import Tokenizer

STOP = "stop"
"""What rank 0 announces in place of a request when the server ends."""


class Draining(RuntimeError):
    """The server is about to end, and takes no more requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: send the request to another one, or again in a minute")


class Expired(RuntimeError):
    """A request was not answered within the server's --request_timeout."""


class Model(Protocol):
    """What an engine needs of a Llama."""

    @property
    def model(self) -> Any: ...
    @property
    def loop(self) -> Loop: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def ranks(self) -> Ranks: ...
    @property
    def lookup(self) -> int: ...


@dataclass
class Timing:
    """When things happened to a request, by `time.monotonic()`; 0 for what has not happened."""

    joined: float
    seated: float = 0.0
    """The beginning of the step in which it got a row."""
    first: float = 0.0
    """The end of the step that wrote its first token."""
    last: float = 0.0
    """The end of the last step that wrote one."""
    ended: float = 0.0
    written: int = 0

    @property
    def queue(self) -> float:
        return (self.seated or self.ended or time.monotonic()) - self.joined

    @property
    def prefill(self) -> float:
        return self.first - self.seated if self.first else 0.0

    @property
    def decode(self) -> float:
        return self.last - self.first if self.first else 0.0


class Watch:
    """Hears what happens in an engine, in the engine's thread. This one does nothing; metrics.py counts."""

    def seated(self, request: Request, timing: Timing) -> None: ...

    def wrote(self, request: Request, timing: Timing, tokens: int, seconds: float) -> None:
        """So many tokens came with a step, `seconds` after those before it, or after it joined."""

    def ended(self, request: Request, timing: Timing, reason: str) -> None: ...


class Stream:
    """The events of the requests of one call, in the order in which they become certain; `event.row` tells them apart.

    An asynchronous iterator, for one coroutine. It ends with the last request's end. A request's error is an event
    with `error`; what ends all of them (the server stops, the time is over) is raised.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        now = time.monotonic()
        self.timings = [Timing(now) for _ in requests]
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._open = set(range(len(self.requests)))
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        while self._open and self._error is None:
            found = await self._events.get()
            if isinstance(found, Exception):
                self._error = found
            elif found.row in self._open:
                if found.finish_reason is not None:
                    self._open.remove(found.row)
                return found
        self.close()
        raise self._error or StopAsyncIteration

    @property
    def has_more(self) -> bool:
        """Whether the next event, or the end, comes without waiting."""
        return not (self._open and self._events.empty())

    def leave(self, row: int) -> None:
        """Takes out one request, of which no further event will come."""
        self._open.discard(row)
        self._engine.remove([self.requests[row]])

    def close(self) -> None:
        """Takes out what still runs. Its rows are free with the next step."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._engine.remove(self.requests)

    def expire_after(self, seconds: float) -> None:
        remedy = "ask for fewer tokens, or start the server with a larger --request_timeout"
        error = Expired(f"the answer was not complete after {seconds:g} s: {remedy}")
        self._timer = self._loop.call_later(seconds, self._fail, error)

    def fail(self, error: Exception) -> None:
        """Ends all of it with an error. From any thread."""
        with contextlib.suppress(RuntimeError):  # its event loop has ended
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: Exception) -> None:
        self._events.put_nowait(error)
        self._engine.remove(self.requests)

    def _put(self, events: Sequence[Event]) -> None:
        for event in events:
            self._events.put_nowait(event)


class Engine:
    """Owns a Llama, or whatever has the same loop, tokenizer, model and ranks, and steps it while anything runs."""

    def __init__(
        self, llama: Model, *, max_queue: int = 128, request_timeout: float | None = None, watch: Watch | None = None,
        on_loss: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """`max_queue` is how many requests may wait for a row, and `request_timeout` the seconds that one may take.
        `on_loss` is called, in the engine's thread, when it can't go on: then `lost` says why."""
        self.llama, self.loop, self.tokenizer = llama, llama.loop, llama.tokenizer
        self.args, self.ranks = llama.model.args, llama.ranks
        self.rows: int = llama.model.own_cache().rows
        self.max_queue, self.request_timeout = max_queue, request_timeout
        self.watch, self.on_loss = watch or Watch(), on_loss
        self.lost: Exception | None = None
        """A lost rank, or a defect of this file: nothing is answered any more."""
        self.draining = False
        self.seconds_per_request = 1.0
        """An average of the last ones, from joining to their end."""
        self.loop.capacity = 2**31  # the bound is kept here, for all requests of a call at once
        self._live: dict[Request, tuple[Stream, int]] = {}
        self._leaving: list[Request] = []
        self._wake, self._stopping, self._ended = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._run, name="codellama-engine", daemon=True)

    # For coroutines --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive() and not self.draining and self.lost is None

    def submit(self, requests: Sequence[Request]) -> Stream:
        """All requests join, or none: their `row` must be their place in the list. To be called in an event loop.

        Raises QueueFull, ValueError for what the model can't answer, Draining, and LostRank.
        """
        if self.lost is not None:
            raise self.lost
        if self.draining or self._stopping:
            raise Draining
        for request in requests:
            self.loop.check(request)
        room = self.rows + self.max_queue
        if len(requests) > room:
            raise ValueError(f"{len(requests)} answers are asked for at once; this server takes at most {room}")
        stream = Stream(self, requests)
        with self._wake:
            if len(self._live) + len(requests) > room:
                raise QueueFull(f"{self.waiting} requests wait already, and no more may: try again later")
            for i, request in enumerate(requests):
                self._live[request] = stream, i
                self.loop.join(request)
            self._wake.notify_all()
        if self.request_timeout is not None:
            stream.expire_after(self.request_timeout)
        return stream

    def remove(self, requests: Sequence[Request]) -> None:
        """Takes out those that have not ended."""
        open_requests = [request for request in requests if not (request.gone or request.leaving)]
        if open_requests:
            with self._wake:
                self._leaving += open_requests
                self._wake.notify_all()

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(request.reused >= 0 for request in list(self._live))

    @property
    def waiting(self) -> int:
        return len(self._live) - self.running

    @property
    def retry_after(self) -> int:
        """Seconds after which a refused request may find a place: those that wait before it, at the present speed."""
        return max(1, min(60, round(self.seconds_per_request * (self.waiting + 1) / self.rows)))

    @property
    def cache_use(self) -> float:
        """The share of the cache's slots that hold tokens of running requests."""
        slots = sum(len(request.held) for request in list(self._live) if request.reused >= 0)
        return slots / (self.rows * int(self.args.max_seq_len))

    async def drain(self, seconds: float) -> None:
        """Refuses what waits and what comes, and returns when what runs has ended, or after so many seconds."""
        self.draining = True
        for request, (stream, _) in list(self._live.items()):
            if request.reused < 0:
                stream.fail(Draining())
        end = time.monotonic() + seconds
        while self._live and time.monotonic() < end and self.lost is None:
            await asyncio.sleep(0.02)
        for stream, _ in list(self._live.values()):
            stream.fail(Draining())

    def stop(self, seconds: float = 10.0) -> None:
        """Ends everything, on the other ranks as well."""
        with self._wake:
            self._stopping = self.draining = True
            self._leaving += list(self._live)
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        elif self._thread.ident is None and not self._ended:  # it was never started, and the others wait
            self._end_others()

    # The thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (leaving := self._next()) is not None:
                begun = time.monotonic()
                try:
                    if leaving:
                        self.loop.leave(*leaving)  # on several ranks, this steps
                    self.loop.step()
                except LostRank:
                    raise
                except Exception as error:  # such as too little memory: nobody's fault that could be told
                    if self.ranks.world_size > 1:
                        raise self.ranks.lost("this rank's own step") from error
                    for stream, _ in list(self._live.values()):
                        stream.fail(error)
                    self._leaving += list(self._live)
                self._hand_out(begun)
            self._end_others()
        except Exception as error:
            self._lose(error)

    def _end_others(self) -> None:
        self._ended = True
        if self.ranks.world_size > 1:
            self.ranks.broadcast_object([[STOP], []])

    def _next(self) -> list[Request] | None:
        """Waits until there is something to step for. Returns who leaves; None when the engine has stopped."""
        with self._wake:
            while not (self._live or self._stopping):
                self._leaving.clear()
                self._wake.wait()
            leaving, self._leaving = self._leaving, []
            return leaving if self._live else None

    def _hand_out(self, begun: float) -> None:
        """Gives what a step has written to those who wait for it: one call for each event loop."""
        now = time.monotonic()
        ready: dict[asyncio.AbstractEventLoop, list[tuple[Stream, list[Event]]]] = {}
        for request, (stream, i) in list(self._live.items()):
            if request.reused < 0 and not request.inbox:
                continue
            self._note(request, stream.timings[i], begun, now)
            events = []
            while request.inbox:
                event = request.inbox.popleft()
                if event is not None:
                    events.append(event)
                if event is None or event.finish_reason is not None:
                    self._end(request, stream.timings[i], now, event)
            if events:
                ready.setdefault(stream._loop, []).append((stream, events))
        for loop, batch in ready.items():
            with contextlib.suppress(RuntimeError):  # an event loop that has ended
                loop.call_soon_threadsafe(_put_all, batch)

    def _note(self, request: Request, timing: Timing, begun: float, now: float) -> None:
        if not timing.seated and request.reused >= 0:
            timing.seated = max(begun, timing.joined)
            self.watch.seated(request, timing)
        new = request.written - timing.written
        if new > 0:
            self.watch.wrote(request, timing, new, now - (timing.last or timing.joined))
            timing.first, timing.last, timing.written = timing.first or now, now, request.written

    def _end(self, request: Request, timing: Timing, now: float, event: Event | None) -> None:
        with self._wake:
            del self._live[request]
        timing.ended = now
        reason = "abort" if event is None else str(event.finish_reason)
        if event is not None:
            self.seconds_per_request += 0.1 * (now - timing.joined - self.seconds_per_request)
        self.watch.ended(request, timing, reason)

    def _lose(self, error: Exception) -> None:
        self.lost = error
        with self._wake:
            live, self._live = list(self._live.values()), {}
        for stream, _ in live:
            stream.fail(error)
        if self.on_loss is not None:
            self.on_loss()


def _put_all(batch: Sequence[tuple[Stream, list[Event]]]) -> None:
    for stream, events in batch:
        stream._put(events)


# The other ranks -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Rank 0 has said that the server ends."""


class Following(Loop):
    """The loop of a rank that nobody asks: it makes each request from what rank 0 announces of it."""

    def __init__(self, llama: Model) -> None:
        super().__init__(llama.model, llama.ranks, chunk=llama.loop.chunk)
        self._tokenizer = llama.tokenizer

    def _waiting_for(self, asked: Any) -> Request | None:
        if asked == STOP:
            raise Stopped
        return Request(self._tokenizer, *asked)


def follow(llama: Model) -> None:
    """What every rank but 0 does: steps when rank 0 does, and returns when the server ends. Raises LostRank."""
    loop = Following(llama)
    with contextlib.suppress(Stopped):
        while True:
            loop.step()
