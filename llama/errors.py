"""Errors of our own types, for those who want to tell them apart.

What a user got wrong is a ValueError, so `except ValueError` catches all of that. Here are the kinds that a program may
want to answer in a way of its own; `except LlamaError` catches these alone.
"""

from __future__ import annotations


class LlamaError(Exception):
    """Each error of this file is one."""


class CheckpointError(LlamaError, ValueError):
    """A checkpoint is missing, incomplete or damaged, or its files don't belong together. The message names them."""


class NotEnoughMemory(LlamaError, ValueError):
    """A run would not fit into the memory that is free. It is noticed before the weights are read."""


class PromptTooLong(LlamaError, ValueError):
    """A prompt has more tokens than the model was built for."""

    def __init__(self, row: int, tokens: int, max_seq_len: int) -> None:
        """`row` is the prompt's place in the call, from 0."""
        super().__init__(row, tokens, max_seq_len)
        self.row, self.tokens, self.max_seq_len = row, tokens, max_seq_len

    def __str__(self) -> str:
        remedy = "shorten it, or build with a larger max_seq_len"
        allowed = f"this model was built for 1 to {self.max_seq_len}"
        return f"prompt {self.row} has {self.tokens} tokens; {allowed}: {remedy}"


class QueueFull(LlamaError, ValueError):
    """As many requests wait as may wait."""


class NotFinite(LlamaError, ValueError):
    """A logit is NaN or infinite: nothing can be chosen."""

    def __str__(self) -> str:
        return (
            "the model's logits are NaN or infinite: its weights are damaged, or overflow in this dtype; verify the "
            "files (codellama check), or choose another --dtype (bfloat16 or float32)"
        )


class LostRank(LlamaError, RuntimeError):
    """Another rank of this run has ended, or does not answer."""
