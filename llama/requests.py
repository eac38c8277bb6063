"""Requests: what is asked of the loop, and the answer as it grows.

A request is a prompt, how its tokens are chosen, and what ends it. The loop hands it one token after the other; it
turns them into text, looks for stop strings, and puts what is certain into its inbox as an `Event`. Tokens whose text
could still be the beginning of a stop string are held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from llama.errors import NotFinite
from llama.lookup import Lookup
from llama.prompts import FinishReason, Prompt
from llama.sampling import NOT_FINITE, Draws, Sampling
from llama.tokenizer import Detokenizer, StopStrings, Tokenizer

Allowed = Callable[[list[int]], Tensor | None]
"""The answer's tokens so far, to a mask (V,) of those that may come next; None allows all."""


@dataclass(frozen=True)
class Event:
    """What became certain of one answer: tokens and their text, and at last why it ended."""

    row: int
    """The caller's number for the request."""
    tokens: list[int]
    text: str
    logprobs: list[float]
    """Of each token, where they are asked for."""
    finish_reason: FinishReason | None = None
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of each token, the likeliest ids and their log-probabilities, where they are asked for."""
    error: Exception | None = None


class Request:
    """A prompt and its answer, from the queue to the last event."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, limit: int, sampling: Sampling | None = None,
        stop: Sequence[str | int] = (), logprobs: int | None = None, score: bool = False, reuse: bool = True,
        lookup: int = 0, *, row: int = 0, allowed: Allowed | None = None, drawn: bool = False,
    ) -> None:  # fmt: skip
        """`limit` is the most tokens to write, and `stop` what ends the answer besides `prompt.stop`. `logprobs` asks
        for each token's log-probability and for so many alternatives; `score` for those of the prompt's tokens.
        `reuse` takes over what the cache holds of the same beginning. Up to `lookup` tokens are proposed at a time.
        `row` is the caller's number for it. `allowed` restricts what may come next (on rank 0). `drawn` says that the
        seed is nobody's wish, so that ranks needn't agree on it."""
        sampling = sampling or Sampling()
        wanted = replace(sampling, seed=0) if drawn or not sampling.temperature else sampling
        self.asked: tuple[Any, ...] = (prompt, limit, wanted, tuple(stop), logprobs, score, reuse, lookup)
        """What all ranks must agree on."""
        self.prompt, self.limit, self.sampling, self.reused, self.seat = prompt, limit, sampling, -1, -1
        """`reused`: how many of the prompt's tokens its row held already; `seat`: how many requests had been given rows
        before it. -1 until it has a row."""
        self.logprobs, self.score, self.reuse, self.row, self.allowed = logprobs, score, reuse, row, allowed
        self.lookup = Lookup(0 if sampling.has_penalties else lookup)
        self.stop_ids = prompt.stop | {s for s in stop if isinstance(s, int)}
        self.stop_strings = StopStrings([s for s in stop if isinstance(s, str)])
        self.draws = Draws(sampling)
        self.tokens = list(prompt.tokens)
        """The prompt and all that was written so far."""
        self.held: list[int] = []
        """The cache's own list of the tokens that its row holds."""
        self.prompt_logprobs: list[float | None] = [None]
        self.inbox: deque[Event | None] = deque()
        """Its events as they come; None where it was taken out before its end."""
        self.leaving = self.gone = False
        """The caller wants it out; it has ended, or was taken out."""
        self._text = Detokenizer(tokenizer, prompt.continues)
        self._held_back: list[tuple[int, list[float], int]] = []  # tokens, their numbers, and where their text begins

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt.tokens) :]

    @property
    def written(self) -> int:
        return len(self.tokens) - len(self.prompt.tokens)

    @property
    def unread(self) -> int:
        return len(self.tokens) - len(self.held)

    def take(self, token: int, numbers: list[float]) -> Event:
        """The next token, with what `logprobs_of` says of it; the event says what is certain with it."""
        if token == NOT_FINITE:
            return self.end("error", error=NotFinite())
        if token in self.stop_ids:
            return self.end("stop")
        self.tokens.append(token)
        self._held_back.append((token, numbers, self.stop_strings.length))
        text = self.stop_strings.push(self._text.push(token))
        if self.stop_strings.found:
            return self._event(text, "stop")
        return self.end("length", text) if self.written == self.limit else self._event(text)

    def end(self, reason: FinishReason, text: str = "", error: Exception | None = None) -> Event:
        text += self.stop_strings.push(self._text.flush())
        text += self.stop_strings.flush()
        return self._event(text, "stop" if self.stop_strings.found else reason, error)

    def _event(self, text: str, reason: FinishReason | None = None, error: Exception | None = None) -> Event:
        """Lets go of the tokens whose text has begun before the end of what is certain; at the end, of all that are
        not part of a stop string."""
        self.gone = reason is not None
        certain = len(self._held_back) if self.gone and not self.stop_strings.found else 0
        certain = certain or sum(begin < self.stop_strings.certain for _, _, begin in self._held_back)
        ready, self._held_back = self._held_back[:certain], self._held_back[certain:]
        numbers, k = [n for _, n, _ in ready if n], self.logprobs or 0
        top = [[(int(i), p) for p, i in zip(n[1 : 1 + k], n[1 + len(n) // 2 :], strict=False)] for n in numbers if k]
        event = Event(self.row, [t for t, _, _ in ready], text, [n[0] for n in numbers], reason, top, error)
        if event.tokens or event.text or reason:
            self.inbox.append(event)
        return event
