"""The fast version of the model: the same numbers in fewer and better steps. model.py stays the one to read.

from llama import load

llama = load(fast=True)
"""

from llama.fast.block import FusedBlock, FusedNorm, Turn
from llama.fast.compiled import compile_
from llama.fast.packing import join, put_
from llama.fast.step import put_steps_
from llama.model import Transformer, TransformerBlock

__all__ = ["compile_", "prepare_", "speed_up_"]


def speed_up_(model: Transformer) -> Transformer:
    """Puts a `FusedBlock` in the place of each block, one after the other, so that no second copy of the weights is
    ever whole, and where there are kernels takes a step of a few tokens in one call; for inference only. A model may be
    quantised before, not after."""
    turn = Turn()
    for i, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock), "a model is made fast once"
        model.layers[i] = FusedBlock(block, model.args.n_heads // model.output.ranks, turn)
    put_(model.output, join([model.output]))
    put_steps_(model)
    model.norm.forward = FusedNorm(model.norm)  # type: ignore[method-assign]
    return model


def prepare_(model: Transformer, chunk: int, fast: bool, compile: bool, progress: bool, lookup: int = 0) -> None:
    """What `fast=…` and `compile=…` do to a loaded model: fused blocks, then compiled. `chunk` and `lookup` are the
    loop's: the most tokens of a prompt read at once, and the most proposed after a row's last."""
    if fast:
        speed_up_(model)
    if compile:
        compile_(model, chunk, progress, lookup)
