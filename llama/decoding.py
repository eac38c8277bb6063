"""The loop: what turns a model that scores the next token into answers that grow, many at a time.

A request joins at any moment and leaves at any moment. In between it goes this way:

1. `join` puts it into a queue.
2. A free row of the cache takes it, with the longest beginning that any row already holds (`_place`).
3. Its prompt is read in pieces (*prefill*): at most `chunk` tokens a step, so that nobody else waits for long.
4. The logits after its last token give its first token, chosen on rank 0 and announced to the others (`_choose`).
5. From then on each step reads the last token of every such row and chooses the next (*decode*); where tokens were
   proposed by lookup, it reads these as well, and keeps those that it would have chosen.
6. What is certain of the answer goes to the request's inbox as an `Event`.
7. It ends: by a token, a stop string, its limit, an error, or because nobody listens any more (`leave`).
8. Its row becomes free. What the row holds stays known, until another request needs the place.

How far a row has read is stored once: it is what the cache says the row holds. So if someone else writes into the cache
between two steps, the tokens that are lost are read again. Active rows are rows 0 to n - 1 of the cache, those that
decode before those that still read.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.arguments import checked
from llama.control import uninterrupted
from llama.errors import LostRank, NotFinite, PromptTooLong, QueueFull
from llama.lookup import agreeing
from llama.model import Transformer
from llama.parallel import Ranks
from llama.requests import Event, Request
from llama.sampling import Batch, logprobs_of

PASS = 64
"""Tokens of padding that cost about as much as a pass of their own; more are not read side by side (docs/LOG.md)."""
FEWEST = 16
"""Tokens that are worth taking over from a row: without them, attention needs no mask."""
SHARED = 32
"""A request waits for a prompt that is being read if it would have so many more tokens in common with it."""


class Loop:
    """Owns a model's cache, and moves on all requests that have joined.

    Any thread may join, leave and step. Whoever waits for events steps, or waits for the thread that is in a step. On
    several ranks all call the same: rank 0 decides who joins and leaves, and chooses the tokens; the others follow.
    """

    def __init__(self, model: Transformer, ranks: Ranks, *, chunk: int = 512, capacity: int = 1024) -> None:
        """`chunk` is the most prompt tokens that are read in a step, and `capacity` the most requests that wait."""
        self.model, self.ranks, self.chunk, self.capacity = model, ranks, chunk, capacity
        self._rows: list[Request] = []  # by their rows in the cache
        self._waiting: deque[Request] = deque()
        self._batch: tuple[list[Request], Batch] | None = None
        self._changed, self._process = threading.Condition(), os.getpid()
        self._stepper: tuple[int, int] | None = None  # the process and the thread in a step
        self._someone_leaves, self._failed, self._seats = False, False, 0  # failed: the last step raised an error
        self._lost: LostRank | None = None

    # For callers -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that this model can't answer: in a step, it would harm the others."""
        args, tokens, row, n = self.model.args, request.prompt.tokens, request.row, len(request.prompt.tokens)
        if not 0 < n <= args.max_seq_len:
            raise PromptTooLong(row, n, args.max_seq_len) if n else ValueError(f"prompt {row} has 0 tokens: give one")
        for name, ids in ((f"prompt {row}", tokens), ("logit_bias", request.sampling.logit_bias or ())):
            if not all(0 <= token < args.vocab_size for token in ids):
                raise ValueError(f"{name} has ids outside 0 to {args.vocab_size - 1}, the model's vocabulary")
        most = args.vocab_size
        request.logprobs = request.logprobs and checked("logprobs", request.logprobs, (int, "at least", 0, most))

    def join(self, request: Request) -> None:
        """Puts a request into the queue. Raises QueueFull where there is no place in it, and ValueError as `check`. The
        queue of rank 0 alone is ever full: the others must have what it begins, in whatever order their threads ask."""
        self.check(request)
        if request.limit == 0 and not (request.score and len(request.tokens) > 1):
            request.end("length")
            return
        with self._changed:
            if self.ranks.leads and len(self._waiting) >= self.capacity:
                raise QueueFull(f"{len(self._waiting)} requests wait already: try again later, or allow more to wait")
            self._waiting.append(request)
            self._changed.notify_all()

    def leave(self, *requests: Request) -> None:
        """Takes requests out, wherever they are: their rows are free with the next step."""
        for request in requests:
            request.leaving = not request.gone
        self._someone_leaves = True
        # A dropped stream may be closed in the middle of a step; and after one that failed, the others are elsewhere.
        later = self.ranks.world_size == 1 or self._failed or self._stepper == (os.getpid(), threading.get_ident())
        while not later and any(request.leaving and not request.gone for request in requests):
            # Rank 0 tells the others now, since they wait for nothing else; they go on until rank 0 leaves as well.
            self.step()

    def run(self, requests: Sequence[Request]) -> Generator[Event, None, None]:
        """Yields the events of requests as they come; they join as there is room. Raises an event's error."""
        inbox: deque[Event | None] = deque()
        for request in requests:
            request.inbox, request.asked = inbox, (*request.asked, len(requests))
        coming, running = deque(requests), len(requests)
        try:
            while running:
                with suppress(QueueFull):
                    while coming:
                        self.join(coming[0])
                        coming.popleft()
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
            with suppress(LostRank):  # the next step says so; here something else may be on its way
                self.leave(*(request for request in requests if not request.gone and request not in coming))

    def step(self, inbox: deque[Event | None] | None = None) -> None:
        """Moves everything on by one. With an `inbox`, returns as soon as something is in it."""
        me = os.getpid(), threading.get_ident()
        if (me[0] != self._process and torch.get_num_threads() > 1) or (self._stepper or me)[0] != me[0]:
            remedy = "build in this one, start it by 'spawn', or call torch.set_num_threads(1) in it"
            raise ValueError(f"this process was forked from one that built the Llama, whose threads it lacks: {remedy}")
        if self._lost is not None:
            raise self._lost
        if self._stepper == me:
            raise ValueError("`allowed` asks the Llama whose step it is part of: ask before, or ask another Llama")
        try:
            with self._changed:
                while self._stepper and not inbox:
                    self._changed.wait(1)  # or less: an interrupt may come before the end of a step is told
                if self._stepper or inbox:
                    return
                self._stepper, self._failed = me, False
            with self.ranks.undisturbed(), torch.inference_mode():
                if (decoding := self._admit()) is not None:
                    if decoding < len(self._rows):
                        self._read(decoding)
                    if decoding:
                        self._decode(decoding)
        except Exception as error:
            self._failed, self._lost = True, error if isinstance(error, LostRank) else None
            raise
        finally:
            if self._stepper == me:
                self._stepper = None
                with self._changed:
                    self._changed.notify_all()

    # Who has which row -----------------------------------------------------------------------------------------------

    @uninterrupted()
    def _admit(self) -> int | None:
        """Takes out what ended or leaves, and gives free rows to those that wait. Returns how many decode; None where
        nothing is left to do in this step: where others must hear first that somebody left, too."""
        cache = self.model.own_cache()
        for request in self._rows[cache.rows :]:  # another cache, with fewer rows
            request.held = []
            self._waiting.extendleft([] if request.gone else [request])
        del self._rows[cache.rows :]
        for row, request in enumerate(self._rows):
            if cache.tokens[row] is not request.held:  # another cache, or another's tokens
                del cache.tokens[row][agreeing(cache.tokens[row], [] if request.score else request.tokens) :]
                request.held = cache.tokens[row]
            del request.held[len(request.tokens) - 1 :]  # an interrupted step had read the last token, too
        if any(request.gone for request in self._rows):
            del self._rows[self._gather(lambda request: not request.gone) :]
        left, joining = self._decided() if self.ranks.leads else ([], [])
        if self.ranks.world_size > 1 and not (self.ranks.leads and not (left or joining or self._rows)):
            left, joining = self._announced(left, joining)
        for gone in (request for request in left if request is not None and not request.gone):
            gone.gone = gone.leaving = True
            gone.inbox.append(None)
        if joining:
            self._seat(joining)
        return self._gather(lambda request: request.unread == 1) if self._rows and not left else None

    def _decided(self) -> tuple[list[Request | None], list[Request | None]]:
        """Of rank 0: who leaves, and who gets a row."""
        joining: list[Request] = []
        if not (self._waiting or self._someone_leaves):
            return [], []
        with self._changed:
            leaves, self._someone_leaves = self._someone_leaves, False
            left = [request for request in (*self._rows, *self._waiting) if request.leaving] if leaves else []
            free = 0 if left else self.model.own_cache().rows - len(self._rows)
            for request in islice(self._waiting, 4 * free):
                if len(joining) < free and not self._is_read_for_another(request, joining):
                    joining.append(request)
            for request in (*left, *joining):
                if request in self._waiting:
                    self._waiting.remove(request)
        joining.sort(key=lambda request: -len(request.tokens))
        return [*left], [*joining]

    def _is_read_for_another(self, request: Request, joining: list[Request]) -> bool:
        """Whether another row is about to hold much more of this prompt's beginning than any holds now."""
        if not request.reuse or request.score:
            return False
        wanted = request.tokens[:-1]
        reading = [other.tokens for other in (*self._rows, *joining) if other.unread > 1]
        coming = max((agreeing(tokens, wanted) for tokens in reading), default=0)
        return coming >= SHARED and coming - SHARED >= max(agreeing(t, wanted) for t in self.model.own_cache().tokens)

    def _announced(self, left: list[Request | None], joining: list[Request | None]) -> Any:
        """What rank 0 has decided, on every rank: those that leave by their rows, others by what they ask for."""
        rows = {id(request): row for row, request in enumerate(self._rows)}
        asked = [[rows.get(id(request), request.asked) for request in some if request] for some in (left, joining)]
        leaving, seated = self.ranks.broadcast_object(asked)
        if self.ranks.leads:
            return left, joining
        found = [self._rows[it] if isinstance(it, int) else self._waiting_for(it) for it in leaving]
        return found, [self._waiting_for(it) for it in seated]

    def _waiting_for(self, asked: Any) -> Request | None:
        """The request of this rank's queue that asks for just that; None where there is none. Another thread may be
        about to bring it."""
        end = time.monotonic() + self.ranks.timeout * (sum(not t.daemon for t in threading.enumerate()) > 1)
        with self._changed:
            while (request := next((r for r in self._waiting if r.asked == asked), None)) is None:
                if not self._changed.wait(end - time.monotonic()):
                    return None
            self._waiting.remove(request)
        return request

    def _seat(self, joining: Sequence[Request | None]) -> None:
        """Gives a row to each request. All of them fail where the ranks were not asked for the same."""
        before = len(self._rows)
        self._rows += [request for request in joining if request is not None]  # at once, so that none can be lost
        places = [self._place(row) for row in range(before, len(self._rows))]
        decided = self.ranks.broadcast_object(places)
        if not self.ranks.agree(None not in joining and places == decided):
            del self._rows[before:]
            waiting = [] if self.ranks.leads else [self._waiting.popleft() for _ in range(len(self._waiting))]
            for request in filter(None, (*joining, *waiting)):
                remedy = "call with the same prompts and settings, in the same order, on every rank"
                error = ValueError(f"the ranks were asked for different things, or their caches differ: {remedy}")
                request.end("error", error=error)

    def _place(self, row: int) -> tuple[int, int]:
        """Prepares the first free row for its request, with the longest beginning of its prompt that any row holds: in
        place where that row is free and loses nothing, otherwise copied. Returns the row that held it, and how much."""
        cache, request = self.model.own_cache(), self._rows[row]
        wanted = request.tokens[:-1] if request.reuse and not request.score else []
        shared = [length if (length := agreeing(t, wanted)) >= FEWEST else 0 for t in cache.tokens]
        source = max(range(cache.rows), key=lambda i: (shared[i], i >= row))
        known, oldest = shared[source], min(range(row, cache.rows), key=lambda i: cache.used[i])
        if known and source >= row and (source == oldest or known == len(cache.tokens[source])):
            cache.swap_rows_(source, row)
        else:
            cache.copy_row_(row, oldest, len(cache.tokens[row]))  # the least recently used gives way
            cache.copy_row_(oldest if source == row else source, row, known)
        cache.tokens[row] = request.held = cache.tokens[row][:known]
        request.reused, request.seat, self._seats = known, self._seats, self._seats + 1
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
        row, rows, T = self._piece(row)
        pieces = [request.tokens[len(request.held) :][:T] for request in rows]
        h = self._hidden(self._moved([piece + [0] * (T - len(piece)) for piece in pieces]), rows, row)
        done, last = [], []
        for request, piece, own in zip(rows, pieces, h, strict=True):
            if request.score and len(request.prompt_logprobs) < len(request.prompt.tokens):
                self._score(request, own)
            request.held += piece
            if request.limit == 0 and request.unread <= 1 and not request.gone:
                request.end("length")
            elif request.unread == 0 and not request.gone:
                done.append(request)
                last.append(own[len(piece) - 1])
        if done:
            given = self._moved([request.draws(request.written, 1) for request in done])
            self._choose(done, self.model.logits(torch.stack(last)).unsqueeze(1), [[]] * len(done), given)

    def _piece(self, row: int) -> tuple[int, list[Request], int]:
        """What is read next, of the prompts in rows `row` on: the first row, the requests from it on, and how many
        tokens of each. A piece of a long prompt, or several short ones side by side as long as that wastes less than
        passes of their own would; the one that came first is among them."""
        slots, rows = self.model.own_cache().slots, [self._rows[row]]
        T = min(rows[0].unread, self.chunk)
        for request in self._rows[row + 1 :]:
            more, width = [*rows, request], min(max(T, request.unread), self.chunk)
            padding = len(more) * width - sum(min(r.unread, width) for r in more)
            fits = all(len(r.held) + width <= slots for r in more)
            if not fits or len(more) * width > self.chunk or padding > PASS * len(rows):
                break
            rows, T = more, width
        first = min(self._rows[row:], key=lambda request: request.seat)  # rows are not in the order of their coming
        return (row, rows, T) if first in rows else self._piece(self._rows.index(first))

    def _score(self, request: Request, h: Tensor) -> None:
        """The log-probabilities of the prompt's tokens after those of which h (T, dim) are the hidden states."""
        following = request.prompt.tokens[len(request.held) + 1 :][: len(h)]
        if following:
            logits = self.model.logits(h[: len(following)])
            found = logprobs_of(logits, self._moved(following)).squeeze(-1).tolist()
            request.prompt_logprobs[len(request.held) + 1 :] = found  # what is read again is scored again
            if not all(map(math.isfinite, found)):
                request.end("error", error=NotFinite())

    def _decode(self, n: int) -> None:
        """Reads the last token of rows 0 to n - 1, and what is guessed to follow it, and chooses what does."""
        rows = self._rows[:n]
        guesses = [request.lookup.guess(request.tokens) for request in rows]
        # What pads the shorter guesses needs a slot too.
        longest = min(max(map(len, guesses)), self.model.own_cache().slots - max(len(r.tokens) for r in rows))
        guesses, T = [guess[:longest] for guess in guesses], 1 + longest
        given = self._moved([  # all that a step needs from the host
            [r.tokens[-1], *guess, *[0] * (longest - len(guess)), len(r.held), *r.draws(r.written, T)]
            for r, guess in zip(rows, guesses, strict=True)
        ])  # fmt: skip
        h = self._hidden(given[:, :T], rows, 0, given)
        for request in rows:
            request.held.append(request.tokens[-1])
        self._choose(rows, self.model.logits(h), guesses, given)
        for request in rows if longest else ():
            request.held += request.tokens[len(request.held) : -1]  # guesses that came true

    def _moved(self, numbers: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.array(numbers, np.int64)).to(self.ranks.device)  # a third of torch.tensor's time

    def _hidden(self, tokens: Tensor, rows: Sequence[Request], row: int, given: Tensor | None = None) -> Tensor:
        """The hidden states (B, T, dim) of tokens (B, T) that follow what the rows hold."""
        cache = self.model.own_cache()
        span = cache.span([len(request.held) for request in rows], len(rows), tokens.shape[1], row, given)
        return self.model.hidden(tokens, span, cache)

    def _choose(self, rows: list[Request], logits: Tensor, guesses: Sequence[list[int]], given: Tensor) -> None:
        """A token for each row from logits (B, T, V), and as long as it is the one guessed, another, by the draws that
        end `given`. Rank 0 tells the others before anybody hears of it."""
        batch, self._batch = self._batch, None  # it counts tokens before they are taken
        if batch is None or batch[0] != rows:
            asked = [(request.sampling, request.prompt.tokens, request.answer) for request in rows]
            batch = rows, Batch(asked, logits.shape[-1], logits.device)
        if self.ranks.leads:
            chosen = batch[1].sample(logits, given, self._mask(rows, guesses, logits))
        else:
            chosen = torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device)
        told = self._told(rows, logits, self.ranks.broadcast(chosen))
        with uninterrupted():
            for request, guess, (tokens, numbers) in zip(rows, guesses, told, strict=True):
                right = agreeing(guess, tokens) if guess else 0
                for token, own in zip(tokens[: right + 1], numbers, strict=False):
                    if not request.gone:
                        request.take(token, own)
                request.lookup.learn(len(guess), right)
        self._batch = batch

    def _told(
        self, rows: list[Request], logits: Tensor, chosen: Tensor
    ) -> Iterable[tuple[list[int], list[list[float]]]]:
        """Of each row the tokens (T), and where it asks for them, what `logprobs_of` says of each."""
        (B, T), asking = chosen.shape, [row for row, request in enumerate(rows) if request.logprobs is not None]
        if not asking:
            return zip(chosen.tolist(), [[[]] * T] * B, strict=True)
        k = max(rows[row].logprobs or 0 for row in asking)
        own = (x if len(asking) == B else torch.stack([x[row] for row in asking]) for x in (logits, chosen))
        numbers = logprobs_of(next(own), next(own).clamp_min(0), k)
        found = torch.cat((chosen.float().flatten(), numbers.flatten())).tolist()  # a GPU is waited for once
        width = len(found[B * T :]) // (len(asking) * T)
        told = [found[at : at + width] for at in range(B * T, len(found), width)]
        of_rows = {row: told[i * T : (i + 1) * T] for i, row in enumerate(asking)}
        tokens = [[int(token) for token in found[row * T : (row + 1) * T]] for row in range(B)]
        return [(tokens[row], of_rows.get(row, [[]] * T)) for row in range(B)]

    def _mask(self, rows: Sequence[Request], guesses: Sequence[list[int]], logits: Tensor) -> Tensor | None:
        """(B, T, V): what may come next, by the requests' own functions; where nothing may, what ends the answer."""
        if all(request.allowed is None for request in rows):
            return None
        mask = torch.ones(logits.shape, dtype=torch.bool, device="cpu")
        for request, guess, own in zip(rows, guesses, mask, strict=True):
            for t in range(len(guess) + 1):
                try:
                    found = None if request.allowed is None else request.allowed(request.answer + guess[:t])
                    own[t] = own[t] if found is None else found
                except Exception as error:  # its own, and nobody else's
                    request.end("error", error=error)
                if not own[t].any():
                    own[t, [i for i in request.stop_ids if 0 <= i < own.shape[-1]]] = True
                if t < len(guess) and not own[t, guess[t]]:
                    break  # no further guess can come true
        return mask.to(logits.device)
