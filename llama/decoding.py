"""The loop: what turns a model that scores the next token into answers that grow.

Prompts are read in one ragged pass (*prefill*: rows side by side, the longest first, in chunks, so that memory stays
linear in the prompt); then every row gets a token at a time (*decode*), or several where they could be guessed, and a
row that ends leaves. Between the two stands nothing but the scores of each row's next token. On several ranks all
compute the same scores; rank 0 samples, and the others follow its tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.lookup import Lookup, agreeing
from llama.model import Transformer
from llama.parallel import Ranks
from llama.prompts import FinishReason, Prompt
from llama.sampling import Sampling, logprobs_of, sample
from llama.tokenizer import Detokenizer, StopStrings, Tokenizer

Stop = str | int | Sequence[str | int]
"""What ends an answer besides its own end: strings, wherever they fall among the tokens, and token ids."""
STOPPED = -1  # in place of a token: rank 0 tells the others that nobody listens any more
NOTHING = -2  # behind a row's last token, where another row has more


@dataclass(frozen=True)
class Event:
    """What became certain of one row: its tokens, their text and log-probabilities, and at last why it ended."""

    row: int
    tokens: list[int]
    text: str
    logprobs: list[float]
    finish_reason: FinishReason | None = None


class Answer:
    """One row's answer as it grows. Tokens whose text could still turn out to begin a stop string are held back."""

    def __init__(
        self, row: int, prompt: Prompt, sampling: Sampling, limit: int, stop: Stop, tokenizer: Tokenizer, lookup: int
    ) -> None:
        given = [stop] if isinstance(stop, (str, int)) else stop
        self.lookup = Lookup(lookup)
        self.row, self.prompt, self.sampling, self.limit = row, prompt, sampling, limit
        self.stop_ids = prompt.stop | {s for s in given if isinstance(s, int)}
        self.stop_strings = StopStrings([s for s in given if isinstance(s, str)])
        self.generator = sampling.generator()
        self.tokens = list(prompt.tokens)
        """The prompt and all that was written so far."""
        self.finished = False
        self._text = Detokenizer(tokenizer, prompt.continues)
        self._held: list[tuple[int, float, int]] = []  # tokens, their log-probabilities, and where their text begins

    @property
    def written(self) -> int:
        return len(self.tokens) - len(self.prompt.tokens)

    def take(self, token: int, logprob: float) -> Event:
        """The next token; the event says what is certain with it."""
        if token in self.stop_ids:
            return self.end("stop")
        self.tokens.append(token)
        self._held.append((token, logprob, self.stop_strings.length))
        text = self.stop_strings.push(self._text.push(token))
        if self.stop_strings.found:
            return self._event(text, "stop")
        return self.end("length", text) if self.written == self.limit else self._event(text)

    def end(self, reason: FinishReason, text: str = "") -> Event:
        text += self.stop_strings.push(self._text.flush())
        text += self.stop_strings.flush()
        return self._event(text, "stop" if self.stop_strings.found else reason)

    def _event(self, text: str, reason: FinishReason | None = None) -> Event:
        """Lets go of the tokens whose text has begun before the end of what is certain; at the end, of all that are
        not part of a stop string."""
        self.finished = reason is not None
        certain = self.stop_strings.certain
        keep_all = self.finished and not self.stop_strings.found
        ready = [held for held in self._held if keep_all or held[2] < certain]
        self._held = self._held[len(ready) :]
        return Event(self.row, [t for t, _, _ in ready], text, [p for _, p, _ in ready], reason)


