"""Sampling: from scores to a token.

Temperature 0 takes the likeliest token. Otherwise the scores are divided by the temperature, turned into
probabilities, cut to the `top_k` likeliest and to the smallest set that holds `top_p` of the mass (nucleus sampling,
arXiv 1904.09751), and one number drawn uniformly picks a token from what is left. Every row draws from a generator of
its own, so what it gets depends on its seed and its scores, never on its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen. Raises ValueError for what can't be."""

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be between 0 (the likeliest) and 1 (every token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None to keep every token")

    def generator(self) -> torch.Generator:
        """A new source of randomness, on the CPU, so that a seed gives the same numbers on every device."""
        return torch.Generator().manual_seed(self.seed)


def sample(logits: Tensor, settings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row of logits (B, V) float32: (B,) int64. Draws one number from each row's generator."""
    greedy = logits.argmax(-1)
    if all(s.temperature == 0 for s in settings):
        return greedy
    device = logits.device
    temperature = torch.tensor([s.temperature or 1.0 for s in settings], device=device)[:, None]
    # The largest score is made 0 first, so that dividing by a tiny temperature can't overflow.
    above = logits - logits.amax(-1, keepdim=True)
    probs = torch.softmax(above / temperature.clamp_min(torch.finfo(torch.float32).tiny), dim=-1)
    if any(s.top_p < 1 or s.top_k for s in settings):
        probs = keep_likeliest(probs, settings)
    cumulative = probs.cumsum(-1)
    drawn = torch.stack([torch.rand((), generator=g) for g in generators]).to(device)[:, None]
    # The first token at which the running sum passes the drawn share of the mass; a token of probability 0 never is.
    picked = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True).squeeze(1)
    is_greedy = torch.tensor([s.temperature == 0 for s in settings], device=device)
    return torch.where(is_greedy, greedy, picked.clamp_(max=logits.shape[-1] - 1))


def keep_likeliest(probs: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """probs (B, V) with 0 outside each row's top_k and nucleus. The order of the vocabulary stays, so that a row is
    sampled alike whether or not its batch mates made this cut necessary."""
    vocabulary = probs.shape[-1]
    top_p = torch.tensor([s.top_p for s in settings], device=probs.device)[:, None]
    top_k = torch.tensor([s.top_k or vocabulary for s in settings], device=probs.device)[:, None]
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked  # the mass of those that are likelier
    rank = torch.arange(vocabulary, device=probs.device)
    kept = ((before < top_p) | (top_p == 1) | (rank == 0)) & (rank < top_k)
    return torch.zeros_like(probs).scatter_(-1, order, ranked * kept)


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of each token under its scores (..., V), before temperature and cuts: (...) float32."""
    # On a CPU several times as quick as a logsumexp by itself.
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
