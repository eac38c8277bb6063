"""Generation on several ranks: the same text as in one process, and ranks that end together whatever happens to one."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.parallel import start
from parallel.ranks import on_ranks

PROMPTS = [[1, 300, 301, 302, 303], [1, 310, 311], [1, 320, 321, 322, 323, 324, 325]]  # more than rows: two turns


def build(init_method: str, folder: Path) -> Llama:
    start(init_method=init_method, timeout=20)
    return Llama.build(folder, max_seq_len=48, max_batch_size=2, timeout=20)


def write(llama: Llama) -> tuple[Any, Any]:
    greedy = llama.generate(PROMPTS, 12, temperature=0, logprobs=True, echo=True)
    drawn, _ = llama.generate(PROMPTS, 12, temperature=1.0, top_p=0.95, seed=[5, 6, 7])
    return greedy, drawn


def check_write(init_method: str, folder: Path) -> tuple[Any, Any]:
    return write(build(init_method, folder))


@pytest.mark.parametrize("world_size", [2, 4])
def test_text_is_the_same_on_any_number_of_ranks(world_size: int, tiny_checkpoint: Path) -> None:
    (tokens, logprobs), drawn = write(Llama.build(tiny_checkpoint, max_seq_len=48, max_batch_size=2))
    assert logprobs is not None
    for (on_rank, their_logprobs), their_drawn in on_ranks(check_write, world_size, tiny_checkpoint):
        assert on_rank == tokens
        assert their_drawn == drawn
        for theirs, ours in zip(their_logprobs, logprobs, strict=True):
            assert theirs[0] is None
            assert theirs[1:] == pytest.approx(ours[1:], abs=1e-4)


def check_close_early(init_method: str, folder: Path) -> tuple[int, Any]:
    """Rank 0's caller stops listening after two events; the others just listen."""
    llama = build(init_method, folder)
    stream = llama.stream(PROMPTS, 12, temperature=0)
    seen = 0
    for _ in stream:
        seen += 1
        if llama.ranks.leads and seen == 2:
            break
    stream.close()  # type: ignore[attr-defined]
    return seen, write(llama)


def test_a_stream_that_rank_0_leaves_ends_on_all_ranks(tiny_checkpoint: Path) -> None:
    expected = write(Llama.build(tiny_checkpoint, max_seq_len=48, max_batch_size=2))
    (seen, after), (others_seen, others_after) = on_ranks(check_close_early, 2, tiny_checkpoint)
    assert seen == 2
    assert others_seen <= 2
    assert after[1] == others_after[1] == expected[1]


def check_everything_that_happens_to_a_loop(init_method: str, folder: Path) -> list[Any]:
    """One after the other, each followed by a right answer: in one pair of processes, since a start costs seconds."""
    start(init_method=init_method, timeout=4)
    llama = Llama.build(folder, max_seq_len=48, max_batch_size=2, timeout=4)
    found: list[Any] = []

    def right() -> bool:
        """Still the text of before, and the same on all ranks."""
        return llama.generate(PROMPTS, 12, temperature=0)[0] == first

    first = llama.generate(PROMPTS, 12, temperature=0)[0]
    # A listener that pauses for longer than ranks wait for each other.
    tokens = []
    for n, event in enumerate(llama.stream(PROMPTS[:1], 12, temperature=0)):
        tokens += event.tokens
        if n == 2 and llama.ranks.leads:
            time.sleep(6)
    found.append(tokens == first[0] and right())
    # Ctrl-C between two events: rank 0's program catches it, and goes on.
    stream = llama.stream(PROMPTS, 12, temperature=0)
    try:
        for n, _ in enumerate(stream):
            if n == 4 and llama.ranks.leads:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    stream.close()  # type: ignore[attr-defined]
    found.append(llama.ranks.broadcast_object("words") == "words" and right())
    # Ctrl-C in the middle of a step waits for its end.
    if llama.ranks.leads:
        hidden = llama.model.hidden
        llama.model.hidden = lambda *a: (os.kill(os.getpid(), signal.SIGINT), hidden(*a))[1]  # type: ignore[method-assign]
    stream = llama.stream(PROMPTS[:1], 12, temperature=0)
    try:
        for _ in stream:
            pass
        found.append("ended")
    except KeyboardInterrupt:
        found.append("interrupted")
    finally:
        if llama.ranks.leads:
            llama.model.hidden = hidden  # type: ignore[method-assign]
    stream.close()  # type: ignore[attr-defined]
    found.append(right())
    # Each rank asks for something else.
    for own in (
        lambda: llama.generate([PROMPTS[llama.ranks.rank]], 5, temperature=0),
        lambda: llama.generate(PROMPTS[:1], 5, temperature=0.5 * llama.ranks.rank),
        lambda: llama.generate(PROMPTS[: 1 + llama.ranks.rank], 5, temperature=0, seed=1),
    ):
        try:
            own()
            found.append("answered")
        except ValueError as error:
            found.append(str(error))
    return found


