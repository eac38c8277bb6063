"""A Llama without weights: the loop, the cache and the tokenizer are real, and what it writes is what a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from llama.cache import KVCache, Span
from llama.config import ModelArgs
from llama.decoding import Loop
from llama.generation import EMBEDDED
from llama.parallel import Ranks
from llama.tokenizer import Tokenizer

Say = Callable[[str], str]
"""The text of a prompt's ids, to the answer."""


def default_say(prompt: str) -> str:
    if "forever" in prompt:
        return "la " * 400
    return "one two three four five six"


class ScriptedModel:
    """Stands in for a Transformer: `hidden` notes what each position has seen, and `logits` looks up what follows."""

    def __init__(self, tokenizer: Tokenizer, args: ModelArgs, say: Say) -> None:
        self.tokenizer, self.args, self.say = tokenizer, args, say
        self.norm = SimpleNamespace(weight=torch.zeros(1))
        self.cache = KVCache(
            1, 1, 1, args.max_batch_size, args.max_seq_len, dtype=torch.float32, device=torch.device("cpu")
        )
        self.loop: Loop | None = None
        self.seconds = 0.0
        """That a pass takes."""
        self.gate = threading.Event()
        """While it is not set, a pass waits."""
        self.gate.set()
        self.waits = threading.Event()
        """Set by a pass that waits at the gate."""
        self.passes: list[tuple[int, int]] = []
        self.fails: list[Exception] = []
        """Errors that coming passes raise."""
        self.breaks = False
        """Whether logits are NaN."""
        self._seen: list[tuple[list[int], list[int]]] = []
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def own_cache(self) -> KVCache:
        return self.cache

    def hidden(self, tokens: Tensor, span: Span, cache: KVCache) -> Tensor:
        if not self.gate.is_set():
            self.waits.set()
            self.gate.wait(20)
        if self.seconds:
            time.sleep(self.seconds)
        self.passes.append((tokens.shape[0], tokens.shape[1]))
        if self.fails:
            raise self.fails.pop()
        self._seen = [(list(cache.tokens[span.row + i]), row) for i, row in enumerate(tokens.tolist())]
        B, T = tokens.shape
        return torch.stack((torch.arange(B)[:, None].expand(B, T), torch.arange(T)[None].expand(B, T)), -1).float()

    def logits(self, h: Tensor) -> Tensor:
        scores = torch.zeros(*h.shape[:-1], self.args.vocab_size)
        if self.breaks:
            return scores + torch.nan
        for place, found in zip(h.view(-1, 2).tolist(), scores.view(-1, self.args.vocab_size), strict=True):
            before, own = self._seen[int(place[0])]
            found[self._next(before + own[: int(place[1]) + 1])] = 20.0
        return scores

    def _next(self, context: list[int]) -> int:
        assert self.loop is not None
        prompts = (request.prompt for request in self.loop._rows)
        prompt = next((p for p in prompts if context[: len(p.tokens)] == p.tokens), None)
        if prompt is None:
            return self.tokenizer.eos_id
        key = tuple(prompt.tokens)
        if key not in self._answers:
            self._answers[key] = self.tokenizer.encode_infilling(self.say(self.tokenizer.decode(prompt.tokens)))
        answer, written = self._answers[key], len(context) - len(prompt.tokens)
        infills = self.tokenizer.middle_id in prompt.tokens
        end = self.tokenizer.eot_id if infills else self.tokenizer.eos_id
        assert end is not None
        return answer[written] if written < len(answer) else end


class Scripted:
    """What an engine needs of a Llama."""

    def __init__(
        self, say: Say = default_say, *, rows: int = 4, slots: int = 512, chunk: int = 64, lookup: int = 0
    ) -> None:
        self.tokenizer, self.lookup = Tokenizer(EMBEDDED / "tokenizer.model"), lookup
        args = ModelArgs(
            dim=8, n_layers=1, n_heads=1, vocab_size=self.tokenizer.n_words, max_batch_size=rows, max_seq_len=slots
        )
        self.model = ScriptedModel(self.tokenizer, args, say)
        self.ranks = Ranks(0, 1, torch.device("cpu"), None)
        self.loop = Loop(self.model, self.ranks, chunk=chunk)  # type: ignore[arg-type]
        self.model.loop = self.loop

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=True, eos=False)


def texts_of(pieces: Sequence[dict[str, str]]) -> str:
    return "".join(piece["text"] for piece in pieces)
