"""The service: from what an API has understood of a request to the pieces of its answers.

An API fills in an `Ask`; `Service.call` makes the loop's requests of it, lets them join, and returns a `Call`. Its
pieces are the loop's events as a client may see them: without text that was taken back by token healing, and after a
filter has looked at them. Whatever an API offers besides is a matter of form.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from starlette.requests import Request as HTTPRequest
from torch import Tensor

from llama.prompts import FinishReason
from llama.requests import Allowed, Request
from llama.sampling import Sampling
from llama.serve.assemble import Assembled, Assembler
from llama.serve.engine import Engine, Stream
from llama.serve.grammar import Grammar, compile_grammar
from llama.tokenizer import Tokenizer

Check = Callable[[str, Literal["prompt", "answer"]], Any]
"""A filter: a text and which it is, to None or True where it may pass, and a reason (or False) where not. It may be a
coroutine function. Answers are checked line by line, each time from the answer's beginning."""
STOPS = 16
"""Stop strings that a request may have."""
ANSWERS = 128
"""Answers that one request may ask for."""


class Refused(ValueError):
    """A filter does not let a prompt pass."""


@dataclass
class Ask:
    """What a client wants, whatever its API."""

    prompts: list[Assembled]
    limit: int | None = None
    """The most tokens of an answer; None for all that there is room for."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Sampling`, without the seed."""
    seed: int | None = None
    stop: Sequence[str | int] = ()
    n: int = 1
    """Answers to each prompt."""
    best_of: int = 1
    """So many are written, and the `n` likeliest of them, by token, are returned."""
    logprobs: int | None = None
    """Log-probabilities of the tokens, and so many alternatives."""
    score: bool = False
    """Those of the prompt's tokens, too."""
    reuse: bool = True
    ignore_eos: bool = False
    min_tokens: int = 0
    grammar: Mapping[str, Any] | None = None
    """Arguments of `grammar.compile_grammar`."""


