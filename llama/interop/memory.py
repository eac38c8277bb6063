"""What a run takes of each rank's memory, from the architecture alone.

Four things lie in memory. *Weights*: this rank's part of every matrix. *KV cache*: 2 x layers x rows x slots x kv
heads x head_dim numbers, allocated whole before the first token. *Tables*: cos and sin of every position, float32.
And *activations*, which come and go. Their peak is the largest of a few moments of one layer, since a layer's are gone
before the next one's come. With n = B·T new tokens, e bytes a number, d = dim, f = hidden_dim / ranks, q = H·D and
k = K·D of this rank, s = n·d·e (one stream), and w = 4 where e is 2, else 0 (a copy in float32):

    held throughout   mask T·S·e, rotations 4·T·D; both B times where rows stand at different positions
    turning k         2s + n·e·(2q + 2k) + n·k·(w + 8)     x, its norm, q old and new, k, v; pairs in float32
    turning q         2s + n·e·(q + 2k) + n·q·(w + 8)
    attention         2s + n·e·(q + 2k) + n·e·q            and the result; with grouped heads again, put in order
    feed-forward      3s + 3·n·f·e                         x, h, its norm; silu(gate), up and their product
    the norm before   2s + n·d·(8, or 12 where e is 2)     what is normed in float32, and the result

A cache in int8 (longcontext/int8_cache.py) has a scale of 2 bytes for each head and slot, and attention reads floats
that are made of one layer's bytes at a time: 2·S·k·e more in the moment of attention.

On a CPU with AMX a prompt's attention in bfloat16 has copies of keys and values besides, 2·S·q·e / T with q's heads.

With grouped heads and several rows attention has q once more, and where each row has a mask of its own, the mask once
more for each kv head.

The kernel is PyTorch's scaled_dot_product_attention, which keeps no (T, S) scores. Only the mask is that large. There
is none where nothing stands before the new tokens, and none in decode where all rows stand at the same position. A step
reads a chunk of one row, or pieces of several rows that are no more tokens together, and then decodes. So prefill is
all this with B = 1 and T = the chunk, or with B = 2 and T = half of it, and the logits of the last positions. Decode is
all this with T = 1, and the sampling from B·V float32 logits, which at its worst (a nucleus) has 41 bytes a logit and
the ranks of the vocabulary (8·V). The largest of these moments, not their sum, is added to what stays. `Llama.score`
(log-probabilities of a prompt) is not planned: it takes about 16 bytes x chunk x V more.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch

from llama.config import ModelArgs
from llama.interop.layout import shard_shapes

QUANTIZATIONS: dict[str, tuple[int, int | None, int]] = {
    "int8": (8, None, 2),
    "int8-dynamic": (8, None, 2),
    "int4": (4, 32, 4),
    "int4:32": (4, 32, 4),
    "int4:64": (4, 64, 4),
    "int4:128": (4, 128, 4),
    "int4-dynamic": (4, 32, 4),
    "int4-dynamic:32": (4, 32, 4),
    "int4-dynamic:64": (4, 64, 4),
    "int4-dynamic:128": (4, 128, 4),
    "nf4": (4, 64, 2),
}
"""Bits of a weight's code, how many weights of a row have a scale (None: all; with a zero point or without), and its
bytes. With 4 bits the output layer is kept in int8."""
Device = Literal["cuda", "cpu"]
WORKSPACE = 32 * 2**20
"""What cuBLAS takes through PyTorch's allocator, on Hopper; 8 MiB on older GPUs."""
HOST_TOKEN = 32 + 3 * 8
"""Bytes of a token's id in the host's memory: a Python integer, and its place in the lists of prompt, request and
cache."""


