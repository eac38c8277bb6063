"""Prompt lookup changes how many tokens are read at once, and nothing else: greedy and sampled texts stay the same."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures_text import ARGS, ROWS, SLOTS, WEIGHTS
from llama.generation import Llama
from llama.lookup import CONTEXT, LONGEST_PAUSE, NGRAM, PLACES, Lookup
from llama.model import Transformer
from llama.prompts import Prompt
from llama.sampling import Batch, Draws, Sampling
from llama.tokenizer import Tokenizer


def prompts_of(rng: random.Random, words: int, number: int) -> list[list[int]]:
    """Some that repeat themselves, wholly or nearly, and some that don't."""
    found = []
    for _ in range(number):
        part = [rng.randrange(3, words) for _ in range(rng.randint(1, 8))]
        tokens = part * rng.randint(1, 4)
        for _ in range(rng.randint(0, 2)):
            tokens[rng.randrange(len(tokens))] = rng.randrange(3, words)
        found.append(tokens[:40])
    return found


def answers(llama: Llama, lookup: int, prompts: list[list[int]], **options: Any) -> Any:
    llama.lookup = lookup
    settings: dict[str, Any] = {"max_gen_len": 24, "temperature": 0.0, "stop": (), "seed": 1, **options}
    limits = settings.pop("max_gen_len"), settings.pop("temperature"), 1.0
    return llama._collect([Prompt(p, frozenset({2})) for p in prompts], *limits, True, False, settings)[0]


def same(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer) -> Llama:
    """A model whose layers say little beside the last token, and that knows few words: its greedy text soon goes in
    circles, and still tells a wrong cache from a right one."""
    weights = {name: w * 0.15 if ".wo." in name or ".w2." in name else w for name, w in WEIGHTS.items()}
    weights["output.weight"] = weights["output.weight"].clone()
    weights["output.weight"][16:] = 0
    model = Transformer(replace(ARGS, max_seq_len=SLOTS, max_batch_size=ROWS))
    model.load_state_dict(weights)
    return Llama(model.requires_grad_(False), tokenizer)


