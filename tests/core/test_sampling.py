"""Sampling against exact probabilities: what may be drawn, by a plain definition, and how often, by chi-squared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.sampling import NOT_FINITE, Batch, Draws, Sampling, keep_likeliest, logprobs_of

SCORES = torch.tensor([2.0, 1.5, 1.5, 0.5, 0.0, -1.0, -2.0, -6.0])
DRAWS = 20_000


def sample(scores: Tensor, settings: Sequence[Sampling], numbers: Sequence[list[int]]) -> Tensor:
    """A token for each row of scores (B, V), by `numbers`, the bits of one draw for each."""
    batch = Batch([(s, [], []) for s in settings], scores.shape[-1], scores.device)
    return batch.sample(scores[:, None], torch.tensor(numbers))[:, 0]


def firsts(settings: Sequence[Sampling], at: int = 0) -> list[list[int]]:
    """The `at`-th draw of each row."""
    return [Draws(s)(at, 1) for s in settings]


def exact(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """softmax(scores / temperature) in Python's own float64."""
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


def nucleus(probs: Sequence[float], top_p: float, top_k: int | None) -> set[int]:
    """The definition: likeliest first, until top_p is reached; of these the top_k first. The likeliest stays."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept, mass = 0, 0.0
    while kept == 0 or (kept < len(order) and mass < top_p):
        mass += probs[order[kept]]
        kept += 1
    return set(order[: min(kept, top_k or kept)])


def drawn(scores: Tensor, settings: Sampling, n: int = DRAWS) -> Tensor:
    """How often each token came, one row a draw, all from one series."""
    numbers = [[number] for number in Draws(settings)(0, n)]
    tokens = sample(scores.expand(n, -1), [settings] * n, numbers)
    return torch.bincount(tokens, minlength=len(scores))


def assert_as_often(counts: Tensor, probs: Sequence[float]) -> None:
    """Pearson's statistic below the 99.9 % quantile of chi-squared (by Wilson and Hilferty), and nothing impossible."""
    expected = [p * int(counts.sum()) for p in probs]
    assert all(count == 0 for count, e in zip(counts.tolist(), expected, strict=True) if e == 0)
    cells = [(count - e) ** 2 / e for count, e in zip(counts.tolist(), expected, strict=True) if e > 0]
    freedom = len(cells) - 1
    if freedom:
        quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
        assert sum(cells) < quantile


# --- greedy ------------------------------------------------------------------------------------------------------


def test_temperature_0_takes_the_likeliest() -> None:
    scores = torch.randn(50, 200)
    settings = Sampling(temperature=0)
    tokens = sample(scores, [settings] * 50, firsts([settings] * 50))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [row.index(max(row)) for row in scores.tolist()]


def test_greedy_and_sampled_rows_mix() -> None:
    settings = [Sampling(temperature=0 if i % 2 else 5.0, seed=i) for i in range(400)]
    tokens = sample(SCORES.expand(400, -1), settings, firsts(settings))
    assert set(tokens[1::2].tolist()) == {0}
    assert len(set(tokens[::2].tolist())) > 3


# --- how often ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_temperature_gives_the_exact_frequencies(temperature: float) -> None:
    counts = drawn(SCORES, Sampling(temperature, top_p=1.0))
    assert_as_often(counts, exact(SCORES.tolist(), temperature))


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, None), (0.5, None), (1.0, 3), (0.9, 4), (0.6, 6), (1.0, 100)])
def test_what_is_kept_shares_the_mass(top_p: float, top_k: int | None) -> None:
    probs = exact(SCORES.tolist(), 0.8)
    kept = nucleus(probs, top_p, top_k)
    mass = sum(probs[i] for i in kept)
    shares = [p / mass if i in kept else 0.0 for i, p in enumerate(probs)]
    assert_as_often(drawn(SCORES, Sampling(0.8, top_p, top_k)), shares)


