"""Which tensors a checkpoint of an architecture holds, and of what shape: whole, and in each of any number of shards.

And the architecture itself, read from a folder's params.json or config.json without a look at the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import recut
from llama.config import ModelArgs
from llama.interop.huggingface import sizes
from llama.tokenizer import Tokenizer

Shape = tuple[int, ...]


def whole_shapes(args: ModelArgs) -> dict[str, Shape]:
    """The shape of every parameter, by Meta's names."""
    d, hidden = args.dim, args.hidden_dim
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    block: dict[str, Shape] = {
        "attention.wq": (q, d),
        "attention.wk": (kv, d),
        "attention.wv": (kv, d),
        "attention.wo": (d, q),
        "feed_forward.w1": (hidden, d),
        "feed_forward.w2": (d, hidden),
        "feed_forward.w3": (hidden, d),
        "attention_norm": (d,),
        "ffn_norm": (d,),
    }
    layers = {f"layers.{i}.{name}.weight": shape for i in range(args.n_layers) for name, shape in block.items()}
    vocabulary = (args.vocab_size, d)
    return {"tok_embeddings.weight": vocabulary, **layers, "norm.weight": (d,), "output.weight": vocabulary}


def shard_shapes(args: ModelArgs, n_shards: int, shard: int = 0) -> dict[str, Shape]:
    """Those of one of `n_shards`. ValueError, as of checkpoint.recut, where the model can't be cut into so many."""
    shapes = {}
    for name, shape in whole_shapes(args).items():
        whole = torch.empty(shape, device="meta")
        shapes[name] = tuple(recut(name, [whole], shard, n_shards, args.n_kv_heads, args.head_dim).shape)
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds. ValueError, without the path, where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"JSON, but {type(found).__name__} instead of an object")
    return found


def args_of(description: Path, **limits: Any) -> ModelArgs:
    """The architecture in a params.json or config.json; its vocab_size is -1 where the file has none. ValueError,
    without the path, for what the file can't mean."""
    found = read_json(description)
    if description.name == "config.json":
        return ModelArgs(**sizes(found), vocab_size=found.get("vocab_size", -1), **limits)
    return ModelArgs.from_params(found, **limits)[0]


def read_args(folder: Path, **limits: Any) -> ModelArgs:
    """The architecture of a folder that need not hold weights. A vocabulary that the file does not tell, as in the
    published ones, is the tokenizer's. ValueError that names the file."""
    for name in ("params.json", "config.json"):
        path = folder / name
        if path.is_file():
            try:
                args = args_of(path, **limits)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if args.vocab_size < 1:
                args.vocab_size = Tokenizer(folder / "tokenizer.model").n_words
            return args
    raise ValueError(f"{folder} holds neither params.json nor config.json: pass the folder of a checkpoint")
