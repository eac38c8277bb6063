"""Models to measure that nobody trained: any shape, with random weights made where they stay.

Speed hardly depends on what the weights are, so a 34B can be measured without a download, or some of its layers on a
machine that can't hold them all. The weights are drawn in the dtype and on the device they are used in; there is never
a second copy. To draw billions of normal numbers would take minutes, so a few million are drawn and repeated. Their
number is prime: no two rows of a matrix begin alike, and no two layers.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.config import PRESETS, ModelArgs
from llama.generation import EMBEDDED
from llama.model import Transformer
from llama.parallel import INIT_STD
from llama.tokenizer import Tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    **PRESETS,
    "S": {"dim": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 32016},
    "M": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "hidden_dim": 5632, "vocab_size": 32016},
}
"""The published sizes, and two for small machines: 110 M and 1.1 B parameters."""
DRAWN = 4_194_301  # the largest prime below 2**22


def shape_args(preset: str, layers: int | None = None) -> ModelArgs:
    """The architecture of a preset, or of its first `layers` layers. ValueError for others than there are."""
    if preset not in SHAPES:
        raise ValueError(f"there is no preset {preset}; choose {', '.join(SHAPES)}")
    args = ModelArgs(**SHAPES[preset])
    if layers is not None and not 1 <= layers <= args.n_layers:
        raise ValueError(f"{layers} layers of {preset}; it has 1 to {args.n_layers}")
    args.n_layers = layers or args.n_layers
    return args


def random_model(args: ModelArgs, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """A model with random weights, its ranks' own shards where there are several; norms are 1.

    The same arguments give the same weights. Their number is that of the trained ones, their size that of freshly
    made ones (INIT_STD), so scores stay finite.
    """
    with torch.device("meta"):
        model = Transformer(args)
    draw = torch.Generator(device).manual_seed(seed)
    numbers = torch.empty(DRAWN, device=device).normal_(std=INIT_STD, generator=draw).to(dtype)
    weights: dict[str, Tensor] = {}
    begin = 0
    for name, parameter in model.named_parameters():
        weights[name] = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() == 1:
            weights[name].fill_(1.0)
        else:
            begin = _repeat_(weights[name], numbers, begin)
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False)
    return model


def _repeat_(weight: Tensor, numbers: Tensor, begin: int) -> int:
    """Fills `weight` with `numbers` from `begin` on, over and over; returns where it stopped."""
    flat, at = weight.view(-1), 0
    while at < len(flat):
        part = numbers[begin : begin + len(flat) - at]
        flat[at : at + len(part)] = part
        at, begin = at + len(part), (begin + len(part)) % len(numbers)
    return begin


def write_tokenizer(words: int, path: Path) -> None:
    """A tokenizer.model for a model of `words` words: the embedded one, with as many more pieces that no text contains.

    So what such a model writes can be put into text, as a user's loop does, whatever ids it chooses. A tokenizer.model
    is a message of protocol buffers whose field 1 is repeated: pieces are added by writing them behind it.
    """
    embedded = EMBEDDED / "tokenizer.model"
    more = range(Tokenizer(embedded).n_words, words)
    path.write_bytes(embedded.read_bytes() + b"".join(_piece(f"\ue000{i}") for i in more))


def tokenizer_of(words: int) -> Tokenizer:
    """The tokenizer that `write_tokenizer` makes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "tokenizer.model")
        write_tokenizer(words, path)
        return Tokenizer(path)


def _piece(text: str) -> bytes:
    """ModelProto.pieces: {1: the text, 2: its score}."""
    name = text.encode()
    message = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", -1e9)
    return b"\x0a" + bytes([len(message)]) + message
