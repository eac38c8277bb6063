"""One linear layer, by every scheme: the time of a product beside F.linear in bfloat16, and how much faster it is.

`python -m llama.quantize.bench_linear --shape 5632,2048 --rows 1,8,512 --device cpu`. Each figure is the median of
interleaved rounds, in each of which every scheme has its turn, so that what else the machine does falls on all alike;
the spread is from the first to the third quartile. Weights go round among copies that together exceed the caches, as
those of a model's many layers do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cli import run
from llama.evals.record import tell
from llama.evals.table import render
from llama.options import Count, Counts, Device, Schemes
from llama.quantize.schemes import scheme_of

WORDS = ("int8", "int8-dynamic", "int4:32", "int4:128", "int4-dynamic:32", "nf4")
ENOUGH = 256 * 2**20
"""Bytes of weights that no cache holds."""


def times(
    shape: tuple[int, int], rows: int, words: Sequence[str] = WORDS, rounds: int = 15, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds for one product, of each round: "bfloat16" and each scheme."""
    N, K = shape
    weight = (torch.randn(N, K) / K**0.5).to(device, torch.bfloat16)
    copies = max(2, ENOUGH // weight.nbytes)
    products: dict[str, list[Callable[[Tensor], Tensor]]] = {"bfloat16": []}
    for _ in range(copies):
        own = weight.clone()
        products["bfloat16"].append(lambda x, own=own: F.linear(x, own))  # type: ignore[misc]
    for word in words:
        stored = scheme_of(word).quantize(weight)
        copied = ({key: tensor.clone() for key, tensor in stored.items()} for _ in range(copies))
        products[word] = [scheme_of(word).product(one) for one in copied]
    x = torch.randn(rows, K).to(device, torch.bfloat16)
    found: dict[str, list[float]] = {name: [] for name in products}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, layers in products.items():
                took = _seconds(layers[: max(2, copies if rows < 64 else 2)], x)
                if turn >= 2:  # the first warm up
                    found[name].append(took)
    return found


def _seconds(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(layers)


def main(
    *,
    shape: Counts = (5632, 2048),
    rows: Counts = (1, 8, 512),
    schemes: Schemes = WORDS,
    rounds: Count = 15,
    device: Device = "cpu",
    json: bool = False,
) -> None:
    """Microseconds of a linear layer by every scheme, and how many times as fast as in bfloat16.

    Args:
        shape: outputs and inputs of the layer: 5632,2048.
        rows: tokens that are multiplied at once.
        schemes: of quantisation.
        rounds: in each of which every scheme has its turn.
        device: where.
        json: print JSON instead of the table.
    """
    if len(shape) != 2 or not rows or rounds < 2:
        raise ValueError(f"--shape {shape}, --rows {rows}, --rounds {rounds}: give OUTPUTS,INPUTS; a row; 2 rounds")
    for word in schemes:
        scheme_of(word)
    every = {n: times((shape[0], shape[1]), n, schemes, rounds, device) for n in rows}
    table = []
    for name in ("bfloat16", *schemes):
        cells = []
        for n in rows:
            low, middle, high = (1e6 * value for value in statistics.quantiles(every[n][name], n=4))
            ratio = statistics.median(every[n]["bfloat16"]) / statistics.median(every[n][name])
            cells.append(f"{middle:,.0f} ({low:,.0f}–{high:,.0f}) {ratio:.2f} x")
        table.append((name, *cells))
    text = render((f"{shape[0]} x {shape[1]}, µs", *(f"{n} row{'s' * (n > 1)}" for n in rows)), table)
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": device, "rounds": rounds}
    tell(text, {"measure": "linear", "shape": list(shape), **facts, "seconds": every}, json)


if __name__ == "__main__":
    run(main, "python -m llama.quantize.bench_linear")