def test_the_statistic_can_fail() -> None:
    """Frequencies of a temperature that is 5 % off are told from the right ones."""
    with pytest.raises(AssertionError):
        assert_as_often(drawn(SCORES, Sampling(1.0, top_p=1.0)), exact(SCORES.tolist(), 1.05))


def test_what_has_no_probability_is_never_drawn() -> None:
    """At both ends of the vocabulary, where a running sum begins and ends flat."""
    scores = torch.full((1000,), -math.inf)
    scores[[400, 600]] = 0.0
    assert set(drawn(scores, Sampling(1.0, top_p=1.0), 4000).nonzero().flatten().tolist()) == {400, 600}


@pytest.mark.parametrize(("draw", "token"), [(0.0, 2), (0.4999, 2), (0.5, 4), (1 - 2**-24, 4)])
def test_a_draw_on_a_border_belongs_to_the_next_token(draw: float, token: int) -> None:
    """Two tokens of half the mass each, others of none between and around them: draws are in [0, 1)."""
    scores = torch.full((1, 7), -math.inf)
    scores[0, [2, 4]] = 0.0
    bits = torch.tensor(draw).view(torch.int32).item()
    assert sample(scores, [Sampling(1.0, 1.0)], [[int(bits)]]).tolist() == [token]


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-39, 1e-300])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    """A score divided by it is no finite float32 any more."""
    counts = drawn(torch.tensor([-1.0, 3.0, 2.0, -5.0]), Sampling(temperature), 20)
    assert counts.tolist() == [0, 20, 0, 0]


# --- what may be drawn -------------------------------------------------------------------------------------------


def kept_by(probs: Tensor, settings: Sequence[Sampling]) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in cut_by(probs, settings)]


def cut_by(probs: Tensor, settings: Sequence[Sampling]) -> Tensor:
    top_p = torch.tensor([s.top_p for s in settings])[:, None, None]
    top_k = torch.tensor([s.top_k or probs.shape[-1] for s in settings])[:, None, None]
    return keep_likeliest(probs[:, None], top_p, top_k)[:, 0]


@pytest.mark.parametrize("top_k", [None, 1, 7])
def test_top_p_keeps_exactly_the_smallest_set(top_k: int | None) -> None:
    """Over many random rows, peaked and flat, that don't cross top_p within a rounding error."""
    rows = torch.softmax(torch.randn(600, 40) * torch.logspace(-1, 1, 600)[:, None], -1)
    settings = [Sampling(top_p=round(0.001 + 0.998 * i / 599, 4), top_k=top_k) for i in torch.randperm(600).tolist()]
    checked = 0
    for row, s, kept in zip(rows.tolist(), settings, kept_by(rows, settings), strict=True):
        running = torch.tensor(sorted(row, reverse=True), dtype=torch.float64).cumsum(0)
        if (running - s.top_p).abs().min() > 1e-6:
            assert kept == nucleus(row, s.top_p, top_k)
            checked += 1
    assert checked > 500


def test_top_p_stops_at_a_sum_that_reaches_it_exactly() -> None:
    probs = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    expected = {
        0.25: {1},
        0.5: {1},
        0.5625: {1, 3},
        0.75: {1, 3},
        0.8125: {0, 1, 3},
        0.875: {0, 1, 3},
        0.9375: {0, 1, 2, 3},
    }
    assert {p: kept_by(probs, [Sampling(top_p=p)])[0] for p in expected} == expected


def test_top_p_0_keeps_the_likeliest_and_1_every_token() -> None:
    probs = torch.softmax(torch.cat([torch.randn(1, 1000), torch.full((1, 5), -40.0)], 1), -1)
    assert kept_by(probs, [Sampling(top_p=0)]) == [{int(probs.argmax())}]
    assert kept_by(probs, [Sampling(top_p=1)]) == [set(range(1005))]


