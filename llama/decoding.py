"""The loop: what turns a model that scores the next token into answers that grow, many at a time.

A request joins at any moment and leaves at any moment. In between it goes this way:

1. `join` puts it into a queue.
2. A free row of the cache takes it, with the longest beginning that any row already holds (`_place`).
3. Its prompt is read in pieces (*prefill*): at most `chunk` tokens a step, so that nobody else waits for long.
4. The logits after its last token give its first token, chosen on rank 0 and announced to the others (`_choose`).
5. From then on each step reads the last token of every such row together and chooses the next (*decode*); where
   tokens could be guessed, several at once.
6. What is certain of the answer goes to the request's inbox as an `Event`.
7. It ends: by a token, a stop string, its limit, an error, or because nobody listens any more (`leave`).
8. Its row becomes free. What the row holds stays known, until another request needs the place.

How far a row has read is not stored twice: it is what the cache says the row holds. So whoever writes into the cache
between two steps does no harm; what is lost is read again. Active rows are rows 0 to n - 1 of the cache, those that
decode before those that still read.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from llama.lookup import Lookup, agreeing
from llama.model import Transformer
from llama.parallel import LostRank, Ranks
from llama.prompts import FinishReason, Prompt
from llama.sampling import NOT_FINITE, Batch, Draws, Sampling, logprobs_of
from llama.tokenizer import Detokenizer, StopStrings, Tokenizer

Allowed = Callable[[list[int]], Tensor | None]
"""The answer's tokens so far, to a mask (V,) of those that may come next; None allows all."""
PASS = 64
"""Tokens of padding that cost about as much as a pass of their own; more are not read side by side (docs/LOG.md)."""
FEWEST = 16
"""Tokens that are worth to be taken over: with none, attention needs no mask."""
SHARED = 32
"""Tokens that a request would have in common with a prompt that is being read, so that it waits for them."""


class QueueFull(ValueError):
    """As many requests wait as may wait."""


class NotFinite(ValueError):
    """A logit is NaN or infinite: nothing can be chosen."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are NaN or infinite: its weights are damaged, or overflow in this dtype; verify the "
            "files (codellama check), or choose another --dtype (bfloat16 or float32)"
        )


@dataclass(frozen=True)
class Event:
    """What became certain of one row: its tokens and their text, and at last why it ended."""

    row: int
    tokens: list[int]
    text: str
    logprobs: list[float]
    """Of each token, where they are asked for."""
    finish_reason: FinishReason | None = None
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of each token, the likeliest ids and their log-probabilities, where they are asked for."""
    error: Exception | None = None


