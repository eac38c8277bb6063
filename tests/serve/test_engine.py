"""The engine alone, on asyncio: who waits, who runs, who leaves, and what ends everything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scripted_llama import Scripted
from servers import until

from llama.errors import LostRank, QueueFull
from llama.prompts import Prompt
from llama.requests import Event, Request
from llama.sampling import Sampling
from llama.serve.engine import Draining, Engine, Expired, Stream, Watch


def asked(llama: Scripted, text: str = "count:", limit: int = 100, row: int = 0, **more: Any) -> Request:
    prompt = Prompt(llama.ids(text), frozenset({llama.tokenizer.eos_id}))
    return Request(llama.tokenizer, prompt, limit, Sampling(0.0), row=row, **more)


async def text_of(stream: Stream) -> str:
    return "".join([event.text async for event in stream])


@contextmanager
def running(llama: Scripted, **settings: Any) -> Iterator[Engine]:
    engine = Engine(llama, **settings)  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine
    finally:
        llama.model.gate.set()
        engine.stop()
        assert not engine._thread.is_alive()


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main(), 20)  # type: ignore[arg-type]

    return asyncio.run(bounded())


def test_events_arrive_as_they_are_written() -> None:
    llama = Scripted()
    with running(llama) as engine:

        async def main() -> list[Event]:
            return [event async for event in engine.submit([asked(llama)])]

        events = run(main)
        assert "".join(event.text for event in events) == "one two three four five six"
        assert len(events) > 5
        assert events[-1].finish_reason == "stop"


def test_more_requests_than_rows_wait_and_all_are_answered() -> None:
    llama = Scripted(rows=2)
    with running(llama) as engine:

        async def main() -> list[str]:
            return await asyncio.gather(*(text_of(engine.submit([asked(llama, f"{i}:")])) for i in range(20)))

        assert run(main) == ["one two three four five six"] * 20


@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_closing_a_stream_frees_its_row_with_the_next_step(phase: str) -> None:
    llama = Scripted(rows=1, chunk=8)
    with running(llama) as engine:

        async def main() -> None:
            others = [engine.submit([asked(llama, "forever", 300)])] if phase == "queue" else []
            if others:
                await others[0].__anext__()
            llama.model.gate.clear()
            text = "word " * 60 if phase == "prefill" else "forever"
            request = asked(llama, text, 300)
            stream = engine.submit([request])
            if phase == "decode":
                llama.model.gate.set()
                await stream.__anext__()
                llama.model.gate.clear()
            await asyncio.to_thread(llama.model.waits.wait, 5)
            before, read = len(llama.model.passes), len(request.held)
            stream.close()
            for other in others:
                other.close()
            llama.model.gate.set()
            await asyncio.to_thread(until, lambda: request.gone)
            assert len(llama.model.passes) <= before + 2  # the one under way, and none for it after that
            if phase == "prefill":
                assert read < len(request.prompt.tokens) / 2
            assert await text_of(engine.submit([asked(llama)])) == "one two three four five six"
            assert not engine._live

        run(main)


def test_a_full_queue_refuses_all_of_a_call_or_none() -> None:
    llama = Scripted(rows=1)
    with running(llama, max_queue=2) as engine:

        async def main() -> None:
            llama.model.gate.clear()
            first = engine.submit([asked(llama)])
            await asyncio.to_thread(llama.model.waits.wait, 5)
            second = engine.submit([asked(llama, "b:")])
            with pytest.raises(QueueFull, match="try again later"):
                engine.submit([asked(llama, "c:"), asked(llama, "d:", row=1)])
            third = engine.submit([asked(llama, "c:")])
            with pytest.raises(QueueFull):
                engine.submit([asked(llama, "d:")])
            assert (engine.running, engine.waiting) == (0, 3) or (engine.running, engine.waiting) == (1, 2)
            assert 1 <= engine.retry_after <= 60
            with pytest.raises(ValueError, match="at most 3"):
                engine.submit([asked(llama, row=i) for i in range(4)])
            llama.model.gate.set()
            assert [await text_of(s) for s in (first, second, third)] == ["one two three four five six"] * 3

        run(main)


def test_a_request_that_takes_too_long_expires_wherever_it_is() -> None:
    llama = Scripted(rows=1)
    llama.model.seconds = 0.01
    with running(llama, request_timeout=0.15) as engine:

        async def main() -> None:
            long, waiting = (engine.submit([asked(llama, f"forever {i}", 400)]) for i in range(2))
            for stream in (long, waiting):
                with pytest.raises(Expired, match="request_timeout"):
                    await text_of(stream)
            await asyncio.to_thread(until, lambda: not engine._live)
            llama.model.seconds = 0
            assert await text_of(engine.submit([asked(llama)])) == "one two three four five six"

        run(main)


def test_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    llama = Scripted(rows=1)
    llama.model.seconds = 0.005
    with running(llama) as engine:

        async def main() -> None:
            runs = engine.submit([asked(llama)])
            event = await runs.__anext__()
            waits = engine.submit([asked(llama, "b:")])
            draining = asyncio.create_task(engine.drain(10))
            with pytest.raises(Draining):
                await text_of(waits)
            with pytest.raises(Draining):
                engine.submit([asked(llama, "c:")])
            assert not engine.is_ready
            assert event.text + await text_of(runs) == "one two three four five six"
            await draining

        run(main)


def test_drain_ends_what_takes_too_long() -> None:
    llama = Scripted(rows=1)
    llama.model.seconds = 0.02
    with running(llama) as engine:

        async def main() -> None:
            stream = engine.submit([asked(llama, "forever", 400)])
            await stream.__anext__()
            begun = time.monotonic()
            await engine.drain(0.2)
            assert time.monotonic() - begun < 2
            with pytest.raises(Draining):
                await text_of(stream)

        run(main)


def test_a_step_that_fails_ends_what_runs_and_nothing_else() -> None:
    llama = Scripted()
    with running(llama) as engine:

        async def main() -> None:
            llama.model.fails = [MemoryError("no room")]
            with pytest.raises(MemoryError):
                await text_of(engine.submit([asked(llama)]))
            await asyncio.to_thread(until, lambda: not engine._live)
            assert await text_of(engine.submit([asked(llama)])) == "one two three four five six"

        run(main)


def test_a_lost_rank_ends_everything_and_is_said_once() -> None:
    llama = Scripted()
    said: list[int] = []
    with running(llama, on_loss=lambda: said.append(1)) as engine:

        async def main() -> None:
            llama.model.fails = [LostRank("rank 1 has ended")]
            with pytest.raises(LostRank, match="rank 1"):
                await text_of(engine.submit([asked(llama)]))
            with pytest.raises(LostRank):
                engine.submit([asked(llama)])

        run(main)
        assert said == [1]
        assert engine.lost is not None
        assert not engine.is_ready


def test_a_defect_in_the_engine_itself_leaves_nobody_waiting() -> None:
    class Broken(Watch):
        def wrote(self, request: Request, timing: Any, tokens: int, seconds: float) -> None:
            raise ZeroDivisionError

    llama = Scripted()
    with running(llama, watch=Broken()) as engine:

        async def main() -> None:
            with pytest.raises(ZeroDivisionError):
                await text_of(engine.submit([asked(llama)]))
            assert not engine.is_ready

        run(main)


def test_timings_and_cached_tokens() -> None:
    class Noted(Watch):
        def __init__(self) -> None:
            self.ends: list[str] = []
            self.tokens = 0

        def wrote(self, request: Request, timing: Any, tokens: int, seconds: float) -> None:
            self.tokens += tokens
            assert seconds >= 0

        def ended(self, request: Request, timing: Any, reason: str) -> None:
            self.ends.append(reason)

    llama, watch = Scripted(), Noted()
    llama.model.seconds = 0.003
    with running(llama, watch=watch) as engine:

        async def main() -> None:
            text = "the same beginning, long enough to be worth taking over: "
            for i in range(2):
                request = asked(llama, text + str(i))
                stream = engine.submit([request])
                assert len(await text_of(stream)) > 5
                [timing] = stream.timings
                assert timing.joined <= timing.seated < timing.first < timing.last <= timing.ended
                assert timing.prefill >= 0.003
                assert (request.reused > 10) == (i == 1)
            gone = engine.submit([asked(llama, "forever", 300)])
            await gone.__anext__()
            gone.close()
            await asyncio.to_thread(until, lambda: not engine._live)

        run(main)
        assert watch.ends == ["stop", "stop", "abort"]
        assert watch.tokens > 10


def test_the_engine_sleeps_while_nothing_runs() -> None:
    llama = Scripted()
    with running(llama) as engine:
        run(lambda: text_of_one(engine, llama))
        steps = len(llama.model.passes)
        begun = time.thread_time()
        time.sleep(0.1)
        assert len(llama.model.passes) == steps
        assert time.thread_time() - begun < 0.05


async def text_of_one(engine: Engine, llama: Scripted) -> str:
    return await text_of(engine.submit([asked(llama)]))
