"""Sampling: from logits to a token.

Temperature 0 takes the likeliest token. Otherwise logits are divided by the temperature, turned into probabilities, cut
to the `top_k` likeliest, to the smallest set that holds `top_p` of the mass (nucleus sampling, arXiv 1904.09751) and to
those with at least `min_p` of the likeliest one's probability (arXiv 2407.01082), and one number drawn uniformly picks
a token from what is left. Before all that, penalties lower the logits of tokens that were there already (repetition:
CTRL, arXiv 1909.05858, section 4.1; presence and frequency: OpenAI's API), and biases and masks change single ones.

The i-th token of an answer uses the i-th number of a series that follows from its seed. So what a row gets depends on
its seed and its logits, never on its batch mates, nor on how many tokens were guessed at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.arguments import Range, checked

NOT_FINITE = -1
"""In place of a token: a logit is NaN or infinite, so that there is nothing to choose from."""
_BLOCK = 32  # numbers that are drawn at once


RANGES: dict[str, Range] = {
    "temperature": (float, "at least", 0, 1e9),
    "top_p": (float, "at least", 0, 1),
    "min_p": (float, "at least", 0, 1),
    "repetition_penalty": (float, "at least", 1e-3, 1e3),
    "presence_penalty": (float, "at least", -1e3, 1e3),
    "frequency_penalty": (float, "at least", -1e3, 1e3),
    "seed": (int, "at least", -(2**63), 2**64 - 1),  # torch.Generator's
    "top_k": (int, "at least", 1, 2**31 - 1),
}
"""Of each number of Sampling."""
_TOKEN: Range = (int, "at least", 0, 2**31 - 1)
_BIAS: Range = (float, "at least", -1e9, 1e9)


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen. Raises ValueError for what can't be."""

    temperature: float = 0.6
    """0: the likeliest token (greedy)."""
    top_p: float = 0.9
    """The share of the mass that is kept: 1 keeps every token, 0 the likeliest."""
    top_k: int | None = None
    """How many tokens are kept; None keeps every one."""
    seed: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt and answer are divided by it, negative ones multiplied; 1: none."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the answer, once."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the answer as often as they stand there."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of single tokens, by their ids."""

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if (name, value) != ("top_k", None):
                object.__setattr__(self, name, checked(name, value, allowed))
        biases = {
            checked("a token of logit_bias", token, _TOKEN): checked(f"logit_bias of token {token}", bias, _BIAS)
            for token, bias in (self.logit_bias or {}).items()
        }
        object.__setattr__(self, "logit_bias", biases)

    @property
    def penalties(self) -> tuple[float, float, float]:
        return self.repetition_penalty, self.presence_penalty, self.frequency_penalty

    @property
    def has_penalties(self) -> bool:
        return self.penalties != (1, 0, 0)


class Draws:
    """One row's series of numbers between 0 and 1, the i-th for its i-th token. Drawn on the CPU, so that a seed gives
    the same on every device; as the bits of a float32, so that they travel there beside ids."""

    def __init__(self, sampling: Sampling) -> None:
        self._generator = None if sampling.temperature == 0 else torch.Generator("cpu").manual_seed(sampling.seed)
        self._bits: list[int] = []

    def __call__(self, first: int, n: int) -> list[int]:
        """Those of tokens `first` to `first` + n - 1; zeros for greedy sampling."""
        if self._generator is None:
            return [0] * n
        while len(self._bits) < first + n:
            drawn = torch.rand(_BLOCK, generator=self._generator, dtype=torch.float32, device="cpu")
            self._bits += drawn.view(torch.int32).tolist()
        return self._bits[first : first + n]


