"""A transformer block in half the steps, put in the place of the plain one from outside.

What costs time besides the matrices is every single operation: a few microseconds each, and a small model has nothing
else to do. So matrices that read the same vector are one (wq, wk and wv; w1 and w3), q and k are rotated together, as
complex numbers, the norms are one call each, and attention makes no mask where none is needed. It is for inference: the
weights are packed (packing.py), and can't be trained or saved any more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import Span
from llama.fast.attention import attend
from llama.fast.packing import join, put_
from llama.model import Attend, Extend, RMSNorm, Transformer, TransformerBlock


class FusedBlock(nn.Module):
    """What a TransformerBlock computes, from its weights, which it takes over."""

    def __init__(self, block: TransformerBlock, n_heads: int) -> None:
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.head_dim, self.n_heads = attention.head_dim, n_heads
        self.norms = [_plain(block.attention_norm), _plain(block.ffn_norm)]
        self.wqkv = join([attention.wq, attention.wk, attention.wv])
        self.w13 = join([feed_forward.w1, feed_forward.w3])
        self.wo, self.w2 = attention.wo, feed_forward.w2  # which sum over the ranks
        put_(self.wo, join([self.wo]))
        put_(self.w2, join([self.w2]))
        self.attend: Attend = attend

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], span: Span, extend: Extend) -> Tensor:
        """(B, T, dim) to (B, T, dim)."""
        D = self.head_dim
        mixed = self.wqkv(_norm(x, self.norms[0]))
        qkv = mixed.view(*x.shape[:2], -1, D)  # (B, T, H + 2K, D)
        kv_heads = (qkv.shape[2] - self.n_heads) // 2
        turned = rotate(qkv[:, :, : self.n_heads + kv_heads], *rotation)
        keys, values = extend(turned[:, :, self.n_heads :], qkv[:, :, -kv_heads:])
        out = self.attend(turned[:, :, : self.n_heads].transpose(1, 2), keys, values, span)  # (B, H, T, D)
        h: Tensor = x + self.wo(out.transpose(1, 2).flatten(2))
        gate, proposal = self.w13(_norm(h, self.norms[1])).chunk(2, dim=-1)
        return h.add_(self.w2(F.silu(gate).mul_(proposal)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope.py's `rotate`, each pair as a complex number: one multiplication."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x)


def _plain(norm: RMSNorm) -> tuple[Tensor, float]:
    return norm.weight.detach(), norm.eps


def _norm(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], *norm)


def speed_up_(model: Transformer) -> Transformer:
    """Puts a `FusedBlock` in the place of each block, one after the other, so that no second copy of the weights is
    ever whole; for inference only. A model may be quantised before, not after."""
    for i, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock), "a model is made fast once"
        model.layers[i] = FusedBlock(block, model.args.n_heads // model.output.ranks)
    put_(model.output, join([model.output]))
    return model
