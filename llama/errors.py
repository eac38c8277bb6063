"""Errors of our own types, for those who want to tell them apart. What a user got wrong is a plain ValueError."""

from __future__ import annotations


class QueueFull(ValueError):
    """As many requests wait as may wait."""


class NotFinite(ValueError):
    """A logit is NaN or infinite: nothing can be chosen."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are NaN or infinite: its weights are damaged, or overflow in this dtype; verify the "
            "files (codellama check), or choose another --dtype (bfloat16 or float32)"
        )


class LostRank(RuntimeError):
    """Another rank of this run has ended, or does not answer."""