class Batch:
    """The settings of B rows as tensors. They are made when rows change, and used until they change again."""

    def __init__(
        self, rows: Sequence[tuple[Sampling, Sequence[int], Sequence[int]]], vocabulary: int, device: torch.device
    ) -> None:
        """Of each row the settings, and what penalties count: the prompt's tokens and the answer's so far."""
        settings = [sampling for sampling, _, _ in rows]
        drawn = [s for s in settings if s.temperature > 0]
        self._draws, self._cuts_min = bool(drawn), any(s.min_p for s in drawn)
        self._cuts = any(s.top_p < 1 or s.top_k for s in drawn)
        columns = ([s.temperature == 0, s.temperature or 1, s.top_p, s.top_k or vocabulary, s.min_p] for s in settings)
        numbers = [[*own, *s.penalties] for own, s in zip(columns, settings, strict=True)]
        table = torch.tensor(numbers, dtype=torch.float32, device="cpu").to(device)
        self._table = table.T[:, :, None, None]  # each column (B, 1, 1)
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None
        if any(s.has_penalties for s in settings):
            counts = torch.zeros(2, len(settings), 1, vocabulary, device="cpu")
            for row, (_, *both) in enumerate(rows):
                for which, tokens in enumerate(both):
                    ids = torch.tensor(tokens, dtype=torch.int64, device="cpu")
                    counts[which, row, 0].scatter_add_(0, ids, torch.ones(len(tokens), device="cpu"))
            self._in_prompt, self._counts = counts.to(device)
        if any(s.logit_bias for s in settings):
            bias = torch.zeros(len(settings), 1, vocabulary, device="cpu")
            for row, s in enumerate(settings):
                for token, value in (s.logit_bias or {}).items():
                    bias[row, 0, token] = value
            self._bias = bias.to(device)

    def sample(self, logits: Tensor, given: Tensor, allowed: Tensor | None = None) -> Tensor:
        """One token for each position of logits (B, T, V) float32, as if those before it were taken: (B, T) int64,
        NOT_FINITE where a logit is not. The last T columns of `given` are the bits of `Draws`; `allowed` (B, T,
        V) says which tokens may be.

        What penalties count are the first tokens; rows that have some take no others.
        """
        before = logits.amax(-1) if self._bias is not None or allowed is not None else None
        logits = self._adjusted(logits)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        largest, chosen = logits.max(-1)  # NaN where there is one
        if self._draws:
            drawn = self._drawn(logits - largest.unsqueeze(-1), given[:, -logits.shape[1] :].int().view(torch.float32))
            chosen = torch.where(self._table[0].squeeze(-1) > 0, chosen, drawn)
        found = largest if before is None else before
        chosen.masked_fill_(found - found != 0, NOT_FINITE)  # a third of isfinite's time
        if self._counts is not None:
            first = chosen[:, :1].clamp_min(0).unsqueeze(1)
            self._counts.scatter_add_(-1, first, torch.ones_like(first, dtype=self._counts.dtype))
        return chosen

    def _adjusted(self, logits: Tensor) -> Tensor:
        """After penalties and biases."""
        if self._counts is not None:
            repetition, presence, frequency = self._table[5:]
            seen = self._in_prompt + self._counts > 0
            lowered = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(seen, lowered, logits)
            logits = logits - frequency * self._counts - presence * (self._counts > 0)
        return logits if self._bias is None else logits + self._bias

    def _drawn(self, below: Tensor, draws: Tensor) -> Tensor:
        """Picks by `draws` (B, T) from logits (B, T, V) of which the largest is 0, so that dividing by a tiny
        temperature can't overflow."""
        _, temperature, top_p, top_k, min_p, *_ = self._table
        probs = torch.softmax(below / temperature.clamp_min(torch.finfo(torch.float32).tiny), dim=-1)
        if self._cuts:
            probs = keep_likeliest(probs, top_p, top_k)
        if self._cuts_min:
            probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
        cumulative = probs.cumsum(-1)
        # The first token at which the running sum passes the drawn share of the mass; one of probability 0 never is.
        picked = torch.searchsorted(cumulative, draws.unsqueeze(-1) * cumulative[..., -1:], right=True)
        return picked.squeeze(-1).clamp_(max=below.shape[-1] - 1)


def keep_likeliest(probs: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """probs (B, T, V) with 0 outside each row's nucleus and `top_k`, both (B, 1, 1). The order of the vocabulary stays,
    so that a row is sampled alike whether or not its batch mates made this cut necessary."""
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked  # the mass of those that are likelier
    rank = torch.arange(probs.shape[-1], device=probs.device)
    kept = ((before < top_p) | (top_p == 1) | (rank == 0)) & (rank < top_k)
    return torch.zeros_like(probs).scatter_(-1, order, ranked * kept)


def logprobs_of(logits: Tensor, tokens: Tensor, alternatives: int = 0) -> Tensor:
    """log p of each of `tokens` (...) under its logits (..., V), before temperature, penalties and cuts; then those of
    the likeliest `alternatives`, then their ids: (..., 1 + 2 * alternatives) float32, which has all ids below 2^24."""
    # On a CPU several times as quick as a logsumexp by itself.
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, tokens.unsqueeze(-1))
    if not alternatives:
        return own
    values, ids = logprobs.topk(alternatives, -1)
    return torch.cat((own, values, ids.to(own.dtype)), -1)
