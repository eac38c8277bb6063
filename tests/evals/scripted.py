"""A Llama that says what it is told to: its jobs are replaced, its tokenizer and limits are real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llama.generation import Llama

Say = Callable[..., str]


def script(llama: Llama, monkeypatch: pytest.MonkeyPatch, job: str, say: Say, finish_reason: str = "stop") -> list[Any]:
    """Lets `llama.<job>` answer each prompt with `say(prompt)`; returns the list of the calls' keyword arguments."""
    calls: list[Any] = []

    def answer(*prompts: Any, **settings: Any) -> list[dict[str, Any]]:
        calls.append(settings)
        columns = [column for column in prompts if isinstance(column, Sequence)]
        texts = [say(*row) for row in zip(*columns, strict=True)]
        chat = job == "chat_completion"
        return [
            {"generation": {"role": "assistant", "content": text} if chat else text, "finish_reason": finish_reason}
            for text in texts
        ]

    monkeypatch.setattr(llama, job, answer)
    return calls