@dataclass(frozen=True)
class Settings:
    """What a user chooses besides max_seq_len and max_batch_size."""

    model_parallel_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    """Of the weights and activations."""
    kv_dtype: torch.dtype | None = None
    """Of the cache; None: as `dtype`. int8 has scales besides."""
    quantize: str | None = None
    """One of QUANTIZATIONS."""
    prefill_chunk: int = 512
    device: Device = "cuda"

    def __post_init__(self) -> None:
        for name in ("model_parallel_size", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise ValueError(f"quantize is {self.quantize!r}; choose {', '.join(QUANTIZATIONS)}, or leave it out")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device is {self.device!r}; plan for cuda or cpu")


@dataclass(frozen=True)
class Plan:
    """An architecture with its limits, settings, and the bytes that each rank needs for them."""

    args: ModelArgs
    settings: Settings
    weights: int
    kv_cache: int
    tables: int
    making_tables: int
    """While the tables are made, beside all that stays: on a CPU they are computed in float64."""
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """The peak: what stays, and the largest of what comes and goes."""
        return self.weights + self.kv_cache + self.tables + max(self.making_tables, self.prefill, self.decode)


def plan(args: ModelArgs, settings: Settings | None = None) -> Plan:
    """The bytes of rank 0, the same on every rank, for prompts and answers that fill the cache of `args`.

    Raises ValueError where the vocabulary is not known, or the model can't be shared by so many ranks.
    """
    settings = settings or Settings()
    if args.vocab_size < 1:
        raise ValueError(f"vocab_size is {args.vocab_size}; give the number of rows of the embedding")
    ranks, width = settings.model_parallel_size, settings.dtype.itemsize
    stored = settings.kv_dtype or settings.dtype
    slots, rows, half = args.max_seq_len, args.max_batch_size, args.head_dim // 2
    kv_heads = max(1, args.n_kv_heads // ranks)
    chunk = min(settings.prefill_chunk, slots)
    rest = slots % chunk
    # The last whole chunk of one row, what follows it, and two rows side by side, one of them at the cache's end.
    reading = activation_bytes(args, settings, 1, chunk, slots - rest)
    if rest:
        reading = max(reading, activation_bytes(args, settings, 1, rest, slots))
    if rows > 1 and chunk > 1:
        reading = max(reading, activation_bytes(args, settings, 2, chunk // 2, slots, aligned=False))
    workspace = WORKSPACE if settings.device == "cuda" else 0
    ids = 8 * chunk + (rows * slots * HOST_TOKEN if settings.device == "cpu" else 0)
    step = activation_bytes(args, settings, rows, 1, slots, aligned=rows == 1)
    vocabulary = args.vocab_size * (width + (width + width // ranks) * (ranks > 1) + 4 * (width < 4))
    stream = args.dim * width
    # The last chunk's hidden states, of each row its last one, twice, and the logits.
    last = chunk * stream + rows * (2 * stream + vocabulary)
    return Plan(
        args=args,
        settings=settings,
        weights=weight_bytes(args, settings),
        kv_cache=2 * args.n_layers * rows * slots * kv_heads * slot_bytes(args.head_dim, stored),
        tables=2 * slots * half * 4,
        # The angles, and in turn cos, sin and their scaled copies, in float64.
        making_tables=slots * half * 32 if settings.device == "cpu" else 0,
        prefill=workspace + ids + max(reading, last),
        decode=workspace + max(step, (41 * rows + 8) * args.vocab_size),
    )


def slot_bytes(head_dim: int, stored: torch.dtype) -> int:
    """Of one head's keys, or values, of one token. In int8 they have a scale of 2 bytes."""
    return head_dim * stored.itemsize + 2 * (stored == torch.int8)


def weight_bytes(args: ModelArgs, settings: Settings) -> int:
    """Of one rank: codes and their scales. The embedding and the norms stay in the dtype."""
    one_layer = dataclasses.replace(args, n_layers=1)  # all layers are alike
    total = 0
    for name, shape in shard_shapes(one_layer, settings.model_parallel_size).items():
        count = args.n_layers if name.startswith("layers.") else 1
        size = math.prod(shape) * settings.dtype.itemsize
        if settings.quantize is not None and len(shape) == 2 and not name.startswith("tok_embeddings"):
            kept = QUANTIZATIONS[settings.quantize]
            bits, group, scale = QUANTIZATIONS["int8"] if name.startswith("output") else kept
            size = -(-math.prod(shape) * bits // 8) + shape[0] * -(-shape[1] // (group or shape[1])) * scale
        total += count * size
    return total


def _attention_packs(settings: Settings) -> bool:
    """Whether PyTorch's kernel copies keys and values, for every query head, into the order of matrix tiles (AMX)."""
    tiles: bool = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return settings.device == "cpu" and settings.dtype == torch.bfloat16 and tiles


def activation_bytes(args: ModelArgs, settings: Settings, rows: int, T: int, S: int, *, aligned: bool = True) -> int:
    """The peak within one layer for T new tokens of each row that see up to S slots: the formulas above. `aligned`
    rows stand at the same position."""
    ranks, e, D = settings.model_parallel_size, settings.dtype.itemsize, args.head_dim
    n, heads, kv_heads = rows * T, args.n_heads // ranks, max(1, args.n_kv_heads // ranks)
    q, k, hidden = n * heads * D, n * kv_heads * D, n * args.hidden_dim // ranks
    stream, wide = n * args.dim * e, 4 if e < 4 else 0
    grouped, several = kv_heads < heads, rows > 1
    positions = T if aligned else n
    masked = 0 if aligned and T in (1, S) else positions * S
    copied_mask = masked * e * kv_heads if grouped and not aligned and several else 0
    attended = q * e * (1 + grouped + (grouped and several)) + copied_mask
    floats = 2 * rows * S * kv_heads * D * e if settings.kv_dtype == torch.int8 else 0
    packed = 2 * rows * S * heads * D * e if T > 1 and _attention_packs(settings) else 0
    held = positions * D * 4 + masked * e
    moments = (
        2 * stream + e * (2 * q + 2 * k) + k * (wide + 8),
        2 * stream + e * (q + 2 * k) + q * (wide + 8),
        2 * stream + e * (q + 2 * k) + floats + max(attended + packed, masked),  # the mask is made of booleans
        3 * stream + 3 * hidden * e,
        2 * stream + n * args.dim * (8 if e == 4 else 8 + 2 * e),
    )
    return held + max(moments)