class Counting:
    """Counts the model's decode steps, and how many tokens they read at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.widths: list[int] = []
        hidden = Transformer.hidden

        def count(model: Transformer, tokens: Tensor, start_pos: Any = None, cache: Any = None) -> Tensor:
            if start_pos.given is not None:
                self.widths.append(tokens.shape[1])
            return hidden(model, tokens, start_pos, cache)

        monkeypatch.setattr(Transformer, "hidden", count)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("lookup", [1, 3, 8])
def test_texts_are_those_without(llama: Llama, lookup: int, temperature: float) -> None:
    rng = random.Random(lookup)
    words = llama.model.args.vocab_size
    for _ in range(15):
        prompts = prompts_of(rng, words, rng.randint(1, llama.model.args.max_batch_size))
        without = answers(llama, 0, prompts, temperature=temperature)
        same(answers(llama, lookup, prompts, temperature=temperature), without)


@pytest.mark.slow
def test_a_thousand_prompts_have_the_texts_that_they_have_without(llama: Llama) -> None:
    prompts = prompts_of(random.Random(1), llama.tokenizer.n_words, 1000)
    expected = answers(llama, 0, prompts)
    same(answers(llama, 5, prompts), expected)
    assert sum(len(a.tokens) for a in expected) > 10_000


def test_guesses_are_made_and_come_true(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(random.Random(0), llama.model.args.vocab_size, 4)
    counting = Counting(monkeypatch)
    for prompt in prompts:
        answers(llama, 0, [prompt], max_gen_len=80)
    without = len(counting.widths)
    assert set(counting.widths) == {1}
    counting.widths.clear()
    for prompt in prompts:
        answers(llama, 8, [prompt], max_gen_len=80)
    assert max(counting.widths) > 4
    assert len(counting.widths) < without * 0.8


def test_the_caches_last_slot_is_used_and_none_behind_it(llama: Llama) -> None:
    """Rows of different lengths, so that what pads a short guess comes close to the end as well."""
    slots = llama.model.args.max_seq_len
    prompts = [([5, 6, 7, 8] * slots)[: slots - left] for left in (2, 3, 9)]
    without = answers(llama, 0, prompts, max_gen_len=None)
    assert [len(result.tokens) for result in without] == [2, 3, 9]
    same(answers(llama, 8, prompts, max_gen_len=None), without)


def test_stops_are_found_within_what_was_guessed(llama: Llama) -> None:
    prompt = [5, 6, 7, 8] * 6
    (whole,) = answers(llama, 0, [prompt])
    for at in range(1, len(whole.tokens)):
        stop = whole.tokens[at]
        same(answers(llama, 8, [prompt], stop=stop), answers(llama, 0, [prompt], stop=stop))
    for length in (1, 3):
        for at in range(len(whole.text) - length):
            text = whole.text[at : at + length]
            same(answers(llama, 8, [prompt], stop=text), answers(llama, 0, [prompt], stop=text))


def test_a_conversation_goes_on_from_what_was_read(llama: Llama) -> None:
    """`reuse` counts on the cache holding all tokens but the last."""

    def talk(lookup: int) -> list[list[int]]:
        llama.lookup, tokens, said = lookup, [5, 6, 7] * 4, []
        for _ in range(3):
            events = llama.stream([tokens], 7, 0.0)
            said.append([token for event in events for token in event.tokens])
            tokens = [*tokens, *said[-1], 9, 5, 6]
        return said

    assert talk(8) == talk(0)


def test_sampling_keeps_its_distribution() -> None:
    """Chi-squared of two tokens in a row, of which the first was guessed: five cells, p = 0.001."""
    logits = torch.tensor([[[0.0, 1.0, 2.0], [1.5, 0.0, 0.5]]])
    first, second = torch.softmax(logits[0], -1).tolist()
    n, settings = 20_000, Sampling(1.0, 1.0)
    numbers = torch.tensor(Draws(settings)(0, 2 * n)).view(n, 2)
    chosen = Batch([(settings, [], [])] * n, 3, logits.device).sample(logits.expand(n, -1, -1), numbers)
    counts = Counter((a, b) if a == 2 else (a,) for a, b in chosen.tolist())  # another first token ends the guess
    expected: dict[tuple[int, ...], float] = {(0,): first[0], (1,): first[1]}
    expected |= {(2, token): first[2] * p for token, p in enumerate(second)}
    assert set(counts) == set(expected)
    assert sum((counts[cell] - n * p) ** 2 / (n * p) for cell, p in expected.items()) < 18.47  # 4 degrees of freedom


# --- the guesses -----------------------------------------------------------------------------------------------------


def test_guess_is_what_followed_where_most_before_agrees_and_as_long() -> None:
    tokens = [7, 1, 2, 3, 5, 6, 8, 8, 9, 2, 3, 4, 7, 1, 2, 3]
    assert Lookup(9).guess(tokens) == [5, 6, 8, 8]
    assert Lookup(3).guess(tokens) == [5, 6, 8]
    assert Lookup(0).guess(tokens) == []
    assert Lookup(9).guess(tokens[:-1]) == [3, 5, 6]
    assert Lookup(9).guess([*tokens, 5, 1]) == []
    assert Lookup(9).guess([2, 3, 4, 1, 2, 3, 5, 0, 2, 3]) == [5, 0]  # of equals the last


def test_a_row_is_read_once_however_it_grows() -> None:
    lookup, tokens, rng = Lookup(3), [], random.Random(0)
    for _ in range(300):
        tokens.append(rng.randrange(4))
        found = lookup.guess(list(tokens))
        key = tokens[-NGRAM:]
        places = [i for i in range(NGRAM, len(tokens)) if tokens[i - NGRAM : i] == key][-PLACES:]

        def agreeing(place: int, tokens: list[int] = tokens) -> int:
            lengths = range(1, min(place, CONTEXT) + 1)
            return max(n for n in lengths if tokens[place - n : place] == tokens[len(tokens) - n :])

        expected = list(tokens)
        if places:
            best = max(reversed(places), key=agreeing)  # the last of them
            for i in range(min(3, agreeing(best))):
                expected.append(expected[best + i])
        assert found == expected[len(tokens) :]


def test_what_goes_in_circles_is_guessed_to_go_on() -> None:
    assert Lookup(7).guess([9, 1, 2, 3, 1, 2, 3, 1]) == [2, 3, 1, 2]
    assert Lookup(7).guess([9, 1, 1, 1, 1, 1, 1, 1, 1]) == [1] * 7


def test_short_texts_have_no_guess() -> None:
    for length in range(NGRAM + 1):
        assert Lookup(3).guess([1] * length) == []
    assert Lookup(3).guess([1] * (NGRAM + 1)) == [1, 1]


def test_wrong_guesses_become_rare_until_one_is_right() -> None:
    lookup, tokens = Lookup(8), [1] * 50
    guessed = 0
    for _ in range(200):
        guess = lookup.guess(tokens)
        guessed += bool(guess)
        lookup.learn(len(guess), 0)
    assert guessed <= 5 + 200 / LONGEST_PAUSE
    while not (guess := lookup.guess(tokens)):
        pass
    lookup.learn(len(guess), 1)
    assert lookup.guess(tokens) == [1] * 8


def test_a_negative_lookup_is_refused() -> None:
    with pytest.raises(ValueError, match="lookup is -1; give how many"):
        Lookup(-1)
