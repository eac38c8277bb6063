"""The loop under everything that may happen to it: requests that join, leave and are cut off at any step, rows that are
taken over, writers from elsewhere, threads. In float32 each answer is the one the request gets alone."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures_text import ROWS, SLOTS, VOCABULARY, Spy, greedy, next_logprobs
from llama import Llama
from llama.cache import KVCache
from llama.decoding import Loop
from llama.errors import NotFinite, QueueFull
from llama.prompts import Prompt
from llama.requests import Event, Request
from llama.sampling import Sampling
from llama.tokenizer import Detokenizer

N = 14  # tokens of an answer


def prompts_that_share(rng: random.Random) -> list[list[int]]:
    """A dozen prompts, some of which begin alike, as conversations and samples of one task do."""
    found: list[list[int]] = []
    for stem in ([1, *(rng.randrange(3, 1000) for _ in range(length))] for length in (3, 30, 60)):
        found += [[*stem, *(rng.randrange(3, 1000) for _ in range(rng.choice([0, 1, 5, 25])))] for _ in range(4)]
    return found


PROMPTS = prompts_that_share(random.Random(5))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The oracle's answers, greedily."""
    return [greedy(prompt, N) for prompt in PROMPTS]


def request(llama: Llama, prompt: list[int], n: int = N, **settings: Any) -> Request:
    sampling = Sampling(settings.pop("temperature", 0.0), 1.0, seed=settings.pop("seed", 1))
    return Request(llama.tokenizer, Prompt(prompt, frozenset({2})), n, sampling, **settings)


def finished(one: Request) -> list[int]:
    """The tokens of its events, which must add up, with one end."""
    events = list(one.inbox)
    assert None not in events
    assert [event.finish_reason for event in events if event][:-1] == [None] * (len(events) - 1)
    return [token for event in events if event for token in event.tokens]


# --- schedules ---------------------------------------------------------------------------------------------------


def run_schedule(llama: Llama, expected: list[list[int]], alone: list[list[int]], seed: int) -> int:
    """A random series of joins, leaves, steps, chunks, and writers that don't care. Returns how many answers ended."""
    rng, model = random.Random(seed), llama.model
    loop = Loop(model, llama.ranks, chunk=rng.choice([3, 7, 32, 512]))
    open_requests: dict[int, Request] = {}
    answers: list[tuple[int, Request]] = []
    drawn: list[Request] = []
    for i in range(rng.randrange(20, 60)):
        act = rng.random()
        if act < 0.3:
            which = rng.randrange(len(PROMPTS))
            lookup, reuse = rng.choice([0, 0, 4]), rng.random() < 0.9
            if rng.random() < 0.2:
                one = request(llama, PROMPTS[which], temperature=1.3, seed=which, lookup=lookup, reuse=reuse)
                drawn.append(one)
            else:
                one = request(llama, PROMPTS[which], rng.choice([1, 4, N]), lookup=lookup, reuse=reuse)
                answers.append((which, one))
            open_requests[i] = one
            loop.join(one)
        elif act < 0.38 and open_requests:
            loop.leave(open_requests.pop(rng.choice(sorted(open_requests))))
        elif act < 0.42:
            loop.chunk = rng.choice([2, 5, 16, 512])
        elif act < 0.45:
            rows = rng.randint(1, ROWS)
            model(torch.randint(3, 1000, (rows, rng.randint(1, 9))), rng.randrange(40))
        elif act < 0.46:
            model.own_cache().forget()
        elif act < 0.47:
            model.cache = model.new_cache(ROWS, SLOTS)
        else:
            loop.step()
    for _ in range(1000):
        if all(one.gone for one in (*(one for _, one in answers), *drawn)):
            break
        loop.step()
    whole = 0
    for which, one in answers:
        if one.leaving:
            events = [event for event in one.inbox if event is not None]
            tokens = [token for event in events for token in event.tokens]
            assert tokens == expected[which][: len(tokens)]
        else:
            assert finished(one) == expected[which][: one.limit]
            whole += 1
    for one in drawn:
        assert one.tokens == alone[one.sampling.seed][: len(one.tokens)]
        assert one.leaving or len(one.tokens) == len(alone[one.sampling.seed])
    return whole


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))])
def test_a_request_gets_its_own_answer_in_any_company(tiny_llama: Llama, expected: list[list[int]], part: int) -> None:
    """Fifty random schedules each, against the float64 oracle; what is drawn, against the same request alone."""
    alone = [request(tiny_llama, prompt, temperature=1.3, seed=i, reuse=False) for i, prompt in enumerate(PROMPTS)]
    for one in alone:
        list(tiny_llama.loop.run([one]))
    drawn = [one.tokens for one in alone]
    with torch.inference_mode():
        assert sum(run_schedule(tiny_llama, expected, drawn, 50 * part + i) for i in range(50)) > 100


