"""A prompt's attention by the kernels: many queries a row, without any score in memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llama.kernels import library
from llama.kernels.library import available
from llama.kernels.matrix import PLAIN


def quickest(q: Tensor) -> bool:
    """Whether the kernels are the quickest way for queries (B, H, T, D): where vectors have 512 bits. In narrower ones
    PyTorch's fused kernel is as quick (docs/LOG.md)."""
    return q.is_cpu and q.dtype in PLAIN and available() and library.load().lanes() == 16 and q.shape[-1] % 16 == 0


def attend(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """softmax(q·k / sqrt(D))·v: q (B, H, T, D), keys and values (B, K, S, D), all of one dtype, float32 or bfloat16,
    to (B, H, T, D). Each row's first token stands at its `starts` (B) and sees the slots up to its own, the next one
    more.

    D is a multiple of the kernels' lanes. Softmax and sums are in float32; its weights meet the values in their dtype.
    """
    B, H, T, D = q.shape
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