def test_what_is_kept_keeps_its_probability_and_place() -> None:
    probs = torch.softmax(torch.randn(3, 30), -1)
    cut = cut_by(probs, [Sampling(top_p=0.7), Sampling(top_p=1), Sampling(top_p=1, top_k=5)])
    assert torch.equal(cut[cut > 0], probs[cut > 0])
    assert torch.equal(cut[1], probs[1])
    assert (cut[2] > 0).sum() == 5


# --- batch mates -------------------------------------------------------------------------------------------------


def test_d14_a_rows_draws_do_not_depend_on_its_mates_or_their_settings() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 2.0, "top_p": 1.0, "top_k": 9},
    ]
    settings = [Sampling(**kinds[i % 4], seed=i) for i in range(16)]
    steps = torch.randn(6, 16, 500) * 3
    batched = torch.stack([sample(scores, settings, firsts(settings, i)) for i, scores in enumerate(steps)])
    for i, (scores, found) in enumerate(zip(steps, batched, strict=True)):
        assert torch.equal(sample(scores.flip(0), settings[::-1], firsts(settings[::-1], i)).flip(0), found)
    for row, own in enumerate(settings):
        alone = [int(sample(s[row : row + 1], [own], firsts([own], i))) for i, s in enumerate(steps)]
        assert alone == batched[:, row].tolist()


def test_a_seed_is_a_series_of_its_own() -> None:
    scores = torch.zeros(40, 1000)

    def numbers(seed: int) -> list[list[int]]:
        return [[number] for number in Draws(Sampling(seed=seed))(0, 40)]

    series = {seed: sample(scores, [Sampling()] * 40, numbers(seed)) for seed in (1, 2)}
    again = sample(scores, [Sampling()] * 40, numbers(1))
    assert torch.equal(series[1], again)
    assert not torch.equal(series[1], series[2])
    assert len(set(again.tolist())) > 30


# --- cost, errors, log-probabilities -----------------------------------------------------------------------------


def test_p9_the_vocabulary_is_sorted_only_to_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts = []
    for name in ("sort", "argsort", "topk", "msort"):
        for owner in (torch, Tensor):
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *a, _o=original, **k: (sorts.append(1), _o(*a, **k))[1])
    drawn(SCORES, Sampling(1.0, top_p=1.0), 3)
    drawn(SCORES, Sampling(0.0, top_p=0.5, top_k=2), 3)
    assert not sorts
    drawn(SCORES, Sampling(1.0, top_p=0.9), 3)
    drawn(SCORES, Sampling(1.0, top_p=1.0, top_k=2), 3)
    assert len(sorts) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1; give a number, at least 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": -0.1}, r"top_p is -0\.1; give a number, at least 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": 0}, "top_k is 0; give a whole number, at least 1"),
        ({"top_k": -5}, "top_k is -5"),
        ({"top_k": math.nan}, "top_k is nan"),
        ({"top_k": 1.5}, r"top_k is 1\.5"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"logit_bias": {-1: 1.0}}, "a token of logit_bias is -1"),
        ({"logit_bias": {7: "x"}}, "logit_bias of token 7 is 'x'"),
    ],
)
def test_d13_settings_that_cant_be_say_what_can(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_logprobs_are_those_of_the_whole_distribution() -> None:
    """Against float64; and that of a sure token is 0, never more."""
    scores = torch.randn(4, 7, 300) * 10
    tokens = torch.randint(300, (4, 7))
    found = logprobs_of(scores, tokens).squeeze(-1)
    expected = torch.log_softmax(scores.double(), -1).gather(-1, tokens[..., None])[..., 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    sure = torch.tensor([[90.0, 0.0], [0.0, 90.0]])
    assert logprobs_of(sure, torch.tensor([0, 1])).tolist() == [[0.0], [0.0]]


def test_alternatives_are_the_likeliest_with_their_ids() -> None:
    scores = torch.randn(2, 3, 40)
    found = logprobs_of(scores, torch.zeros(2, 3, dtype=torch.int64), 4)
    expected = torch.log_softmax(scores.double(), -1).sort(-1, descending=True)
    assert found.shape == (2, 3, 9)
    torch.testing.assert_close(found[..., 1:5].double(), expected.values[..., :4], rtol=0, atol=2e-5)
    assert torch.equal(found[..., 5:].long(), expected.indices[..., :4])


# --- min_p, penalties, biases, masks: by plain definitions ----------------------------------------------------------


@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.4, 1.0])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(min_p: float) -> None:
    probs = exact(SCORES.tolist(), 0.8)
    kept = [p if p >= min_p * max(probs) else 0.0 for p in probs]
    settings = Sampling(0.8, top_p=1.0, min_p=min_p)
    assert_as_often(drawn(SCORES, settings), [p / sum(kept) for p in kept])