# --- joining and leaving -----------------------------------------------------------------------------------------


def test_a_full_queue_is_an_error_of_its_own(tiny_llama: Llama) -> None:
    loop = Loop(tiny_llama.model, tiny_llama.ranks, capacity=2)
    requests = [request(tiny_llama, PROMPTS[0]) for _ in range(3)]
    for one in requests[:2]:
        loop.join(one)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        loop.join(requests[2])
    loop.step()
    loop.join(requests[2])
    many = [request(tiny_llama, PROMPTS[i % 12], 2, row=i) for i in range(20)]  # a run of one's own waits for room
    assert len({event.row for event in loop.run(many) if event.finish_reason}) == 20


def test_a_row_is_free_within_one_step_in_the_middle_of_a_prompt_too(tiny_llama: Llama) -> None:
    loop = Loop(tiny_llama.model, tiny_llama.ranks, chunk=8)
    long = [request(tiny_llama, [1, *range(300, 390)]) for _ in range(ROWS)]
    for one in long:
        loop.join(one)
    loop.step()
    after = request(tiny_llama, PROMPTS[0], 2)
    loop.join(after)
    loop.leave(long[0])
    loop.step()
    loop.step()
    assert long[0].gone
    assert long[0].inbox[-1] is None
    assert after in loop._rows


