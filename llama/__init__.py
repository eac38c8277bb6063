"""A Code Llama from scratch in PyTorch.

The files of this folder are the core, to be read in this order: config, rope, cache, parallel, model (the
architecture); tokenizer, prompts, sampling (text in, tokens out); checkpoint, lookup, requests, decoding, generation
(what runs it). Its edges are arguments, errors, system and control; options, front, verbs, terminal, writers, chat and
cli read words. Folders are rooms around it.

    from llama import Llama, load
    Llama.build().text_completion(["def fibonacci(n):"])
    load(quantize="int8", fast=True)  # the same, in words
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llama.cache import KVCache
    from llama.checkpoint import Checkpoint
    from llama.config import PRESETS, ModelArgs
    from llama.decoding import Loop
    from llama.errors import (
        CheckpointError,
        LlamaError,
        LostRank,
        NotEnoughMemory,
        NotFinite,
        PromptTooLong,
        QueueFull,
    )
    from llama.front import load
    from llama.generation import Llama
    from llama.model import Transformer
    from llama.prompts import Dialog, Message, Prompt
    from llama.requests import Event, Request
    from llama.sampling import Sampling
    from llama.tokenizer import Tokenizer

__all__ = [
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "Dialog",
    "Event",
    "KVCache",
    "Llama",
    "LlamaError",
    "Loop",
    "LostRank",
    "Message",
    "ModelArgs",
    "NotEnoughMemory",
    "NotFinite",
    "Prompt",
    "PromptTooLong",
    "QueueFull",
    "Request",
    "Sampling",
    "Tokenizer",
    "Transformer",
    "__version__",
    "load",
]

_PLACES = {
    "cache": ("KVCache",),
    "checkpoint": ("Checkpoint",),
    "config": ("PRESETS", "ModelArgs"),
    "decoding": ("Loop",),
    "errors": (
        "CheckpointError",
        "LlamaError",
        "LostRank",
        "NotEnoughMemory",
        "NotFinite",
        "PromptTooLong",
        "QueueFull",
    ),
    "front": ("load",),
    "generation": ("Llama",),
    "model": ("Transformer",),
    "prompts": ("Dialog", "Message", "Prompt"),
    "requests": ("Event", "Request"),
    "sampling": ("Sampling",),
    "tokenizer": ("Tokenizer",),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is asked for: `codellama --help` needs no PyTorch, which takes a second."""
    place = next((module for module, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    return getattr(import_module(f"llama.{place}"), name)


def __dir__() -> list[str]:
    return __all__
