"""A Code Llama from scratch in PyTorch.

The files of this folder are the core, to be read in this order: config, rope, cache, parallel, model (the
architecture); tokenizer, prompts, sampling (text in, tokens out); checkpoint, lookup, requests, decoding, generation
(what runs it). Its edges are arguments, errors, system, control, front and cli. Folders are rooms around it.

    from llama import Llama, load
    Llama.build().text_completion(["def fibonacci(n):"])
    load(quantize="int8", fast=True)  # the same, in words
"""

from llama.cache import KVCache
from llama.checkpoint import Checkpoint
from llama.config import PRESETS, ModelArgs
from llama.decoding import Loop
from llama.errors import LostRank, NotFinite, QueueFull
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
    "Dialog",
    "Event",
    "KVCache",
    "Llama",
    "Loop",
    "LostRank",
    "Message",
    "ModelArgs",
    "NotFinite",
    "Prompt",
    "QueueFull",
    "Request",
    "Sampling",
    "Tokenizer",
    "Transformer",
    "load",
]
