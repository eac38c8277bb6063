"""One linear layer, by every scheme: the time of a product beside F.linear in bfloat16, and how much faster it is.

`python -m llama.quantize.bench_linear --shape 5632,2048 --rows 1,8,512 --device cpu`. Each figure is the median of
interleaved rounds, in each of which every scheme has its turn, so that what else the machine does falls on all alike;
the spread is from the first to the third quartile. Weights go round among copies that together exceed the caches, as
those of a model's many layers do.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence

import fire
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.evals.table import render
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
    shape: Sequence[int] = (5632, 2048),
    rows: Sequence[int] | int = (1, 8, 512),
    schemes: Sequence[str] | str = WORDS,
    rounds: int = 15,
    device: str = "cpu",
) -> None:
    """Prints a table of microseconds, of speeds relative to bfloat16's, and one line of JSON last."""
    words = [schemes] if isinstance(schemes, str) else list(schemes)
    asked = [rows] if isinstance(rows, int) else list(rows)
    every = {n: times((shape[0], shape[1]), n, words, rounds, device) for n in asked}
    table = []
    for name in ("bfloat16", *words):
        cells = []
        for n in asked:
            low, middle, high = (1e6 * value for value in statistics.quantiles(every[n][name], n=4))
            ratio = statistics.median(every[n]["bfloat16"]) / statistics.median(every[n][name])
            cells.append(f"{middle:,.0f} ({low:,.0f}–{high:,.0f}) {ratio:.2f} x")
        table.append((name, *cells))
    print(render((f"{shape[0]} x {shape[1]}, µs", *(f"{n} row{'s' * (n > 1)}" for n in asked)), table))
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": device, "rounds": rounds}
    print(json.dumps({"measure": "linear", "shape": list(shape), **facts, "seconds": every}))


if __name__ == "__main__":
    fire.Fire(main)