def penalised(scores: list[float], s: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    """CTRL's penalty and OpenAI's two, number by number."""
    found = []
    for token, score in enumerate(scores):
        if token in prompt or token in answer:
            score = score / s.repetition_penalty if score > 0 else score * s.repetition_penalty
        score -= s.frequency_penalty * answer.count(token) + s.presence_penalty * (token in answer)
        found.append(score + (s.logit_bias or {}).get(token, 0.0))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 0.9},
        {"frequency_penalty": 0.6},
        {
            "repetition_penalty": 0.8,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.3,
            "logit_bias": {3: 1.5, 0: -2.0},
        },
        {"logit_bias": {7: 4.0}},
    ],
)
def test_penalties_and_biases_lower_what_the_definition_lowers(settings: dict[str, Any]) -> None:
    """Over an answer that grows: what was chosen counts from then on. Beside it a row without any."""
    own, plain = Sampling(0.0, **settings), Sampling(0.0)
    prompt, before = [0, 0, 5], [1, 2, 2]
    batch = Batch([(own, prompt, before), (plain, prompt, before)], 8, SCORES.device)
    answer, nothing = list(before), torch.zeros(2, 1, dtype=torch.int64)
    for step in torch.randn(12, 8):
        chosen = batch.sample((SCORES + step).expand(2, 1, -1), nothing)
        expected = penalised((SCORES + step).tolist(), own, prompt, answer)
        assert chosen.tolist() == [[expected.index(max(expected))], [int((SCORES + step).argmax())]]
        answer.append(int(chosen[0, 0]))
    again = Batch([(own, prompt, answer)], 8, SCORES.device).sample(SCORES.expand(1, 1, -1), nothing[:1])
    assert torch.equal(again, batch.sample(SCORES.expand(2, 1, -1), nothing)[:1])


def test_what_a_mask_forbids_is_never_drawn() -> None:
    settings = Sampling(1.5, top_p=1.0)
    mask = torch.tensor([False, True, False, True, False, False, True, False])
    n, numbers = 3000, torch.tensor([Draws(settings)(0, 3000)])
    batch = Batch([(settings, [], [])], 8, SCORES.device)
    tokens = batch.sample(SCORES.expand(1, n, -1), numbers, mask.expand(1, n, -1))
    probs = [p * m for p, m in zip(exact(SCORES.tolist(), 1.5), mask.tolist(), strict=True)]
    assert_as_often(torch.bincount(tokens[0], minlength=8), [p / sum(probs) for p in probs])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_that_are_not_finite_give_no_token(temperature: float, wrong: float, masked: bool) -> None:
    """Of that row and position alone; a mask doesn't hide them."""
    scores = torch.randn(2, 3, 8)
    scores[1, 2, 4] = wrong
    batch = Batch([(Sampling(temperature), [], [])] * 2, 8, scores.device)
    mask = torch.ones(2, 3, 8, dtype=torch.bool)
    mask[..., 4] = False
    found = batch.sample(scores, torch.full((2, 3), 1 << 29), mask if masked else None)
    assert (found == NOT_FINITE).nonzero().tolist() == [[1, 2]]
