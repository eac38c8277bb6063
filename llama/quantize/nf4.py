"""nf4, the 4 bits of QLoRA (arXiv 2305.14314, section 3), through bitsandbytes.

Its 16 levels are fixed, quantiles of a normal distribution, since weights are nearly normal; 64 neighbours share their
largest absolute value, by which the levels are multiplied. The library makes the codes. On a CPU the kernels of
llama/kernels multiply by them; where there are none, and with AVX512-BF16, the library's own, which wants an order of
its own. It comes with `pip install 'codellama[bnb]'`.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llama.quantize.codes import two_in_a_byte
from llama.quantize.operators import NF4_KERNEL, Operator, Packed, Stored

GROUP = 64
"""Weights that share a largest absolute value: the library's default."""


@cache
def bitsandbytes() -> Any:
    """The library. ValueError where it is missing."""
    # On a CPU it warns at import that it would rather have yet another package.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes as library
    except ImportError:
        raise ValueError("nf4 needs a package: pip install 'codellama[bnb]'") from None
    finally:
        logger.setLevel(before)
    return library


def to_nf4(rows: Tensor) -> Stored:
    """Float32 rows (N, K) to codes, two in a byte (N, K/2), and the largest absolute value of each 64 columns, rounded
    to bfloat16 (N, K/64)."""
    codes, state = bitsandbytes().functional.quantize_4bit(rows.contiguous(), blocksize=GROUP, quant_type="nf4")
    return {"codes": codes.view(len(rows), -1), "absmax": state.absmax.view(len(rows), -1).bfloat16()}


def from_nf4(stored: Stored) -> Tensor:
    functional = bitsandbytes().functional
    out: Tensor = functional.dequantize_4bit(stored["codes"].reshape(-1, 1), _state(stored, torch.float32))
    return out


def _state(stored: Stored, dtype: torch.dtype) -> Any:
    functional = bitsandbytes().functional
    codes = stored["codes"]
    shape = torch.Size((len(codes), 2 * codes.shape[1]))
    levels = functional.get_4bit_type("nf4", device=codes.device)
    return functional.QuantState(stored["absmax"].float().flatten(), shape, levels, GROUP, "nf4", dtype)


def _takes_cpu(stored: Stored) -> bool:
    if stored["codes"].device.type != "cpu" or len(stored["codes"]) % 32:
        return False
    functional = bitsandbytes().functional
    return hasattr(functional, "_convert_weight_packed_for_cpu") and bool(functional.has_avx512bf16())


def _pack_cpu(stored: Stored) -> Packed:
    functional = bitsandbytes().functional
    state = _state(stored, torch.bfloat16)
    codes, state = functional._convert_weight_packed_for_cpu(stored["codes"].flatten(), state)
    return {"codes": codes, "absmax": state.absmax, "levels": state.code}


def _multiply_cpu(packed: Packed, x: Tensor) -> Tensor:
    codes, absmax = packed["codes"], packed["absmax"]
    shape = (len(codes), 2 * codes.shape[1])
    out: Tensor = torch.ops.bitsandbytes.gemv_4bit(x.contiguous(), codes, shape, absmax, packed["levels"], GROUP)
    return out


def _unpack_cpu(packed: Packed) -> Stored:
    # Blocks of 32 rows; in each, pair after pair of columns; of a pair's 64 codes, the first 32 in the lower halves.
    N, half = packed["codes"].shape
    bytes_ = packed["codes"].reshape(-1, 32)
    codes = torch.cat((bytes_ & 15, bytes_ >> 4), -1).view(N // 32, half, 32, 2).transpose(1, 2).reshape(N, 2 * half)
    return {"codes": two_in_a_byte(codes), "absmax": packed["absmax"].t().contiguous()}


def _takes_cuda(stored: Stored) -> bool:
    return stored["codes"].device.type == "cuda"


def _multiply_cuda(packed: Packed, x: Tensor) -> Tensor:
    out: Tensor = bitsandbytes().matmul_4bit(x, packed["codes"].reshape(-1, 1), _state(packed, x.dtype))
    return out


OPERATORS = (
    NF4_KERNEL,
    Operator(_takes_cpu, _pack_cpu, _multiply_cpu, _unpack_cpu),
    Operator(_takes_cuda, lambda stored: stored, _multiply_cuda, lambda packed: packed, None),
)
"""The kernels, the library's own for a CPU with AVX512-BF16, and its own for CUDA (written from its documentation, not
run on such a card yet)."""
