"""A model's linear layers, quantised: one that is loaded, or one that is being loaded.

Each layer's `product` is replaced and its weight let go, one layer after the other, so that no more than one weight
exists twice. The embedding stays: of it a token reads one row. While a checkpoint is read, weights are quantised as
they come, so the plain ones are never all in memory. On several ranks the codes are the parts of those of one rank:
whole rows are quantised, then cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama.checkpoint import CUT, Checkpoint, Weights, load
from llama.config import ModelArgs
from llama.model import Transformer
from llama.parallel import ColumnParallelLinear, Ranks, RowParallelLinear
from llama.quantize.operators import Stored
from llama.quantize.saved import ENTRY, Saved, cut
from llama.quantize.schemes import Quantized, Scheme, for_weight, scheme_of

Linear = ColumnParallelLinear | RowParallelLinear


def linears(model: nn.Module) -> dict[str, Linear]:
    """The layers that are quantised, by the names of their weights."""
    kinds = (ColumnParallelLinear, RowParallelLinear)
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def quantize_(model: Transformer, scheme: str | Scheme, *, progress: bool = False) -> Transformer:
    """Quantises a loaded model, in place, and returns it. It can't be trained or saved afterwards.

    On several ranks each quantises what it holds; `quantize_load` gives the same codes on any number of them. Raises
    ValueError, naming the tensor, where a weight has a shape that the scheme can't keep, is tied to another, or is
    quantised already; layers before that one are then quantised.
    """
    chosen = scheme_of(scheme)
    layers = linears(model)
    _refuse_tied(model, layers)
    for name, layer in tqdm(layers.items(), desc=str(chosen), leave=False, disable=not progress, delay=2):
        if layer.weight is None:
            raise ValueError(f"{name} is quantised already: load the plain model again")
        own = for_weight(chosen, name)
        _replace(layer, own.product(own.quantize(layer.weight, name), layer.weight.dtype))
    return model


def _replace(layer: Linear, product: Quantized) -> None:
    layer.product = product  # type: ignore[method-assign]
    layer.weight = None  # type: ignore[assignment]


def _refuse_tied(model: nn.Module, layers: dict[str, Linear]) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = owners.setdefault(id(parameter), name)
        if other != name and (name in layers or other in layers):
            raise ValueError(
                f"{name} is tied to {other}: quantised it would no longer be; give it a weight of its own first"
            )


# While a checkpoint is read ------------------------------------------------------------------------------------------


def quantize_load(
    model: Transformer,
    checkpoint: Weights,
    ranks: Ranks,
    dtype: torch.dtype,
    scheme: str | Scheme | None = None,
) -> None:
    """`checkpoint.load` for a model whose linear layers shall be quantised; what isn't is loaded in `dtype`.

    A plain checkpoint of any format is quantised by `scheme`, as it is read. One that was saved quantised is taken as
    it is, and `scheme` may only choose another arithmetic for the same codes (int8-dynamic for int8, int4-dynamic for
    int4). Without either it is `checkpoint.load`. Raises ValueError as that does, and where a weight, or a rank's part
    of it, has a shape that the scheme can't keep.
    """
    if isinstance(checkpoint, Checkpoint) and ENTRY in checkpoint.params:
        checkpoint = Saved(checkpoint.path)
    if isinstance(checkpoint, Saved):
        chosen = checkpoint.scheme_for(scheme)
    elif scheme is None:
        return load(model, checkpoint, ranks, dtype)
    else:
        chosen = scheme_of(scheme)
    layers = linears(model)
    there = set(checkpoint.names())
    if there.issuperset(layers):
        items = tqdm(layers.items(), desc=str(chosen), unit="tensor", delay=2, disable=not ranks.leads, leave=False)
        for name, layer in items:
            own = for_weight(chosen, name)
            stored = _part(checkpoint, name, model.args, ranks, own)
            expected = tuple(layer.weight.shape)
            if own.shape(stored) != expected:
                raise ValueError(
                    f"{name} in {checkpoint.path} is {own.shape(stored)} instead of {expected}: use the "
                    "params.json that came with these weights"
                )
            _replace(layer, own.product({key: t.to(ranks.device) for key, t in stored.items()}, dtype))
        load(model, _Rest(checkpoint, there.difference(layers)), ranks, dtype)
    else:
        load(model, checkpoint, ranks, dtype)  # says what is missing


def _part(checkpoint: Weights, name: str, args: ModelArgs, ranks: Ranks, scheme: Scheme) -> Stored:
    """The stored tensors of this rank's part of a weight."""
    rank, size = ranks.rank, ranks.world_size
    if isinstance(checkpoint, Saved):
        return checkpoint.stored(name, args, rank, size)
    if scheme.group or CUT[name.split(".")[-2]] == 0 or size == 1:
        own = name if size == 1 else f"rank {rank}'s part, of {size}, of {name}"
        return scheme.quantize(checkpoint.tensor(name, args, rank, size).to(ranks.device), own)
    # A row's scale is that of the whole row.
    whole = scheme.quantize(checkpoint.tensor(name, args).to(ranks.device), name)
    return cut(scheme, whole, name, args, rank, size)


class _Rest:
    """Some of a checkpoint's tensors, as a checkpoint."""

    def __init__(self, checkpoint: Weights, names: set[str]) -> None:
        self._checkpoint, self._names = checkpoint, names
        self.path = checkpoint.path

    @property
    def n_shards(self) -> int:
        return self._checkpoint.n_shards

    @property
    def tokenizer_path(self) -> Path:
        return self._checkpoint.tokenizer_path

    def names(self) -> list[str]:
        return [name for name in self._checkpoint.names() if name in self._names]

    def args(self, **limits: Any) -> ModelArgs:
        return self._checkpoint.args(**limits)

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor:
        return self._checkpoint.tensor(name, args, rank, world_size)