@dataclass
class Piece:
    """What became certain of one answer."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason | Literal["content_filter"] | None = None

    def add(self, other: Piece) -> None:
        """What follows it. An answer that a filter refuses at last has no text at all."""
        if other.finish_reason == "content_filter":
            self.text, self.tokens, self.logprobs, self.top = "", [], [], []
        self.text += other.text
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.top += other.top
        self.finish_reason = other.finish_reason or self.finish_reason


def likelihood(piece: Piece) -> float:
    """The mean log-probability of its tokens."""
    return sum(piece.logprobs) / max(1, len(piece.logprobs))


class Call:
    """One client's request, under way. `close` must be called at its end, however it ends."""

    def __init__(self, ask: Ask, requests: Sequence[Request], stream: Stream, check: Check | None) -> None:
        self.ask, self.requests, self.stream, self._check = ask, requests, stream, check
        self._healed = [len(ask.prompts[i // self._each].healed) for i in range(len(requests))]
        self._seen: dict[int, Piece] = {}

    @property
    def _each(self) -> int:
        return max(self.ask.n, self.ask.best_of)

    @property
    def has_more(self) -> bool:
        """Whether the next piece, or the end, comes without waiting. A filter may hold a piece back."""
        return self._check is None and self.stream.has_more

    def close(self) -> None:
        self.stream.close()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """As they come. Raises what ended the call."""
        try:
            async for event in self.stream:
                if event.error is not None:
                    raise event.error
                i = event.row
                taken = min(self._healed[i], len(event.text))
                self._healed[i] -= taken
                own = Piece(i, event.text[taken:], event.tokens, event.logprobs, event.top, event.finish_reason)
                if self._check is None:
                    yield own
                    continue
                checked = await self._checked(own)
                if checked is not None:
                    yield checked
        finally:
            self.close()

    async def _checked(self, piece: Piece) -> Piece | None:
        """The piece and those held back before it, once the filter has seen the answer up to it; None until then."""
        assert self._check is not None
        whole = self._seen.setdefault(piece.index, Piece(piece.index, "", []))
        held = self._seen.setdefault(~piece.index, Piece(piece.index, "", []))
        if whole.finish_reason:
            return None
        whole.add(piece)
        held.add(piece)
        if not (piece.finish_reason or "\n" in piece.text):
            return None
        if await refusal(self._check, whole.text, "answer") is not None:
            whole.finish_reason = "content_filter"
            self.stream.leave(piece.index)  # nobody will read the rest
            return Piece(piece.index, "", [], finish_reason="content_filter")
        self._seen[~piece.index] = Piece(piece.index, "", [])
        return held

    async def collect(self) -> list[Piece]:
        """The answers, whole: `n` for each prompt, in their order, numbered from 0."""
        found = [Piece(i, "", []) for i in range(len(self.requests))]
        async for piece in self.pieces():
            found[piece.index].add(piece)
        chosen: list[Piece] = []
        for first in range(0, len(found), self._each):
            group = found[first : first + self._each]
            if self.ask.best_of > self.ask.n:
                group = sorted(group, key=likelihood, reverse=True)[: self.ask.n]
            chosen += group
        return [replace(one, index=i) for i, one in enumerate(chosen)]

    def scored(self, index: int) -> Request:
        """A request with the prompt of an answer as `collect` numbers them; it has the prompt's log-probabilities."""
        return self.requests[index // self.ask.n * self._each]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(one.prompt.tokens) for one in self.ask.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(request.written for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that were not read, since a row of the cache held them."""
        groups = (self.requests[i : i + self._each] for i in range(0, len(self.requests), self._each))
        return sum(max(0, min(request.reused for request in group)) for group in groups)


@dataclass(frozen=True)
class Facts:
    """What a model is, as several APIs tell it."""

    parameters: int = 0
    weights: int = 0
    """Bytes."""
    cache: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    quantization: str = ""
    version: str = "0"
    path: str = ""


class Service:
    """What all APIs share: the engine, the assembler of prompts, and the filter."""

    def __init__(
        self, engine: Engine, model_name: str, *, assembler: Assembler | None = None, check: Check | None = None,
        log_prompts: bool = False, facts: Facts | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.tokenizer, self.model_name, self.check = engine, engine.tokenizer, model_name, check
        self.max_seq_len: int = engine.args.max_seq_len
        self.log_prompts, self.facts = log_prompts, facts or Facts()
        self.assembler = assembler or Assembler(engine.tokenizer, self.max_seq_len)

    async def call(self, http: HTTPRequest, ask: Ask) -> Call:
        """Raises ValueError for what can't be asked, Refused, and as `Engine.submit`. The call is noted in the HTTP
        request's scope, for the log and for traces."""
        if self.check is not None:
            for assembled in ask.prompts:
                reason = await refusal(self.check, assembled.content, "prompt")
                if reason is not None:
                    raise Refused(reason)
        stream: list[Stream] = []
        grammar = None if ask.grammar is None else await asyncio.to_thread(self._compiled, ask.grammar)
        requests = self._requests(ask, grammar, lambda error: stream[0].fail(error))
        stream.append(self.engine.submit(requests))
        call = Call(ask, requests, stream[0], self.check)
        http.scope["codellama.call"] = call
        if self.log_prompts:
            http.scope["codellama.prompt"] = [assembled.content for assembled in ask.prompts]
        return call

    async def collect(self, http: HTTPRequest, ask: Ask) -> tuple[Call, list[Piece]]:
        call = await self.call(http, ask)
        return call, await call.collect()

    def _compiled(self, grammar: Mapping[str, Any]) -> Grammar:
        return compile_grammar(self.tokenizer, **grammar)

    def _requests(self, ask: Ask, grammar: Grammar | None, fail: Callable[[Exception], None]) -> list[Request]:
        strings = [s for s in ask.stop if isinstance(s, str)]
        if len(strings) > STOPS:
            raise ValueError(f"stop has {len(strings)} strings; give at most {STOPS}")
        each = max(ask.n, ask.best_of)
        if not 1 <= len(ask.prompts) * each <= ANSWERS:
            raise ValueError(f"{len(ask.prompts)} prompts with {each} answers each; ask for 1 to {ANSWERS} answers")
        seed = random.getrandbits(62) if ask.seed is None else ask.seed
        logprobs = ask.logprobs if ask.best_of <= ask.n else ask.logprobs or 0
        found: list[Request] = []
        for assembled in ask.prompts:
            prompt = assembled.prompt
            if not prompt.tokens:
                raise ValueError("the prompt is empty: give at least one token")
            room = self.max_seq_len - len(prompt.tokens)
            limit = max(0, room if ask.limit is None else min(room, ask.limit))
            for _ in range(each):
                sampling = self._sampling(ask, assembled, (seed + len(found)) % 2**63)
                hooks: list[Allowed] = [] if assembled.allowed is None else [assembled.allowed]
                if grammar is not None:
                    hooks.append(grammar.start(prompt))
                if ask.min_tokens > 0:
                    hooks.append(_not_before(ask.min_tokens, prompt.stop, self.tokenizer))
                allowed = _guarded(hooks, fail) if hooks else None
                told = prompt, limit, sampling, tuple(ask.stop), logprobs, ask.score, ask.reuse
                lookup = self.engine.llama.lookup
                found.append(Request(self.tokenizer, *told, lookup, row=len(found), allowed=allowed))
        return found

    def _sampling(self, ask: Ask, assembled: Assembled, seed: int) -> Sampling:
        given = {**ask.sampling, "seed": seed}
        if ask.ignore_eos:
            given["logit_bias"] = {**(given.get("logit_bias") or {}), **dict.fromkeys(assembled.prompt.stop, -1e9)}
        return Sampling(**given)


async def refusal(check: Check, text: str, which: Literal["prompt", "answer"]) -> str | None:
    """Why a filter refuses a text; None where it doesn't. Functions run in a thread, since a classifier takes long."""
    if inspect.iscoroutinefunction(check):
        found = await check(text, which)
    else:
        found = await asyncio.to_thread(check, text, which)
    if found is None or found is True:
        return None
    return found if isinstance(found, str) and found else f"the {which} was refused by this server's filter"


def spelled(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token's own text, and its bytes: a piece of byte fallback may have no text of its own."""
    byte = tokenizer.byte_of(token)
    if byte:
        return byte.decode("utf-8", "replace") if byte[0] < 0x80 else f"bytes:\\x{byte[0]:02x}", byte
    text = tokenizer.token_piece(token).replace("▁", " ")
    return text, text.encode()


def _not_before(tokens: int, stop: frozenset[int], tokenizer: Tokenizer) -> Allowed:
    """Nothing ends the answer before so many tokens."""
    mask = torch.ones(tokenizer.n_words, dtype=torch.bool, device="cpu")
    mask[sorted(stop)] = False
    return lambda answer: mask if len(answer) < tokens else None


def _guarded(hooks: Sequence[Allowed], fail: Callable[[Exception], None]) -> Allowed:
    """What all of some hooks allow. An error of one ends the call; the loop itself never sees it, since on several
    ranks the others would not."""

    def allowed(answer: list[int]) -> Tensor | None:
        try:
            masks = [mask for hook in hooks if (mask := hook(answer)) is not None]
        except Exception as error:
            fail(error)
            return None
        return torch.stack(masks).all(0) if len(masks) > 1 else masks[0] if masks else None

    return allowed