def prefill(
    model: Transformer, sequences: Sequence[list[int]], chunk: int, known: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Reads sequences, the longest first, into rows 0, 1, … of the cache, in chunks; `known` tokens of each stand
    there already. Yields each chunk's first position and its hidden states (b, C, dim): of all rows that reach
    it, where b falls as the shorter ones end. What pads a row is written behind its end, where nobody looks."""
    longest = len(sequences[0])
    padded = [tokens + [0] * (longest - len(tokens)) for tokens in sequences]
    tokens = torch.tensor(padded, device=model.norm.weight.device)
    for at in range(known, longest, chunk):
        rows = sum(len(s) > at for s in sequences)
        yield at, model.hidden(tokens[:rows, at : at + chunk], at, model.own_cache())


def last_logits(model: Transformer, sequences: Sequence[list[int]], chunk: int, known: int = 0) -> Tensor:
    """(B, V): the scores after each sequence. No other position's are computed."""
    last: dict[int, Tensor] = {}
    for at, h in prefill(model, sequences, chunk, known):
        for row in range(h.shape[0]):
            end = len(sequences[row]) - 1 - at
            if end < h.shape[1]:
                last[row] = h[row, end].clone()  # a view would keep the whole chunk
    return model.logits(torch.stack([last[row] for row in range(len(sequences))]))


def decode(model: Transformer, ranks: Ranks, active: list[Answer], logits: Tensor) -> Generator[Event, None, bool]:
    """Writes until all rows have ended; `active[i]` is in row i of the cache. False where rank 0 has stopped.

    Rank 0 hands its events out before it tells the others the tokens. So when its caller stops listening, the
    others are waiting for just that message, and it tells them to stop as well. Raises ValueError where another
    stream has taken the cache's rows meanwhile.
    """
    cache, leads = model.own_cache(), ranks.leads
    guesses: list[list[int]] = [[] for _ in active]
    logits = logits.unsqueeze(1)  # (B, T, V): after each row's last token, and after those that were guessed
    while active:
        if leads:
            chosen = choose(logits, guesses, active)
        else:
            chosen = ranks.broadcast(torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device))
        tokens = chosen.tolist()
        if tokens[0][0] == STOPPED:
            return False
        found = logprobs_of(logits, chosen.clamp_min(0)).tolist()
        events = [event for a, *taken in zip(active, tokens, found, strict=True) for event in _take(a, *taken)]
        try:
            yield from (event for event in events if event.tokens or event.text or event.finish_reason)
        except GeneratorExit:
            if leads:
                ranks.broadcast(chosen.fill_(STOPPED))
            raise
        if leads:
            ranks.broadcast(chosen)
        if cache.owner is not active:
            raise ValueError(
                "another stream began on this model before this one had ended, and took the cache's rows: finish or "
                "close a stream before the next, or build a second Llama"
            )
        for a, guess, row in zip(active, guesses, tokens, strict=True):
            a.lookup.learn(len(guess), sum(token != NOTHING for token in row) - 1)
        _drop_finished(active, cache)
        if active:
            guesses = [a.lookup.guess(a.tokens) for a in active]
            # What pads the shorter guesses needs a slot too.
            longest = min(max(map(len, guesses)), cache.slots - max(len(a.tokens) for a in active))
            guesses = [guess[:longest] for guess in guesses]
            pairs = zip(active, guesses, strict=True)
            rows = [a.tokens[-1:] + guess + [0] * (longest - len(guess)) for a, guess in pairs]
            starts = [len(a.tokens) - 1 for a in active]
            logits = model.logits(model.hidden(torch.tensor(rows, device=logits.device), starts, cache))
    return True


def choose(logits: Tensor, guesses: Sequence[list[int]], active: Sequence[Answer]) -> Tensor:
    """Samples from logits (B, T, V) a token for each row, and as long as it is the one guessed, another: (B, T) ids,
    NOTHING behind a row's last."""
    settings, generators = [a.sampling for a in active], [a.generator for a in active]
    if logits.shape[1] > 1 and all(s.temperature == 0 for s in settings):  # nothing is drawn: all at once
        chosen = logits.argmax(-1)
        for row, tokens, guess in zip(chosen, chosen.tolist(), guesses, strict=True):
            row[agreeing(guess, tokens) + 1 :] = NOTHING
        return chosen
    chosen = torch.full(logits.shape[:2], NOTHING, device=logits.device)
    chosen[:, 0] = sample(logits[:, 0], settings, generators)
    rows = list(range(len(active)))
    for t in range(1, logits.shape[1]):
        right = chosen[:, t - 1].tolist()
        rows = [i for i in rows if guesses[i][t - 1 : t] == [right[i]]]
        if not rows:
            break
        chosen[rows, t] = sample(logits[rows, t], [settings[i] for i in rows], [generators[i] for i in rows])
    return chosen


def _take(answer: Answer, tokens: list[int], logprobs: list[float]) -> Iterator[Event]:
    for token, logprob in zip(tokens, logprobs, strict=True):
        if token == NOTHING or answer.finished:
            return
        yield answer.take(token, logprob)


def _drop_finished(active: list[Answer], cache: KVCache) -> None:
    """Takes out the rows that have ended; the last row takes the place of each, in the list and in the cache."""
    for row in reversed(range(len(active))):
        if active[row].finished:
            last = active.pop()
            if row < len(active):
                cache.copy_row_(len(active), row, len(last.tokens) - 1)
                active[row] = last