class Request:
    """What is asked for, and its answer as it grows. Tokens whose text could begin a stop string are held back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        limit: int,
        sampling: Sampling | None = None,
        stop: Sequence[str | int] = (),
        logprobs: int | None = None,
        score: bool = False,
        reuse: bool = True,
        lookup: int = 0,
        *,
        row: int = 0,
        allowed: Allowed | None = None,
    ) -> None:
        """`limit` is the most tokens to write, and `stop` what ends the answer besides `prompt.stop`. `logprobs` asks
        for each token's log-probability and for so many alternatives; `score` for those of the prompt's tokens.
        `reuse` takes over what the cache holds of the same beginning. `lookup` tokens are guessed at a time. `row` is
        the caller's number for it, which its events bear. `allowed` restricts what may come next (on rank 0)."""
        sampling = sampling or Sampling()
        drawn = sampling if sampling.temperature else replace(sampling, seed=0)
        self.asked: tuple[Any, ...] = (prompt, limit, drawn, tuple(stop), logprobs, score, reuse, lookup)
        """What all ranks must agree on."""
        self.prompt, self.limit, self.sampling = prompt, limit, sampling
        self.logprobs, self.score, self.reuse, self.row, self.allowed = logprobs, score, reuse, row, allowed
        self.lookup = Lookup(0 if sampling.has_penalties else lookup)
        self.stop_ids = prompt.stop | {s for s in stop if isinstance(s, int)}
        self.stop_strings = StopStrings([s for s in stop if isinstance(s, str)])
        self.draws = Draws(sampling)
        self.tokens = list(prompt.tokens)
        """The prompt and all that was written so far."""
        self.held: list[int] = []
        """The cache's own list of what the row holds."""
        self.prompt_logprobs: list[float | None] = [None]
        self.inbox: deque[Event | None] = deque()
        """Its events as they come; None where it was taken out before its end."""
        self.leaving = False
        self.gone = False
        """It has ended, or was taken out."""
        self._text = Detokenizer(tokenizer, prompt.continues)
        self._held_back: list[tuple[int, list[float], int]] = []  # tokens, their numbers, and where their text begins

    @property
    def written(self) -> int:
        return len(self.tokens) - len(self.prompt.tokens)

    @property
    def unread(self) -> int:
        return len(self.tokens) - len(self.held)

    def take(self, token: int, numbers: list[float]) -> Event:
        """The next token, with what `logprobs_of` says of it; the event says what is certain with it."""
        if token == NOT_FINITE:
            return self.fail(NotFinite())
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

    def fail(self, error: Exception) -> Event:
        return self.end("error", error=error)

    def _event(self, text: str, reason: FinishReason | None = None, error: Exception | None = None) -> Event:
        """Lets go of the tokens whose text has begun before the end of what is certain; at the end, of all that are
        not part of a stop string."""
        self.gone = reason is not None
        certain = self.stop_strings.certain
        keep_all = self.gone and not self.stop_strings.found
        ready = [held for held in self._held_back if keep_all or held[2] < certain]
        self._held_back = self._held_back[len(ready) :]
        numbers, k = [n for _, n, _ in ready if n], self.logprobs or 0
        top = [[(int(i), p) for p, i in zip(n[1 : 1 + k], n[1 + len(n) // 2 :], strict=False)] for n in numbers if k]
        event = Event(self.row, [t for t, _, _ in ready], text, [n[0] for n in numbers], reason, top, error)
        if event.tokens or event.text or reason:
            self.inbox.append(event)
        return event


class Loop:
    """Owns a model's cache, and moves on all requests that have joined.

    Any thread may join, leave and step. Who waits for events steps; where another thread is at it, it waits for that
    one's. On several ranks all call the same: rank 0 decides who joins and leaves, and chooses the tokens; the others
    follow, in their own calls or by `follow`.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, ranks: Ranks, *, chunk: int = 512, capacity: int = 1024
    ) -> None:
        """`chunk` is the most prompt tokens that are read in a step, and `capacity` the most requests that wait."""
        self.model, self.tokenizer, self.ranks, self.chunk, self.capacity = model, tokenizer, ranks, chunk, capacity
        self._rows: list[Request] = []  # by their rows in the cache
        self._waiting: deque[Request] = deque()
        self._someone_leaves = False
        self._batch: tuple[list[Request], Batch] | None = None
        self._changed = threading.Condition()
        self._stepper: int | None = None  # the thread that is in a step
        self._process = os.getpid()
        self._lost: LostRank | None = None

    # For callers -----------------------------------------------------------------------------------------------------

    def join(self, request: Request) -> None:
        """Puts a request into the queue. Raises QueueFull where there is no place in it."""
        if request.limit == 0 and not (request.score and len(request.tokens) > 1):
            request.end("length")
            return
        with self._changed:
            if len(self._waiting) >= self.capacity:
                raise QueueFull(f"{len(self._waiting)} requests wait already: try again later, or allow more to wait")
            self._waiting.append(request)
            self._changed.notify_all()

    def leave(self, *requests: Request) -> None:
        """Takes requests out, wherever they are: their rows are free with the next step."""
        for request in requests:
            request.leaving = not request.gone
        self._someone_leaves = True
        if self._lost is not None:
            return
        if self.ranks.leads and self.ranks.world_size > 1 and any(request.leaving for request in requests):
            self.step()  # tells the others now: they wait for nothing else
        while not self.ranks.leads and any(request.leaving and not request.gone for request in requests):
            self.step()  # rank 0 leaves as well, or goes on to the end

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Yields the events of requests as they come; they join as there is room. Raises an event's error."""
        inbox: deque[Event | None] = deque()
        for request in requests:
            request.inbox, request.asked = inbox, (*request.asked, len(requests))
        coming, running = deque(requests), len(requests)
        try:
            while running:
                while coming and len(self._waiting) < self.capacity:
                    self.join(coming.popleft())
                if not inbox:
                    self.step(inbox)
                while inbox:
                    event = inbox.popleft()
                    if event is None:
                        return
                    if event.error is not None:
                        raise event.error
                    running -= event.finish_reason is not None
                    yield event
        finally:
            self.leave(*(request for request in requests if not request.gone and request not in coming))

    def follow(self, ended: Callable[[], bool]) -> None:
        """On ranks above 0, without requests of their own: does what rank 0 does, until `ended` says so."""
        while not ended():
            self.step()

    def step(self, inbox: deque[Event | None] | None = None) -> None:
        """Moves everything on by one. With an `inbox`, returns as soon as something is in it."""
        if os.getpid() != self._process and torch.get_num_threads() > 1:
            raise ValueError(
                "this process was forked from the one that built the Llama, whose threads it lacks: build in the "
                "forked process, start it by 'spawn', or call torch.set_num_threads(1) in it"
            )
        if self._lost is not None:
            raise self._lost
        me = threading.get_ident()
        with self._changed:
            while self._stepper is not None:
                if self._stepper == me:
                    return  # a stream that was dropped, and is closed in the middle of a step
                self._changed.wait()
                if inbox:
                    return
            self._stepper = me
        try:
            with _uninterrupted(self.ranks), self.ranks.named_loss(), torch.inference_mode():
                if self._admit():
                    decoding = self._gather(lambda request: request.unread == 1)
                    if decoding < len(self._rows):
                        self._read(decoding)
                    if decoding:
                        self._decode(decoding)
        except LostRank as error:
            self._lost = error
            raise
        finally:
            with self._changed:
                self._stepper = None
                self._changed.notify_all()

    # Who has which row -----------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Takes out what ended or leaves, and gives free rows to those that wait. False where nothing is left to do in
        this step: where others must hear first that somebody left, too."""
        cache = self.model.own_cache()
        for row, request in enumerate(self._rows):
            if cache.tokens[row] is not request.held:  # another cache, or another's tokens
                del cache.tokens[row][agreeing(cache.tokens[row], request.tokens) :]
                request.held = cache.tokens[row]
        del self._rows[self._gather(lambda request: not request.gone) :]
        left, joining = self._announced()
        for gone in left:
            if gone is not None and not gone.gone:
                gone.gone = gone.leaving = True
                gone.inbox.append(None)
        if left:
            return False
        if joining:
            self._seat(joining)
        return bool(self._rows)

    def _announced(self) -> tuple[list[Request | None], list[Request | None]]:
        """Who leaves and who gets a row: rank 0 decides, and tells the others which rows, and what else was asked."""
        left, joining = self._decided() if self.ranks.leads else ([], [])
        if self.ranks.world_size == 1 or (self.ranks.leads and not (left or joining or self._rows)):
            return [*left], [*joining]
        known = {id(request): row for row, request in enumerate(self._rows)}
        message = [known.get(id(request), request.asked) for request in left], [request.asked for request in joining]
        leaving, seated = self.ranks.broadcast_object(message)
        if self.ranks.leads:
            return [*left], [*joining]
        found = [self._rows[it] if isinstance(it, int) else self._waiting_for(it) for it in leaving]
        return found, [self._waiting_for(asked) for asked in seated]

    def _decided(self) -> tuple[list[Request], list[Request]]:
        """Of rank 0: who leaves, and who gets a row."""
        left: list[Request] = []
        joining: list[Request] = []
        with self._changed:
            if self._someone_leaves:
                self._someone_leaves = False
                left = [request for request in (*self._rows, *self._waiting) if request.leaving]
            free = 0 if left else self.model.own_cache().rows - len(self._rows)
            for request in islice(self._waiting, 4 * free):
                if len(joining) < free and not self._is_read_for_another(request, joining):
                    joining.append(request)
            for request in (*left, *joining):
                if request in self._waiting:
                    self._waiting.remove(request)
        return left, sorted(joining, key=lambda request: len(request.tokens), reverse=True)

    def _waiting_for(self, asked: Any) -> Request | None:
        """The request of this rank's queue that asks for just that; None where there is none. Another thread may be
        about to bring it."""
        others = [thread for thread in threading.enumerate() if not thread.daemon]
        patience = self.ranks.timeout if len(others) > 1 else 0
        with self._changed:
            end = time.monotonic() + patience
            while (request := next((r for r in self._waiting if r.asked == asked), None)) is None:
                if not self._changed.wait(end - time.monotonic()):
                    return None
            self._waiting.remove(request)
        return request

    def _is_read_for_another(self, request: Request, joining: list[Request]) -> bool:
        """Whether another row is about to hold much more of this prompt's beginning than any holds now."""
        if not request.reuse or request.score:
            return False
        wanted = request.tokens[:-1]
        reading = [other.tokens for other in (*self._rows, *joining) if other.unread > 1]
        coming = max((agreeing(tokens, wanted) for tokens in reading), default=0)
        return coming >= SHARED and coming - SHARED >= max(agreeing(t, wanted) for t in self.model.own_cache().tokens)

    def _seat(self, joining: Sequence[Request | None]) -> None:
        """Gives a row to each request. All of them fail where the ranks were not asked for the same."""
        before = len(self._rows)
        places = [self._place(request) for request in joining if request is not None]
        decided = self.ranks.broadcast_object(places)
        if not self.ranks.agree(None not in joining and places == decided):
            del self._rows[before:]
            waiting = [] if self.ranks.leads else list(self._waiting)
            for _ in waiting:
                self._waiting.popleft()
            error = ValueError(
                "the ranks were asked for different things, or their caches differ: call with the same prompts and "
                "settings, in the same order, on every rank"
            )
            for each in [*joining, *waiting]:
                if each is not None:
                    each.fail(error)

    def _place(self, request: Request) -> tuple[int, int]:
        """Gives the first free row to a request, with the longest beginning of its prompt that any row holds: in place
        where that row is free and loses nothing, otherwise copied. Returns the row that held it, and how much."""
        cache, row = self.model.own_cache(), len(self._rows)
        wanted = request.tokens[:-1] if request.reuse and not request.score else []
        shared = [length if (length := agreeing(t, wanted)) >= FEWEST else 0 for t in cache.tokens]
        source = max(range(cache.rows), key=lambda i: (shared[i], i >= row))
        known, oldest = shared[source], min(range(row, cache.rows), key=lambda i: cache.used[i])
        if known and source >= row and (source == oldest or known == len(cache.tokens[source])):
            if source != row:
                cache.swap_rows_(source, row)
        else:
            moved = oldest if source == row else source
            if oldest != row:
                cache.copy_row_(row, oldest, len(cache.tokens[row]))
            if known and moved != row:
                cache.copy_row_(moved, row, known)
        cache.tokens[row] = request.held = cache.tokens[row][:known]
        self._rows.append(request)
        return source, known

    def _gather(self, first: Callable[[Request], bool]) -> int:
        """Moves the rows that are `first` before the others, in the cache as well; returns how many they are."""
        rows, low, high = self._rows, 0, len(self._rows) - 1
        while True:
            while low <= high and first(rows[low]):
                low += 1
            while low <= high and not first(rows[high]):
                high -= 1
            if low >= high:
                return low
            self.model.own_cache().swap_rows_(low, high)
            rows[low], rows[high] = rows[high], rows[low]

    # What the model does ---------------------------------------------------------------------------------------------

    def _read(self, row: int) -> None:
        """Reads at most `chunk` tokens of the prompts in rows `row` on, and chooses the first token of those that are
        read. Padding is written to later slots, which the mask hides."""
        rows, T = self._piece(row)
        pieces = [request.tokens[len(request.held) :][:T] for request in rows]
        tokens = [piece + [0] * (T - len(piece)) for piece in pieces]
        h = self._hidden(torch.tensor(tokens).to(self.ranks.device), rows, T, row)
        last: list[tuple[Request, Tensor]] = []
        for request, piece, own in zip(rows, pieces, h, strict=True):
            if request.score and len(request.prompt_logprobs) < len(request.prompt.tokens):
                self._score(request, own)
            request.held += piece
            if request.limit == 0 and request.unread <= 1 and not request.gone:
                request.end("length")
            elif request.unread == 0 and not request.gone:
                last.append((request, own[len(piece) - 1]))
        if last:
            done = [request for request, _ in last]
            logits = self.model.logits(torch.stack([hidden for _, hidden in last])).unsqueeze(1)
            draws = torch.tensor([request.draws(request.written, 1) for request in done], dtype=torch.int32)
            self._choose(done, logits, [[] for _ in done], draws.to(self.ranks.device))

    def _piece(self, row: int) -> tuple[list[Request], int]:
        """What is read next: some rows from `row` on, and how many tokens of each. A piece of a long prompt, or several
        short ones side by side as long as that wastes less than passes of their own would."""
        slots, rows = self.model.own_cache().slots, [self._rows[row]]
        T = min(rows[0].unread, self.chunk)
        for request in self._rows[row + 1 :]:
            more, width = [*rows, request], min(max(T, request.unread), self.chunk)
            padding = len(more) * width - sum(min(r.unread, width) for r in more)
            fits = all(len(r.held) + width <= slots for r in more)
            if not fits or len(more) * width > self.chunk or padding > PASS * len(rows):
                break
            rows, T = more, width
        return rows, T

    def _score(self, request: Request, h: Tensor) -> None:
        """The log-probabilities of the prompt's tokens after those of which h (T, dim) are the hidden states."""
        following = request.prompt.tokens[len(request.held) + 1 :][: len(h)]
        if following:
            logits = self.model.logits(h[: len(following)])
            found = logprobs_of(logits, torch.tensor(following).to(h.device)).squeeze(-1).tolist()
            request.prompt_logprobs += found
            if not all(map(math.isfinite, found)):
                request.fail(NotFinite())

    def _decode(self, n: int) -> None:
        """Reads the last token of rows 0 to n - 1, and what is guessed to follow it, and chooses what does."""
        rows = self._rows[:n]
        guesses = [request.lookup.guess(request.tokens) for request in rows]
        # What pads the shorter guesses needs a slot too.
        longest = min(max(map(len, guesses)), self.model.own_cache().slots - max(len(r.tokens) for r in rows))
        guesses, T = [guess[:longest] for guess in guesses], 1 + longest
        table = [
            [r.tokens[-1], *guess, *[0] * (longest - len(guess)), len(r.held), *r.draws(r.written, T)]
            for r, guess in zip(rows, guesses, strict=True)
        ]
        given = torch.tensor(table, dtype=torch.int32).to(self.ranks.device)  # all that a step needs from the host
        h = self._hidden(given[:, :T], rows, T, 0, given[:, T : T + 1])
        for request in rows:
            request.held.append(request.tokens[-1])
        self._choose(rows, self.model.logits(h), guesses, given[:, T + 1 :])
        for request in rows:
            request.held += request.tokens[len(request.held) : -1]  # guesses that came true

    def _hidden(self, tokens: Tensor, rows: Sequence[Request], T: int, row: int, first: Tensor | None = None) -> Tensor:
        """The hidden states (B, T, dim) of tokens (B, T) that follow what the rows hold."""
        cache = self.model.own_cache()
        span = cache.span([len(request.held) for request in rows], len(rows), T, row, first)
        return self.model.hidden(tokens, span, cache)

    def _choose(self, rows: list[Request], logits: Tensor, guesses: Sequence[list[int]], draws: Tensor) -> None:
        """A token for each row from logits (B, T, V), and as long as it is the one guessed, another. Rank 0 tells the
        others before anybody hears of it."""
        B, T, _ = logits.shape
        if self.ranks.leads:
            if self._batch is None or self._batch[0] != rows:
                written = [request.tokens[len(request.prompt.tokens) :] for request in rows]
                settings, prompts = [request.sampling for request in rows], [request.prompt.tokens for request in rows]
                self._batch = rows, Batch(settings, prompts, written, logits.shape[-1], logits.device)
            chosen = self._batch[1].sample(logits, draws.view(torch.float32), self._mask(rows, guesses, logits))
        else:
            chosen = torch.empty(B, T, dtype=torch.int64, device=logits.device)
        chosen = self.ranks.broadcast(chosen)
        asking = [row for row, request in enumerate(rows) if request.logprobs is not None]
        k = max((rows[row].logprobs or 0 for row in asking), default=0)
        found = chosen.flatten()
        if asking:  # in one tensor, so that a GPU is waited for once
            own = (x if len(asking) == B else torch.stack([x[row] for row in asking]) for x in (logits, chosen))
            found = torch.cat((found.float(), logprobs_of(next(own), next(own).clamp_min(0), k).flatten()))
        values = found.tolist()
        for row, (request, guess) in enumerate(zip(rows, guesses, strict=True)):
            tokens = [int(value) for value in values[row * T : (row + 1) * T]]
            right = agreeing(guess, tokens)
            for t in range(right + 1):
                at = B * T + (asking.index(row) * T + t) * (1 + 2 * k) if row in asking else len(values)
                if not request.gone:
                    request.take(tokens[t], values[at : at + 1 + 2 * k])
            request.lookup.learn(len(guess), right)

    def _mask(self, rows: Sequence[Request], guesses: Sequence[list[int]], logits: Tensor) -> Tensor | None:
        """(B, T, V): what may come next, by the requests' own functions; where nothing may, what ends the answer."""
        if all(request.allowed is None for request in rows):
            return None
        mask = torch.ones(logits.shape, dtype=torch.bool)
        for request, guess, own in zip(rows, guesses, mask, strict=True):
            written = request.tokens[len(request.prompt.tokens) :]
            for t in range(len(guess) + 1):
                found = None if request.allowed is None else request.allowed(written + guess[:t])
                if found is None:
                    continue
                own[t] = found
                if not own[t].any():
                    own[t, list(request.stop_ids)] = True
                if t < len(guess) and not own[t, guess[t]]:
                    break  # no further guess can come true
        return mask.to(logits.device)


@contextmanager
def _uninterrupted(ranks: Ranks) -> Iterator[None]:
    """Ctrl-C waits for the end of a step where other ranks count on it."""
    if ranks.world_size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *frame: pressed.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
