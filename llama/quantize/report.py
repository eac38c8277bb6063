"""What a scheme costs and what it loses: bytes, bits a weight, perplexity on held-out code, and the largest error.

A checkpoint is measured in bfloat16 as it is, then with each scheme, on the same texts in the same windows (those of
`codellama evals compression`). Perplexity is e to the mean loss of a token. Its change is a ratio of two that were
measured token for token on the same text, so it is known far better than either: the interval is a bootstrap over
files of the difference in loss. The largest logit error is the greatest difference of any score of any token from
the bfloat16 model's, over the beginnings of some of the files; its unit is the scores' own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama.checkpoint import Weights
from llama.evals.compression import nats_of
from llama.evals.intervals import Estimate, ratio
from llama.evals.sources import Source
from llama.generation import Llama
from llama.model import Transformer
from llama.quantize.layers import linears, quantize_load
from llama.quantize.schemes import Quantized, Scheme, for_weight

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Loss:
    """Of one scheme, or of none, on one checkpoint."""

    scheme: str
    """"bfloat16": as it is."""
    size: int
    """Bytes of all parameters, on this rank."""
    bits: float
    """For each weight of a linear layer, on average."""
    perplexity: float
    change: Estimate
    """Of the perplexity against bfloat16's, as a share: 0.01 is one per cent more."""
    logit_error: float


@dataclass(frozen=True)
class Texts:
    """What is measured on, as ids."""

    sequences: list[list[int]]
    """Whole files, without bos."""
    length: int
    """Of a window, in tokens, bos included."""
    compared: int = 16
    """Of so many files, the first window's scores are compared."""


def read_texts(llama: Llama, sources: Sequence[Source], length: int | None = None, most: int | None = None) -> Texts:
    """Source files as ids, each cut to `most` tokens (default: whole)."""
    sequences = [llama.tokenizer.encode(source.text, bos=False, eos=False)[:most] for source in sources]
    return Texts(sequences, length or llama.model.args.max_seq_len)


def losses(
    plain: Llama, checkpoint: Weights, schemes: Sequence[Scheme], texts: Texts, progress: bool = False
) -> list[Loss]:
    """What each scheme loses. `plain` is the checkpoint as a Llama in bfloat16, with which the list begins."""
    assert plain.model.norm.weight.dtype == torch.bfloat16
    stride = texts.length // 2
    base = nats_of(plain, texts.sequences, texts.length, stride, progress)
    scores = _scores(plain, texts)
    tokens = [len(ids) for ids in texts.sequences]
    found = []
    for scheme in (None, *schemes):
        llama = plain if scheme is None else quantized(plain, checkpoint, scheme)
        nats = base if scheme is None else nats_of(llama, texts.sequences, texts.length, stride, progress)
        error = max(float((a - b).abs().max()) for a, b in zip(scores, _scores(llama, texts), strict=True))
        more = ratio([b - a for a, b in zip(base, nats, strict=True)], tokens)
        change = Estimate(math.expm1(more.value), math.expm1(more.low), math.expm1(more.high), more.n)
        perplexity = math.exp(math.fsum(nats) / sum(tokens))
        found.append(Loss(str(scheme or "bfloat16"), *sizes(llama.model), perplexity, change, error))
    return found


def quantized(plain: Llama, checkpoint: Weights, scheme: Scheme) -> Llama:
    """Another Llama of the same checkpoint, tokenizer, ranks and limits."""
    with torch.device("meta"):
        model = Transformer(plain.model.args)
    quantize_load(model, checkpoint, plain.ranks, plain.model.norm.weight.dtype, scheme)
    return Llama(model, plain.tokenizer, ranks=plain.ranks, prefill_chunk=plain.prefill_chunk)


@torch.inference_mode()
def _scores(llama: Llama, texts: Texts) -> list[Tensor]:
    """(T, V) of the first window of some files."""
    found = []
    for ids in texts.sequences[: texts.compared]:
        window = [llama.tokenizer.bos_id, *ids[: texts.length - 1]]
        found.append(llama.model(torch.tensor([window], device=llama.ranks.device))[0])
    return found


def sizes(model: Transformer) -> tuple[int, float]:
    """Bytes of all parameters on this rank, and bits for each weight of a linear layer."""
    layers = linears(model)
    other = sum(p.nbytes for name, p in model.named_parameters() if name not in layers)
    linear = weights = 0
    for layer in layers.values():
        product = layer.product
        own = list(product.stored.values()) if isinstance(product, Quantized) else [layer.weight]
        linear += sum(tensor.nbytes for tensor in own)
        weights += math.prod(product.shape if isinstance(product, Quantized) else layer.weight.shape)
    return other + linear, 8 * linear / weights


def possible(scheme: Scheme, model: Transformer) -> bool:
    """Whether every linear layer of a plain model has a shape that the scheme can keep, and its library is there."""
    try:
        for name, columns in {(name, layer.weight.shape[1]) for name, layer in linears(model).items()}:
            for_weight(scheme, name).quantize(torch.zeros(1, columns, device="cpu"))
    except ValueError:
        return False
    return True


def draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """The change of perplexity by bits a weight, in one colour for each checkpoint."""
    axes = figure.subplots()
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        own = [row for row in rows if row["checkpoint"] == name]
        bits, change = [row["bits"] for row in own], [100 * row["change"] for row in own]
        below = [100 * (row["change"] - row["low"]) for row in own]
        above = [100 * (row["high"] - row["change"]) for row in own]
        axes.errorbar(bits, change, yerr=[below, above], fmt="o", capsize=3, label=name)
        for row, x, y in zip(own, bits, change, strict=True):
            axes.annotate(row["scheme"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="bits for each weight of a linear layer", ylabel="perplexity above bfloat16's, %", xscale="log")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.legend()
