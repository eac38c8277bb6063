"""The loop against the oracle: ragged prefill in chunks, rows that leave, and what each step is allowed to cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fixtures_text import (
    ROWS,
    SLOTS,
    VOCABULARY,
    Spy,
    cut_before_the_first_complete,
    greedy,
    logprobs_after,
    next_logprobs,
)
from llama import decoding
from llama.generation import Llama
from llama.prompts import Prompt
from llama.requests import Event, Request
from llama.sampling import Sampling
from llama.tokenizer import Tokenizer

LENGTHS = (40, 17, 17, 1)


def some_prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Ids drawn at random, each beginning with bos."""
    return [[1, *torch.randint(3, 1000, (length - 1,)).tolist()] for length in lengths]


def answers(llama: Llama, prompts: Sequence[Sequence[int]], n: int, stop: Sequence[int] = ()) -> list[list[int]]:
    found, _ = llama.generate(prompts, n, temperature=0, stop=stop)
    return found


def until(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    return list(itertools.takewhile(lambda i: i not in {2, *stop}, ids))


# --- prefill -----------------------------------------------------------------------------------------------------


@pytest.fixture
def chunked(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets how many prompt tokens are read in a step."""
    return lambda chunk: monkeypatch.setattr(tiny_llama.loop, "chunk", chunk)


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 512])
def test_prefill_in_chunks_ends_in_the_oracles_logits(
    tiny_llama: Llama, chunked: Callable[[int], None], chunk: int
) -> None:
    """Ragged rows: those that end before a chunk, at its border, and in its middle."""
    chunked(chunk)
    prompts = some_prompts()
    events = list(tiny_llama.stream(prompts, 1, 0.0, logprobs=4, reuse=False))
    assert [event.row for event in events if event.tokens] == sorted(range(4), key=[e.row for e in events].index)
    for event in events:
        expected = next_logprobs(prompts[event.row])[-1].sort(descending=True)
        ids, logprobs = zip(*event.top[0], strict=True)
        assert list(ids) == expected.indices[:4].tolist()
        assert list(logprobs) == pytest.approx(expected.values[:4].tolist(), abs=1e-4)
        assert event.logprobs == [logprobs[0]]


def test_p1_a_ragged_batch_is_read_in_one_pass(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(tiny_llama, monkeypatch)
    answers(tiny_llama, some_prompts((40, 3, 17)), 1)
    assert spy.read == [(3, 40)]


def test_p1_rows_that_have_ended_are_left_out_of_later_chunks(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_llama.loop, "chunk", 48)
    spy = Spy(tiny_llama, monkeypatch)
    answers(tiny_llama, some_prompts((43, 3, 17)), 1)
    assert spy.read == [(1, 43), (2, 17)]


def test_no_pass_reads_more_prompt_tokens_than_a_chunk(
    tiny_llama: Llama, chunked: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's prompts are one pass of at most a chunk, so that others never wait for more."""
    chunked(20)
    spy, prompts = Spy(tiny_llama, monkeypatch), some_prompts((90, 50, 9, 7, 4, 4))
    assert answers(tiny_llama, prompts, 3) == [until(greedy(prompt, 3), ()) for prompt in prompts]
    assert max(rows * tokens for rows, tokens in spy.read if tokens > 1) == 20


def test_p5_only_last_positions_get_logits(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(tiny_llama, monkeypatch)
    tiny_llama.generate(some_prompts((40, 3, 17)), 4, temperature=0, logprobs=True)
    assert spy.scored == [3] * 4


def test_logprobs_are_computed_where_they_are_asked_for_alone(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    original = decoding.logprobs_of
    monkeypatch.setattr(
        decoding, "logprobs_of", lambda logits, *more: (asked.append(tuple(logits.shape)), original(logits, *more))[1]
    )
    list(tiny_llama.stream(some_prompts(), 5, 0.0))
    assert asked == []
    tokenizer, prompts, inbox = tiny_llama.tokenizer, some_prompts((9, 9, 9)), []
    requests = [
        Request(tokenizer, Prompt(prompt, frozenset()), 3, Sampling(0.0), logprobs=0 if row == 1 else None, row=row)
        for row, prompt in enumerate(prompts)
    ]
    inbox = list(tiny_llama.loop.run(requests))
    assert asked == [(1, 1, VOCABULARY)] * 3
    assert [len(event.logprobs) for event in inbox] == [event.row == 1 for event in inbox]


def test_p5_scoring_makes_logits_of_a_chunk_at_a_time(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llama.loop, "chunk", 16)
    spy = Spy(tiny_llama, monkeypatch)
    tiny_llama.score(some_prompts((40, 17, 3)))
    assert max(spy.scored) == 16
    assert sum(spy.scored) == 39 + 16 + 2


# --- rows that leave ---------------------------------------------------------------------------------------------


def test_rows_leave_at_different_times_and_the_others_go_on(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row takes the place of one that leaves, keys, values and all."""
    prompts = some_prompts((40, 17, 17, 2))
    unstopped = [greedy(prompt, 16) for prompt in prompts]
    stop = [unstopped[0][3], unstopped[2][8], unstopped[1][11]]
    expected = [until(ids, stop) for ids in unstopped]
    assert len({len(ids) for ids in expected}) >= 3
    spy = Spy(tiny_llama, monkeypatch)
    assert answers(tiny_llama, prompts, 16, stop) == expected
    alive = [sum(len(ids) >= step for ids in expected) for step in range(1, max(map(len, expected)) + 1)]
    steps = [rows for rows, _ in spy.read[1:]]
    assert steps == [rows for rows in alive if rows][: len(steps)]
    assert steps[-1] < ROWS


def test_rows_leave_together_and_first_and_last(tiny_llama: Llama) -> None:
    """Every set of rows may be the one that leaves at a step: each row's first token is made its end."""
    prompts = some_prompts()
    unstopped = [greedy(prompt, 5) for prompt in prompts]
    firsts = [ids[0] for ids in unstopped]
    assert len(set(firsts)) == ROWS
    for n in range(1, ROWS + 1):
        for stop in itertools.combinations(firsts, n):
            assert answers(tiny_llama, prompts, 5, stop) == [until(ids, stop) for ids in unstopped]


def test_rows_leave_when_the_context_is_full(tiny_llama: Llama) -> None:
    """Without max_gen_len each row has the room that its own prompt leaves."""
    prompts = some_prompts((SLOTS - 4, SLOTS - 12, SLOTS - 1, SLOTS - 7))
    found = answers(tiny_llama, prompts, SLOTS)
    assert found == [until(greedy(prompt, SLOTS - len(prompt)), ()) for prompt in prompts]
    assert [len(ids) for ids in found] == [4, 12, 1, 7]


@pytest.mark.parametrize("order", [(3, 1, 0, 2), (0, 1, 2, 3), (2, 3, 1, 0)])
def test_a_batch_is_each_prompt_alone_in_any_order(tiny_llama: Llama, order: tuple[int, ...]) -> None:
    prompts = some_prompts()
    expected = [until(greedy(prompt, 12), ()) for prompt in prompts]
    assert answers(tiny_llama, [prompts[i] for i in order], 12) == [expected[i] for i in order]


def test_more_prompts_than_rows_take_rows_as_they_become_free(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = some_prompts((5, 30, 2, 19, 11, 26, 8, 3, 14))
    spy = Spy(tiny_llama, monkeypatch)
    tokens, logprobs = tiny_llama.generate(prompts, 6, temperature=0, logprobs=True)
    assert tokens == [until(greedy(prompt, 6), ()) for prompt in prompts]
    assert logprobs is not None
    for prompt, ids, found in zip(prompts, tokens, logprobs, strict=True):
        assert found == pytest.approx(logprobs_after(prompt, ids), abs=1e-4)
    assert max(rows for rows, _ in spy.read) == ROWS


# --- what a step costs -------------------------------------------------------------------------------------------


def test_p6_the_cache_stays_where_it_was_allocated(tiny_llama: Llama) -> None:
    cache = tiny_llama.model.own_cache()
    places = [store.data_ptr() for store in (*cache.keys, *cache.values)]
    assert cache.keys[0].shape[0::2] == (ROWS, SLOTS)
    assert {store.dtype for store in (*cache.keys, *cache.values)} == {tiny_llama.model.norm.weight.dtype}
    seen = []
    for _ in tiny_llama.stream(some_prompts(), 6, temperature=0):
        now = tiny_llama.model.own_cache()
        seen.append(now is cache and [store.data_ptr() for store in (*now.keys, *now.values)] == places)
    assert len(seen) > 6
    assert all(seen)


def test_p8_a_step_reads_from_the_device_as_often_for_many_rows_as_for_one(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each such read makes the host wait for a GPU."""
    reads: list[str] = []
    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda *a, _name=name, _original=original, **k: (reads.append(_name), _original(*a, **k))[1]
        )
    prompts = some_prompts((9, 9, 9, 9))
    counts = []
    for batch in (prompts[:1], prompts):
        for n in (4, 8):
            reads.clear()
            found = answers(tiny_llama, batch, n)
            assert [len(ids) for ids in found] == [n] * len(batch)
            counts.append(len(reads))
    assert counts[1] - counts[0] == counts[3] - counts[2] <= 2 * 4


def test_p8_finished_rows_are_not_computed(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts((SLOTS - 2, SLOTS - 5, SLOTS - 9))
    spy = Spy(tiny_llama, monkeypatch)
    answers(tiny_llama, prompts, SLOTS)
    assert [rows for rows, _ in spy.read[1:]] == [3] + [2] * 3 + [1] * 4


def test_p9_greedy_and_plain_sampling_sort_nothing(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    for name in ("sort", "argsort", "topk"):
        monkeypatch.setattr(Tensor, name, forbidden)
        monkeypatch.setattr(torch, name, forbidden)
    tiny_llama.generate(some_prompts(), 3, temperature=0, top_p=0.5)
    tiny_llama.generate(some_prompts(), 3, temperature=1.0, top_p=1.0)
    with pytest.raises(AssertionError, match="sorted"):
        tiny_llama.generate(some_prompts(), 3, temperature=1.0, top_p=0.9)


def test_events_come_as_they_are_written(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first after the prefill, not at the end; and every row ends in just one event that says why."""
    spy = Spy(tiny_llama, monkeypatch)
    events: list[Event] = []
    for event in tiny_llama.stream(some_prompts(), 8, temperature=0):
        events.append(event)
        assert len(spy.read) <= 1 + sum(len(e.tokens) for e in events if e.row == event.row)
    for row in range(len(LENGTHS)):
        reasons = [event.finish_reason for event in events if event.row == row]
        assert reasons[-1] == "length"
        assert set(reasons[:-1]) <= {None}


# --- one row's answer --------------------------------------------------------------------------------------------

words = st.sampled_from(["ab", "a", "b", " ", "\n", "é", "漢", "🙂", "return", "  ", "x = 1"])
answer_texts = st.lists(words, min_size=1, max_size=10).map("".join)
stops = st.lists(st.text("ab é漢\n", min_size=1, max_size=3), max_size=3)


@given(text=answer_texts, stop=stops, context=st.sampled_from(["", "x", "def f"]), limit=st.integers(1, 30))
def test_an_answers_events_add_up(tokenizer: Tokenizer, text: str, stop: list[str], context: str, limit: int) -> None:
    """Whatever the stop strings: the text is the one up to the first that is complete, and the tokens are those whose
    text began before the cut, with a log-probability each."""
    decode = tokenizer.decode_infilling if context else tokenizer.decode
    ids = tokenizer.encode_infilling(text) if context else tokenizer.encode(text, bos=False, eos=False)
    prompt = Prompt(tokenizer.encode(context, bos=True, eos=False), frozenset({2}), continues=context != "")
    answer = Request(tokenizer, prompt, limit, stop=stop)
    events: list[Event] = []
    for n, token in enumerate([*ids, 2]):
        if not answer.gone:
            events.append(answer.take(token, [-float(n)]))
    written = ids[:limit]
    expected, found = cut_before_the_first_complete(decode(written), stop)
    # A token begins where the whole characters before it end.
    begins = [len(decode(written[:i]).rstrip("\ufffd")) for i in range(len(written))]
    kept = [token for token, begin in zip(written, begins, strict=True) if begin < len(expected)]
    tokens = [token for event in events for token in event.tokens]
    assert "".join(event.text for event in events) == expected
    assert tokens == (kept if found else written)
    assert [p for event in events for p in event.logprobs] == [-float(n) for n in range(len(tokens))]
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == ("stop" if found or limit > len(ids) else "length")


def test_tokens_that_could_begin_a_stop_string_are_held_back_with_their_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.sp_model.piece_to_id(letter) for letter in "aENxEND"]
    answer = Request(tokenizer, Prompt([1, 13], frozenset({2})), 99, stop=["END"])
    events = [answer.take(token, [-float(n)]) for n, token in enumerate(ids)]
    assert [event.text for event in events] == ["a", "", "", "ENx", "", "", ""]
    assert [len(event.tokens) for event in events] == [1, 0, 0, 3, 0, 0, 0]
    assert events[3].logprobs == [-1.0, -2.0, -3.0]
    assert events[-1].finish_reason == "stop"
    assert answer.gone


def test_a_stop_string_may_end_in_what_is_told_last(tokenizer: Tokenizer) -> None:
    """The end of the answer makes half a character U+FFFD, and that completes the stop string."""
    half = tokenizer.sp_model.piece_to_id("<0xE4>")
    answer = Request(tokenizer, Prompt([1, 13], frozenset({2})), 2, stop=["x\ufffd"])
    events = [answer.take(tokenizer.sp_model.piece_to_id("x"), [-1.0]), answer.take(half, [-2.0])]
    assert [(event.text, event.tokens, event.finish_reason) for event in events] == [("", [], None), ("", [], "stop")]
