"""The fast version of the model: the same numbers in fewer and better steps. model.py stays the one to read.

from llama import Llama

llama = Llama.build(fast=True)
"""

from llama.fast.block import speed_up_
from llama.fast.compiled import compile_
from llama.model import Transformer

__all__ = ["compile_", "prepare_", "speed_up_"]


def prepare_(model: Transformer, chunk: int, fast: bool, compile: bool, progress: bool) -> None:
    """What `Llama.build(fast=…, compile=…)` does to a loaded model: fused blocks, then compiled."""
    if fast:
        speed_up_(model)
    if compile:
        compile_(model, chunk, progress)
