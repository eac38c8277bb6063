"""A transformer block in half the steps, put in the place of the plain one from outside.

What costs time besides the matrices is every single operation: a few microseconds each, and a small model has nothing
else to do. So matrices that read the same vector are one (wq, wk and wv; w1 and w3), q and k are rotated together, as
complex numbers or in one pass of the kernels, a norm takes three calls instead of eight, and attention makes no mask
where none is needed. It is for inference: the weights are packed (packing.py), and can't be trained or saved any more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import Span
from llama.fast.attention import attend
from llama.fast.packing import Product, join, put_
from llama.kernels import prompt
from llama.model import Attend, Extend, RMSNorm, TransformerBlock
from llama.parallel import RowParallelLinear


class FusedBlock(nn.Module):
    """What a TransformerBlock computes, from its weights, which it takes over."""

    def __init__(self, block: TransformerBlock, n_heads: int, turn: Turn) -> None:
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.head_dim, self.n_heads = attention.head_dim, n_heads
        self.attention_norm, self.ffn_norm = FusedNorm(block.attention_norm), FusedNorm(block.ffn_norm)
        self.turn = turn
        self.wqkv = join([attention.wq, attention.wk, attention.wv])
        self.w13 = join([feed_forward.w1, feed_forward.w3])
        self.wo, self.w2 = _summed(attention.wo), _summed(feed_forward.w2)
        self.attend: Attend = attend

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], span: Span, extend: Extend) -> Tensor:
        """(B, T, dim) to (B, T, dim)."""
        B, T = x.shape[:2]
        heads = self.wqkv(self.attention_norm(x)).view(B, T, -1, self.head_dim)
        kv_heads = (heads.shape[2] - self.n_heads) // 2
        turning, v = heads.split_with_sizes((self.n_heads + kv_heads, kv_heads), dim=2)
        q, k = self.turn(turning, rotation).split_with_sizes((self.n_heads, kv_heads), dim=2)  # (B, T, H or K, D)
        keys, values = extend(k, v)
        out = self.attend(q.transpose(1, 2), keys, values, span)  # (B, H, T, D)
        h: Tensor = x + self.wo(out.transpose(1, 2).reshape(B, T, -1))
        return h.add_(self.w2(gated(self.w13(self.ffn_norm(h)))))


def gated(both: Tensor) -> Tensor:
    """silu(gate)·proposal of (..., 2·hidden), the gates first."""
    if not torch.compiler.is_compiling() and prompt.in_one_pass(both):
        return prompt.gated(both)
    gate, proposal = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(proposal)


class Turn:
    """rope.py's `rotate`: by the kernels, or each pair as a complex number, in one multiplication. Its factors, the
    same for all blocks of a step, are made by the first."""

    def __init__(self) -> None:
        self._made_of: Tensor | None = None
        self._factors = torch.empty(0, device="cpu")

    def __call__(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, T, H, D) is no longer needed afterwards."""
        if not torch.compiler.is_compiling() and prompt.in_one_pass(x):
            return prompt.turn_(x, *rotation)
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self._of(rotation)).flatten(-2).type_as(x)

    def _of(self, rotation: tuple[Tensor, Tensor]) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.complex(*rotation)
        if rotation[0] is not self._made_of:
            self._made_of, self._factors = rotation[0], torch.complex(*rotation)
        return self._factors


def _summed(linear: RowParallelLinear) -> Product | RowParallelLinear:
    """The layer itself, which sums over the ranks, or what there is to it in one process."""
    put_(linear, join([linear]))
    return linear if linear.ranks > 1 else linear.product


class FusedNorm:
    """RMSNorm. Of x and -x together the mean is 0 and the variance is the mean square of x, so on a CPU it is half of
    a layer norm, for which PyTorch has a kernel there; of RMSNorm itself it makes eight steps."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of what is normalised, if it is not the weight's."""
        self.weight, self.eps = norm.weight.detach().to(dtype), norm.eps
        self.both = torch.cat((self.weight, self.weight))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        dim = x.shape[-1]
        if not x.is_cpu or torch.compiler.is_compiling():
            return F.rms_norm(x, (dim,), self.weight, self.eps)
        return F.layer_norm(torch.cat((x, -x), -1), (2 * dim,), self.both, None, self.eps).narrow(-1, 0, dim)