def test_whatever_happens_on_rank_0_the_others_follow(tiny_checkpoint: Path) -> None:
    for rank, found in enumerate(on_ranks(check_everything_that_happens_to_a_loop, 2, tiny_checkpoint, limit=90)):
        slow_listener, between, within, after, *different = found
        assert (slow_listener, between, after) == (True, True, True)
        assert within == ("interrupted" if rank == 0 else "ended")
        assert all("ranks were asked for different things" in words for words in different), different


def check_threads_and_followers(init_method: str, folder: Path) -> list[Any]:
    """Threads on both ranks, in whatever order, with calls of all kinds, and draws without a seed; then rank 0 alone
    has requests, and the other follows."""
    llama = build(init_method, folder)
    expected = [llama.generate([prompt], 12, temperature=0)[0][0] for prompt in PROMPTS]
    llama.loop.capacity = 1  # of rank 0; the others have what it begins
    found: dict[int, list[int]] = {}
    drawn: dict[int, list[list[int]]] = {}

    def work(which: int) -> None:
        for _ in range(5):
            drawn[which] = llama.generate([PROMPTS[which]] * 2, 6, temperature=1.0)[0]
            found[which] = llama.generate([PROMPTS[which]], 12, temperature=0)[0][0]
            llama.score([PROMPTS[which]] * 2)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads[:: 1 if llama.ranks.leads else -1]:
        thread.start()
    for thread in threads:
        thread.join(30)
    same = llama.ranks.broadcast_object(sorted(drawn.items())) == sorted(drawn.items())
    return [found == dict(enumerate(expected)), same, llama.ranks.broadcast_object("ended")]


def test_threads_on_ranks_find_each_other(tiny_checkpoint: Path) -> None:
    assert on_ranks(check_threads_and_followers, 2, tiny_checkpoint) == [[True, True, "ended"]] * 2


def check_an_error_in_a_step(init_method: str, folder: Path) -> str:
    start(init_method=init_method, timeout=3)
    llama = Llama.build(folder, max_seq_len=48, max_batch_size=2, timeout=3)
    llama.generate(PROMPTS, 2)
    if llama.ranks.leads:
        llama.model.hidden = lambda *_: 1 // 0  # type: ignore[method-assign]
    try:
        llama.generate(PROMPTS, 2)
    except Exception as error:
        return type(error).__name__
    return "no error"


def test_the_rank_that_fails_says_why_and_not_that_the_others_are_lost(tiny_checkpoint: Path) -> None:
    assert on_ranks(check_an_error_in_a_step, 2, tiny_checkpoint) == ["ZeroDivisionError", "LostRank"]


def check_a_rank_without_its_folder(init_method: str, folder: Path) -> str:
    with pytest.raises(ValueError, match="there is no folder") as raised:
        build(init_method, folder / "elsewhere" if os.environ["RANK"] == "1" else folder)
    return str(raised.value)


def test_what_one_rank_cannot_load_ends_all_with_its_words(tiny_checkpoint: Path) -> None:
    words = on_ranks(check_a_rank_without_its_folder, 2, tiny_checkpoint)
    assert words[0] == words[1]
    assert "elsewhere" in words[0]


def check_waiting_for_a_person(init_method: str, folder: Path) -> Any:
    """Longer than a collective may take: the others wait for rank 0's words as long as it takes."""
    ranks = start(init_method=init_method, timeout=1)
    if ranks.leads:
        time.sleep(3)
    return ranks.broadcast_object("words" if ranks.leads else None)


def test_ranks_wait_for_a_person_beyond_the_timeout(tiny_checkpoint: Path) -> None:
    assert on_ranks(check_waiting_for_a_person, 2, tiny_checkpoint) == ["words", "words"]
