"""What the machine could do: how fast it reads memory, and how fast it multiplies.

A decode step must read every weight once, and a prefill must do its multiplications; neither can go faster than the
machine does just that (the roofline: Williams, Waterman and Patterson, CACM 2009). Both limits are measured here, by
PyTorch's own operators and by those that a model may use in their stead, with all threads, and each is the best of a
few ways: a limit that a model could pass would be none. They are tasks like any other, and run in the same rounds as
the models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.bench.rounds import Task, timed
from llama.config import ModelArgs

Pack = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""A weight (out, in) to what multiplies by it, x to x·weightᵀ: plain, or laid out in whatever way is fastest."""
PLAIN: Mapping[str, Pack] = {"": lambda weight: lambda x: F.linear(x, weight)}


@dataclass(frozen=True)
class Probe:
    """A way to use the machine, and how much of it (bytes read, operations done) a call is."""

    task: Task
    amount: float


def bandwidth(
    device: torch.device, gigabytes: float | None = None, ways: Mapping[str, Pack] = PLAIN
) -> dict[str, Probe]:
    """Reading memory, and copying it (read and written bytes both count), on a buffer far larger than any cache:
    1 GB on a CPU, 4 GB on a GPU. Read it is by a sum, and by a product with one vector in all `ways`: how many places
    are read at once makes up to a third. A way that packs holds the buffer twice."""
    size = gigabytes or (4.0 if device.type == "cuda" else 1.0)
    columns = 4096
    source = torch.ones(max(2, int(size * 1e9) // (4 * columns)), columns, device=device)
    half, vector = len(source) // 2, torch.ones(1, columns, device=device)
    target = torch.zeros_like(source[:half])  # written now: its pages exist
    read = float(source.nbytes)
    return {
        "read": Probe(timed(source.sum), read),
        "copy": Probe(timed(lambda: target.copy_(source[:half])), 2.0 * target.nbytes),
        **{f"read, product{way}": Probe(timed(partial(pack(source), vector)), read) for way, pack in ways.items()},
    }


def matmul(
    device: torch.device,
    dtype: str,
    args: ModelArgs,
    tokens: int,
    side: int | None = None,
    ways: Mapping[str, Pack] = PLAIN,
) -> dict[str, Probe]:
    """Products in `dtype` (float32, bfloat16, float16, int8): square, and `tokens` rows by a model's w1; two operations
    a multiplication. Those that this machine's PyTorch lacks are left out, perhaps all."""
    side = side or (8192 if device.type == "cuda" else 2048)
    shapes = {"square": (side, side, side), "layer": (tokens, args.dim, args.hidden_dim)}
    found = {}
    for shape, (rows, inner, columns) in shapes.items():
        for way, product in _products(device, dtype, rows, inner, columns, ways).items():
            try:
                product()
            except (RuntimeError, AttributeError):
                continue
            found[f"{dtype} {shape}{way}"] = Probe(timed(product), 2.0 * rows * inner * columns)
    return found


def _products(
    device: torch.device, dtype: str, rows: int, inner: int, columns: int, ways: Mapping[str, Pack]
) -> dict[str, Callable[[], object]]:
    """Ways to multiply (rows, inner) by (columns, inner) transposed."""
    if dtype == "int8":
        left = torch.randint(-127, 128, (rows, inner), dtype=torch.int8, device=device)
        right = torch.randint(-127, 128, (columns, inner), dtype=torch.int8, device=device)
        return {"": lambda: torch._int_mm(left, right.T)}  # PyTorch has no public name for it
    kind: torch.dtype = getattr(torch, dtype)
    x = torch.randn(rows, inner, device=device).to(kind)
    weight = torch.randn(columns, inner, device=device).to(kind)
    return {way: partial(pack(weight), x) for way, pack in ways.items()}


def best(seconds: Mapping[str, Sequence[float]], probes: Mapping[str, Probe]) -> list[float]:
    """The limit in each round: what the best probe of that round did, per second."""
    rates = [[probes[name].amount / s for s in seconds[name]] for name in probes]
    return [max(one) for one in zip(*rates, strict=True)]
