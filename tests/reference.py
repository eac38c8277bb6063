"""The oracle: Llama as one plain function in float64, written from the architecture and for nothing but being right.

No cache, no parallelism, no fused kernel: every position is computed from all positions before it, rotations are
complex numbers, grouped heads are repeated, the softmax is spelled out under a triangular mask. Whatever path the
package takes (chunks, rows of unequal length, decoding, several ranks), it must arrive at these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama.config import ModelArgs

MakeModel = Callable[..., tuple[Any, dict[str, Tensor]]]  # the type of the fixture make_model


def llama(
    args: ModelArgs, weights: dict[str, Tensor], tokens: Tensor, inv_freq: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Logits (B, T, V), float64, of tokens (B, T); weights by Meta's names. Gradients flow to float64 weights.

    `inv_freq` (D/2,) replaces the frequencies that follow from rope_theta, and `scale` multiplies the rotation.
    """
    w = {name: weight.double() for name, weight in weights.items()}
    B, T = tokens.shape
    D = args.dim // args.n_heads
    if inv_freq is None:
        inv_freq = torch.tensor([args.rope_theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    turns = scale * torch.exp(1j * torch.outer(torch.arange(T).double(), inv_freq.double()))  # (T, D/2)
    sees = torch.ones(T, T, dtype=torch.bool).tril()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + args.norm_eps).sqrt() * w[name]

    def heads(x: Tensor) -> Tensor:  # (B, T, heads * D) to (B, heads, T, D)
        return x.reshape(B, T, -1, D).permute(0, 2, 1, 3)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * turns
        return torch.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # one head, (B, T, D)
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~sees, -math.inf)
        weight = torch.exp(scores - scores.amax(-1, keepdim=True))
        return weight / weight.sum(-1, keepdim=True) @ v

    x = w["tok_embeddings.weight"][tokens]
    for i in range(args.n_layers):
        at = f"layers.{i}."
        h = norm(x, at + "attention_norm.weight")
        q, k, v = (heads(h @ w[f"{at}attention.{name}.weight"].T) for name in ("wq", "wk", "wv"))
        groups = args.n_heads // k.shape[1]
        q, k, v = rotated(q), rotated(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = torch.cat([attended(q[:, n], k[:, n], v[:, n]) for n in range(args.n_heads)], -1)  # (B, T, H * D)
        x = x + out @ w[at + "attention.wo.weight"].T
        h = norm(x, at + "ffn_norm.weight")
        gate, up = h @ w[at + "feed_forward.w1.weight"].T, h @ w[at + "feed_forward.w3.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[at + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


def random_weights(args: ModelArgs, seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights by Meta's names, loud enough that attention is far from uniform and logits are of order 1."""
    D = args.dim // args.n_heads
    rows = {"wq": args.n_heads * D, "wk": args.n_kv_heads * D, "wv": args.n_kv_heads * D, "wo": args.dim}
    shapes = {f"attention.{name}": (n, args.dim) for name, n in rows.items()} | {
        f"feed_forward.{name}": (args.hidden_dim, args.dim) for name in ("w1", "w3")
    }
    shapes |= {"feed_forward.w2": (args.dim, args.hidden_dim), "attention_norm": (args.dim,), "ffn_norm": (args.dim,)}
    every = {f"layers.{i}.{name}": shape for i in range(args.n_layers) for name, shape in shapes.items()}
    every |= dict.fromkeys(("tok_embeddings", "output"), (args.vocab_size, args.dim)) | {"norm": (args.dim,)}
    draw = torch.Generator().manual_seed(seed)
    noise = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in every.items()}
    return {name: 1 + 0.2 * w if w.dim() == 1 else w * (2 / w.shape[1]) ** 0.5 for name, w in noise.items()}
