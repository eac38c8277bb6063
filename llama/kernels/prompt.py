"""What a prompt needs besides products, by the kernels: attention without any score in memory, and what PyTorch takes
several passes over memory for in bfloat16."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llama.kernels import library
from llama.kernels.library import available
from llama.kernels.matrix import PLAIN


def in_one_pass(x: Tensor) -> bool:
    """Whether `turn_` and `gated` take x (..., C): there is no way back through them."""
    return not x.requires_grad and x.is_cpu and x.dtype == torch.bfloat16 and x.shape[-1] % 32 == 0 and available()


def turn_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope.py's `rotate`, in place: heads (B, T, H, D) bfloat16, whose heads lie one after the other; cos and sin
    (B or 1, T, 1, D/2) float32. D is a multiple of twice the kernels' lanes."""
    B, T, H, D = heads.shape
    assert heads.stride()[2:] == (D, 1)
    assert heads.stride(0) == T * heads.stride(1)
    cos, sin = cos.contiguous(), sin.contiguous()
    angle_row = 0 if len(cos) == 1 else T * D // 2
    pointers, threads = [t.data_ptr() for t in (heads, cos, sin)], torch.get_num_threads()
    library.load().turn(pointers[0], B, T, H, D, heads.stride(1), pointers[1], pointers[2], angle_row, threads)
    return heads


def gated(x: Tensor) -> Tensor:
    """silu(gate)·proposal: x (..., 2·hidden) bfloat16, the gates first, to (..., hidden). `hidden` is a multiple of
    the kernels' lanes."""
    x, hidden = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], hidden)
    library.load().gate(x.data_ptr(), out.numel() // hidden, hidden, out.data_ptr(), torch.get_num_threads())
    return out


def quickest(q: Tensor) -> bool:
    """Whether the kernels are the quickest way for queries (B, H, T, D): where vectors have 512 bits and, if these are
    in bfloat16, the processor multiplies in it. In narrower ones PyTorch's fused kernel is as quick (docs/LOG.md)."""
    if q.requires_grad or not q.is_cpu or q.dtype not in PLAIN or q.shape[-1] % 16 or not available():
        return False
    kernels = library.load()
    return kernels.lanes() == 16 and (q.dtype == torch.float32 or bool(kernels.multiplies_bfloat16()))


def attend(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """softmax(q·k / sqrt(D))·v: q (B, H, T, D), keys and values (B, K, S, D), all of one dtype, float32 or bfloat16,
    to (B, H, T, D). Each row's first token stands at its `starts` (B) and sees the slots up to its own, the next one
    more.

    D is a multiple of the kernels' lanes. Softmax and sums are in float32; its weights meet the values in their dtype.
    """
    B, H, T, D = q.shape
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"queries are {q.dtype}, keys {keys.dtype} and values {values.dtype}: they must be of one dtype, so make "
            "the cache in the model's"
        )
    q, keys, values = (t if t.stride()[-1] == 1 else t.contiguous() for t in (q, keys, values))
    if keys.stride() != values.stride() or keys.stride(2) != D:
        keys, values = keys.contiguous(), values.contiguous()
    out = torch.empty(B, T, H, D, dtype=q.dtype, device="cpu")
    first = starts.to(torch.int64).contiguous()
    prompt = library.Prompt(kind=PLAIN[q.dtype], rows=B, tokens=T, heads=H, kv_heads=keys.shape[1], head_dim=D)
    prompt.q, prompt.keys, prompt.values, prompt.out, prompt.starts = (
        tensor.data_ptr() for tensor in (q, keys, values, out, first)
    )
    prompt.q_row, prompt.q_head, prompt.q_token, _ = q.stride()
    prompt.kv_row, prompt.kv_head, *_ = keys.stride()
    prompt.threads = torch.get_num_threads()
    library.load().attend_prompt(ctypes.byref(prompt))
    return out.transpose(1, 2)