def test_who_leaves_the_queue_never_costs_a_step(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, spy = Loop(tiny_llama.model, tiny_llama.ranks), Spy(tiny_llama, monkeypatch)
    twins = [request(tiny_llama, PROMPTS[0], 3) for _ in range(2)]
    for one in twins:
        loop.join(one)
    loop.leave(twins[1])  # equal to the other, but not the same
    while not twins[0].gone:
        loop.step()
    assert (len(finished(twins[0])), list(twins[1].inbox)) == (3, [None])
    assert {rows for rows, _ in spy.read} == {1}


def test_a_running_answer_waits_for_one_chunk_at_most(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tiny_llama.model, tiny_llama.ranks, chunk=16)
    running = request(tiny_llama, PROMPTS[0])
    loop.join(running)
    loop.step()
    spy, before = Spy(tiny_llama, monkeypatch), running.written
    loop.join(request(tiny_llama, [1, *range(300, 395)]))
    for step in range(1, 6):
        loop.step()
        assert running.written == before + step
    assert spy.read == [(1, 16), (1, 1)] * 5


def test_no_prompt_waits_for_all_that_come_after_it(tiny_llama: Llama) -> None:
    """Rows move when others end; who came first is read first nevertheless, however many short requests come."""
    loop, rng = Loop(tiny_llama.model, tiny_llama.ranks, chunk=32), random.Random(1)
    joined: dict[Request, int] = {}
    for step in range(60):
        while len(joined) < 2 * ROWS:
            one = request(tiny_llama, [1, *(rng.randrange(3, 1000) for _ in range(25))], 1)
            joined[one] = step
            loop.join(one)
        loop.step()
        joined = {one: since for one, since in joined.items() if not one.gone}
        assert step - min(joined.values()) < 3 * ROWS


def test_a_dropped_stream_gives_its_rows_back(tiny_llama: Llama) -> None:
    streams = [tiny_llama.stream([prompt], temperature=0) for prompt in PROMPTS[:ROWS]]
    for stream in streams:
        next(stream)
    assert len(tiny_llama.loop._rows) == ROWS
    del stream, streams
    gc.collect()
    list(tiny_llama.stream([PROMPTS[0]], 2, 0.0))
    assert len(tiny_llama.loop._rows) <= 1


def test_the_finished_leave_no_trace_in_the_loop(tiny_llama: Llama) -> None:
    tiny_llama.generate(PROMPTS, 2)
    tiny_llama.loop.step()
    assert (tiny_llama.loop._rows, list(tiny_llama.loop._waiting)) == ([], [])


# --- threads, tasks, forks ---------------------------------------------------------------------------------------


def test_threads_get_right_answers(tiny_llama: Llama, expected: list[list[int]]) -> None:
    """Each mixes all kinds of calls, on one Llama."""
    texts = ["def f(x):\n    return x+1\n" * 2, "class A:\n    pass\nimport os\n" * 2]
    scores = [tiny_llama.score([text])[0]["logprobs"][1:] for text in texts]
    drawn = tiny_llama.generate(PROMPTS[:3], N, 1.0, seed=[7, 8, 9])
    wrong: list[str] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            for _ in range(8):
                which = rng.randrange(len(PROMPTS))
                if tiny_llama.generate([PROMPTS[which]], N, 0.0)[0] != [expected[which]]:
                    wrong.append(f"answer {which}")
                found = tiny_llama.score([texts[number % 2]])[0]["logprobs"][1:]
                if found != pytest.approx(scores[number % 2], abs=1e-4):
                    wrong.append("score")
                if tiny_llama.generate(PROMPTS[:3], N, 1.0, seed=[7, 8, 9]) != drawn:
                    wrong.append("drawn")
                events = tiny_llama.stream([PROMPTS[which]], N, 0.0)
                next(events)
                events.close()  # type: ignore[attr-defined]
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_one_thread_may_move_what_another_waits_for(tiny_llama: Llama, expected: list[list[int]]) -> None:
    """A stream that nobody reads for a while loses nothing by it."""
    one = request(tiny_llama, PROMPTS[0])
    idle = tiny_llama.loop.run([one])
    found = list(next(idle).tokens)
    thread = threading.Thread(target=lambda: tiny_llama.generate([PROMPTS[6]], 2 * N, 0.0))
    thread.start()
    thread.join(60)
    assert one.written == N
    assert found + [token for event in idle for token in event.tokens] == expected[0]


def test_who_has_something_to_read_takes_no_step(tiny_llama: Llama) -> None:
    """On several ranks, that step could wait for the very request that it comes before."""
    one = request(tiny_llama, PROMPTS[0])
    tiny_llama.loop.join(one)
    tiny_llama.loop.step(deque([None]))
    assert one.written == 0
    tiny_llama.loop.step(deque())
    assert one.written == 1
    tiny_llama.loop.leave(one)


def test_tasks_interleave(tiny_llama: Llama, expected: list[list[int]]) -> None:
    order: list[int] = []

    async def answer(which: int) -> list[int]:
        found = []
        for event in tiny_llama.stream([PROMPTS[which]], N, 0.0):
            order.append(which)
            found += event.tokens
            await asyncio.sleep(0)
        return found

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(answer(which) for which in range(6)))

    assert asyncio.run(all_of_them()) == expected[:6]
    assert len(set(order[:12])) > 3


