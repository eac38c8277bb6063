"""Who writes the answers of a chat: a model in this process, or a server elsewhere.

A chat asks a writer how long a conversation is, and for an answer in pieces. PyTorch is imported only where the model
is in this process.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from llama.generation import Llama
    from llama.prompts import Message, Prompt
    from llama.serve.client import Server


@dataclass(frozen=True)
class Piece:
    """Some of an answer's text, and at its end why it ended."""

    text: str
    tokens: int
    """How many it took."""
    reason: str | None = None


@dataclass
class Sampled:
    """How an answer's tokens are chosen, and how many there may be."""

    temperature: float
    top_p: float
    top_k: int | None
    max_gen_len: int
    seed: int
    stop: tuple[str, ...] = ()


class Writer(Protocol):
    context: int | None
    """Tokens that it has room for, conversation and answer together; None where that isn't known."""
    leads: bool
    """Whether this process speaks with the user."""

    def length(self, messages: Sequence[Message], begun: str) -> int | None:
        """Tokens of a conversation, the beginning of an answer included; None where that isn't known."""

    def write(self, messages: Sequence[Message], begun: str, sampled: Sampled) -> Generator[Piece, None, None]:
        """The answer to messages, of which the last is the user's. With `begun`, what follows that beginning of it,
        which was this writer's last answer. ValueError for what can't be answered."""

    def agree(self, what: Any) -> Any:
        """Rank 0's object on every rank."""


class Model:
    """A Llama in this process, or on the ranks of torchrun."""

    def __init__(self, llama: Llama) -> None:
        self.llama, self.leads = llama, llama.ranks.leads
        self.context: int | None = llama.model.args.max_seq_len
        self._answer: list[int] = []
        """Tokens of the last answer: its text alone may be encoded to others."""

    def _prompt(self, messages: Sequence[Message], begun: str) -> Prompt:
        from llama.prompts import Prompt, dialog

        prompt = dialog(self.llama.tokenizer, list(messages))
        return Prompt([*prompt.tokens, *(self._answer if begun else [])], prompt.stop, prompt.continues or bool(begun))

    def length(self, messages: Sequence[Message], begun: str) -> int:
        return len(self._prompt(messages, begun).tokens)

    def write(self, messages: Sequence[Message], begun: str, sampled: Sampled) -> Generator[Piece, None, None]:
        prompt = self._prompt(messages, begun)
        settings: dict[str, Any] = {"top_k": sampled.top_k, "stop": sampled.stop, "seed": sampled.seed}
        events = self.llama.stream([prompt], sampled.max_gen_len, sampled.temperature, sampled.top_p, **settings)
        self._answer = list(self._answer) if begun else []
        return self._pieces(events)

    def _pieces(self, events: Generator[Any, None, None]) -> Generator[Piece, None, None]:
        try:
            for event in events:
                self._answer += event.tokens
                yield Piece(event.text, len(event.tokens), event.finish_reason)
        finally:
            events.close()

    def agree(self, what: Any) -> Any:
        return self.llama.ranks.broadcast_object(what)


class Remote:
    """A model behind OpenAI's API."""

    leads = True

    def __init__(self, server: Server) -> None:
        self.server, self.context = server, server.context()

    def length(self, messages: Sequence[Message], begun: str) -> int | None:
        return self.server.length(messages, begun)

    def write(self, messages: Sequence[Message], begun: str, sampled: Sampled) -> Generator[Piece, None, None]:
        from llama.serve.client import dialog

        body: dict[str, Any] = {
            **dialog(messages, begun),
            "max_tokens": sampled.max_gen_len,
            "temperature": sampled.temperature,
            "top_p": sampled.top_p,
            "seed": sampled.seed,
        }
        body |= {"top_k": sampled.top_k} if sampled.top_k else {}
        body |= {"stop": list(sampled.stop)} if sampled.stop else {}
        return self._pieces(self.server.stream("/v1/chat/completions", body))

    def _pieces(self, chunks: Generator[dict[str, Any], None, None]) -> Generator[Piece, None, None]:
        try:
            for chunk in chunks:
                for choice in chunk.get("choices", ()):
                    text, reason = (choice.get("delta") or {}).get("content") or "", choice.get("finish_reason")
                    if text or reason:
                        yield Piece(text, int(bool(text)), reason)
        finally:
            chunks.close()

    def agree(self, what: Any) -> Any:
        return what
