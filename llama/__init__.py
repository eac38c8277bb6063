"""A Code Llama from scratch in PyTorch.

The files of this folder are the core, to be read in this order: config, rope, cache, parallel, model (the
architecture); tokenizer, prompts, sampling (text in, tokens out); checkpoint, decoding, generation (what runs it); cli
(the commands). Folders are rooms around it.

    from llama import Llama
    Llama.build().text_completion(["def fibonacci(n):"])
"""

from llama.cache import KVCache
from llama.checkpoint import Checkpoint
from llama.config import PRESETS, ModelArgs
from llama.decoding import Event
from llama.generation import Llama
from llama.model import Transformer
from llama.prompts import Dialog, Message, Prompt
from llama.sampling import Sampling
from llama.tokenizer import Tokenizer

__all__ = [
    "PRESETS",
    "Checkpoint",
    "Dialog",
    "Event",
    "KVCache",
    "Llama",
    "Message",
    "ModelArgs",
    "Prompt",
    "Sampling",
    "Tokenizer",
    "Transformer",
]