def test_a_fork_after_use_works_or_says_so() -> None:
    """With two threads of OpenMP a forked child would hang, and so it would if a thread that it lacks was in a step;
    else it works."""
    code = """
import os, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from llama import Llama
llama = Llama.build(max_seq_len=64)
write = lambda **more: llama.text_completion(["def f"], 0, max_gen_len=4, **more)[0]["generation"]
text = write()

def fork():
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if write() == text else 3)
        except ValueError as error:
            os._exit(7 if "forked" in str(error) else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

fork()
write(allowed=lambda written: fork() if len(written) == 1 else None)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    for threads, expected in (("1", ["0", "7"]), ("2", ["7", "7"])):
        command = [sys.executable, "-W", "ignore", "-c", code, threads]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
        assert ended.stdout.split() == expected


# --- errors, masks, alternatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_whose_logits_are_not_finite_ends_with_an_error(
    tiny_llama: Llama, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """That row alone: its mates go on."""
    logits = tiny_llama.model.logits
    good, bad = request(tiny_llama, PROMPTS[0]), request(tiny_llama, PROMPTS[4], temperature=temperature)

    def spoiled(h: Tensor) -> Tensor:
        found = logits(h)
        if bad.written == 3 and bad in tiny_llama.loop._rows:
            found[tiny_llama.loop._rows.index(bad), 0, 17] = torch.nan
        return found

    monkeypatch.setattr(tiny_llama.model, "logits", spoiled)
    tiny_llama.loop.join(good)
    tiny_llama.loop.join(bad)
    while not (good.gone and bad.gone):
        tiny_llama.loop.step()
    assert finished(good) == expected[0]
    last = bad.inbox[-1]
    assert last is not None
    assert (last.finish_reason, bad.written) == ("error", 3)
    assert isinstance(last.error, NotFinite)
    monkeypatch.setattr(tiny_llama.model, "logits", lambda h: logits(h) * torch.nan)
    for ask in (lambda: tiny_llama.text_completion(["x"], temperature), lambda: tiny_llama.score(["def f(x):"])):
        with pytest.raises(ValueError, match=r"NaN or infinite.*codellama check.*dtype"):
            ask()


def test_scores_survive_who_writes_between_their_pieces(tiny_llama: Llama) -> None:
    """What is read again is scored in its own place, not a second time behind the rest."""
    prompt = [1, *range(300, 390)]
    right = [float(next_logprobs(prompt)[i, token]) for i, token in enumerate(prompt[1:])]
    loop, model = Loop(tiny_llama.model, tiny_llama.ranks, chunk=16), tiny_llama.model
    one = request(tiny_llama, prompt, 0, score=True)
    loop.join(one)
    with torch.inference_mode():
        for step in range(30):
            loop.step()
            if step in (1, 3):
                model(torch.full((ROWS, 4), 300), 6)
    assert one.gone
    assert one.prompt_logprobs[0] is None
    assert one.prompt_logprobs[1:] == pytest.approx(right, abs=1e-4)


def test_a_mask_decides_what_may_come_next(tiny_llama: Llama) -> None:
    """Alone, in company, and with guesses; where nothing may come, the answer ends."""
    allowed_ids = list(range(300, 320))

    def allowed(written: list[int]) -> Tensor | None:
        mask = torch.zeros(VOCABULARY, dtype=torch.bool)
        if len(written) < 9:
            mask[[i for i in allowed_ids if i not in written[-2:]]] = True
        return None if len(written) == 4 else mask

    def definition(prompt: list[int]) -> list[int]:
        ids = list(prompt)
        while len(ids) - len(prompt) < 9:
            mask = allowed(ids[len(prompt) :])
            logprobs = next_logprobs(ids)[-1]
            ids.append(int((logprobs if mask is None else logprobs.masked_fill(~mask, -torch.inf)).argmax()))
        return ids[len(prompt) :]

    for lookup in (0, 4):
        masked = [request(tiny_llama, p, allowed=allowed, lookup=lookup, row=i) for i, p in enumerate(PROMPTS[:3])]
        free = request(tiny_llama, PROMPTS[5], lookup=lookup, row=9)
        events = list(tiny_llama.loop.run([*masked, free]))
        for i, prompt in enumerate(PROMPTS[:3]):
            own = [event for event in events if event.row == i]
            assert [token for event in own for token in event.tokens] == definition(prompt)
            assert own[-1].finish_reason == "stop"
        assert [t for event in events if event.row == 9 for t in event.tokens] == greedy(PROMPTS[5], N)


def test_who_asks_for_what_cant_be_harms_nobody_else(tiny_llama: Llama, expected: list[list[int]]) -> None:
    """A mask that fails ends its own request; what can be known before is refused before it joins."""

    def broken(written: list[int]) -> Tensor | None:
        if len(written) == 3:
            raise KeyError("no such rule")
        return None

    good, bad = request(tiny_llama, PROMPTS[0]), request(tiny_llama, PROMPTS[4], allowed=broken)
    for one in (good, bad):
        tiny_llama.loop.join(one)
    while not (good.gone and bad.gone):
        tiny_llama.loop.step()
    assert finished(good) == expected[0]
    last = bad.inbox[-1]
    assert last is not None
    assert (last.finish_reason, bad.written, type(last.error)) == ("error", 3, KeyError)
    for wrong, message in (
        (request(tiny_llama, PROMPTS[0], logprobs=-1), "logprobs is -1"),
        (request(tiny_llama, PROMPTS[0], logprobs=5000), "logprobs is 5000"),
        (request(tiny_llama, [1, 5000]), "ids outside 0 to 1023"),
        (request(tiny_llama, [1] * 500), "500 tokens; this model was built for 1 to 128"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_llama.loop.join(wrong)


def test_a_mask_beside_stop_ids_that_are_no_tokens(tiny_llama: Llama, expected: list[list[int]]) -> None:
    """They end nothing, and -1 is not the last token of the vocabulary."""

    def allowed(written: list[int]) -> Tensor:
        return torch.full((VOCABULARY,), len(written) < 2)

    masked = request(tiny_llama, PROMPTS[0], allowed=allowed, stop=(-1, 99999))
    free = request(tiny_llama, PROMPTS[4], stop=(5000,), row=1)
    events = list(tiny_llama.loop.run([masked, free]))
    assert [token for event in events if event.row == 1 for token in event.tokens] == expected[4]
    assert masked.answer == expected[0][:2]


def test_a_mask_that_asks_the_llama_of_its_own_step_fails(tiny_llama: Llama) -> None:
    """Its answer could never come."""
    found: list[BaseException] = []

    def work() -> None:
        try:
            tiny_llama.generate([PROMPTS[0]], 2, 0.0, allowed=lambda _: tiny_llama.generate([PROMPTS[1]], 2))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert "asks the Llama whose step it is part of" in str(found)
    assert tiny_llama.generate([PROMPTS[0]], 2, 0.0)[0] == [greedy(PROMPTS[0], 2)]


def test_penalties_are_the_definitions_over_a_whole_answer(tiny_llama: Llama) -> None:
    """Rows with and without them, with guesses for those that may guess."""
    prompt, settings = PROMPTS[4], {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7}
    ids = list(prompt)
    for _ in range(N):
        logits = next_logprobs(ids)[-1]
        for token in set(ids):
            logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
        for token in set(ids[len(prompt) :]):
            logits[token] -= 0.5 + 0.7 * ids[len(prompt) :].count(token)
        ids.append(int(logits.argmax()))
    # Penalties act on logits, of which the oracle gives those that are shifted by a constant: so shift the model's.
    shift, tiny_logits = tiny_llama.model.logits, tiny_llama.model.logits
    tiny_llama.model.logits = lambda h: shift(h).log_softmax(-1)  # type: ignore[method-assign]
    tiny_llama.lookup = 4
    try:
        both = tiny_llama.generate([prompt, prompt], N, 0.0, **settings)[0]
        plain = tiny_llama.generate([prompt], N, 0.0)[0]
    finally:
        tiny_llama.model.logits, tiny_llama.lookup = tiny_logits, 0  # type: ignore[method-assign]
    assert both == [ids[len(prompt) :]] * 2
    assert plain == [greedy(prompt, N)]


def test_an_interrupted_step_counts_no_token_that_nobody_took(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the choice of a token and its taking: penalties go on as if it had never been chosen."""
    settings = Sampling(0.0, frequency_penalty=3.0, presence_penalty=1.0)

    def asked() -> Request:
        return Request(tiny_llama.tokenizer, Prompt(PROMPTS[4], frozenset()), N, settings)

    right, one = asked(), asked()
    list(tiny_llama.loop.run([right]))
    tiny_llama.loop.join(one)
    take = Request.take

    def interrupted(request: Request, *given: Any) -> Event:
        monkeypatch.setattr(Request, "take", take)
        raise KeyboardInterrupt

    for step in range(2 * N):
        if step in (2, 5):
            monkeypatch.setattr(Request, "take", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tiny_llama.loop.step()
        tiny_llama.loop.step()
    assert one.tokens == right.tokens


@pytest.mark.parametrize(
    ("owner", "name"), [(KVCache, "copy_row_"), (Tensor, "clone"), (Detokenizer, "push"), (Detokenizer, "flush")]
)
def test_ctrl_c_costs_nobody_else_a_token(
    tiny_llama: Llama, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """Where a row is given away, where two are exchanged, and where a token becomes text."""
    loop, original, calls, caught = Loop(tiny_llama.model, tiny_llama.ranks, chunk=16), getattr(owner, name), 0, 0

    def pressed(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 5 == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*given)

    monkeypatch.setattr(owner, name, pressed)
    requests = [(i, request(tiny_llama, PROMPTS[i], 2 + 3 * (i % 4))) for i in range(9)]
    for _, one in requests:
        loop.join(one)
    for _ in range(150):
        try:
            loop.step()
        except KeyboardInterrupt:
            caught += 1
    assert caught > 1
    for i, one in requests:
        assert finished(one) == expected[i][: one.limit]
        assert "".join(event.text for event in one.inbox if event) == tiny_llama.tokenizer.decode_infilling(one.answer)


def test_an_error_while_rows_are_given_away_loses_no_request(
    tiny_llama: Llama, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as too little memory, in the step of a thread that asked for something else."""
    loop, requests = Loop(tiny_llama.model, tiny_llama.ranks), [request(tiny_llama, PROMPTS[i]) for i in range(3)]
    for one in requests:
        loop.join(one)
    with monkeypatch.context() as patched:
        patched.setattr(KVCache, "copy_row_", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            loop.step()
    for _ in range(2 * N):
        loop.step()
    assert [finished(one) for one in requests] == expected[:3]


def test_alternatives_are_told_where_they_are_asked_for(tiny_llama: Llama) -> None:
    found = list(tiny_llama.stream([PROMPTS[0]], N, 0.0, logprobs=3))
    as_json_has_it: Any = 3.0
    assert list(tiny_llama.stream([PROMPTS[0]], N, 0.0, logprobs=as_json_has_it)) == found
    ids = list(PROMPTS[0])
    for event in found:
        assert isinstance(event, Event)
        for token, logprob, top in zip(event.tokens, event.logprobs, event.top, strict=True):
            best = next_logprobs(ids)[-1].sort(descending=True)
            assert [i for i, _ in top] == best.indices[:3].tolist()
            assert [p for _, p in top] == pytest.approx(best.values[:3].tolist(), abs=1e-4)
            assert (token, logprob) == top[0]
            ids.append(token)


def test_a_step_costs_no_more_where_a_thousand_wait(tiny_llama: Llama) -> None:
    """Who waits is looked at when a row is free, not at every step."""

    def time_of_steps(waiting: int) -> float:
        loop = Loop(tiny_llama.model, tiny_llama.ranks, capacity=5000)
        for i in range(ROWS + waiting):
            loop.join(request(tiny_llama, [1, 300 + i % 7, *range(400, 440)], SLOTS))
        for _ in range(ROWS + 3):
            loop.step()
        began = time.perf_counter()
        for _ in range(30):
            loop.step()
        return time.perf_counter() - began

    few: Callable[[], float] = lambda: min(time_of_steps(0) for _ in range(3))  # noqa: E731
    assert min(time_of_steps(4000) for _ in range(3)) < 1.5 * few()
