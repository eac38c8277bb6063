"""The transformer: tokens in, scores of the next token out.

Llama is a stack of equal blocks around a stream of vectors (one of `dim` numbers for each token). Each block adds to
the stream twice: *attention* lets a token read from those before it, *feed-forward* works on each token by itself.
Before each, the stream is normalised (RMSNorm, arXiv 1910.07467). After the last block, one matrix turns each vector
into a score for every word of the vocabulary (Llama, arXiv 2302.13971, section 2.2; grouped heads: arXiv 2305.13245).

Shapes: B rows, T new tokens, S visible slots, H query heads, K kv heads, D head dim, V vocabulary. On several ranks
H and K are this rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import KVCache, Span
from llama.config import ModelArgs
from llama.parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, shards
from llama.rope import rotate, rotation_tables, spectrum

Attend = Callable[[Tensor, Tensor, Tensor, Span], Tensor]
"""Attention itself: q (B, H, T, D), keys and values (B, K, S, D), and what each token sees; gives (B, H, T, D)."""
Start = int | Sequence[int] | Tensor | Span
"""Where new tokens stand: a position for all rows, one for each, or a `KVCache.span`, which may begin at any row."""
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""New keys and values (B, T, K, D) to all the visible ones (B, K, S, D)."""


class Transformer(nn.Module):
    """A Llama. On several ranks each holds its shard, and all return the same scores."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        if args.vocab_size < 1:
            raise ValueError(f"vocab_size is {args.vocab_size}; give the number of rows of the embedding")
        if args.n_heads % shards():
            raise ValueError(
                f"{args.n_heads} heads can't be shared by {shards()} ranks: choose a --nproc_per_node that divides them"
            )
        spectrum(args.head_dim, args.rope_theta, args.rope_scaling, args.max_seq_len)  # fails now rather than later
        self.args = args
        self.tok_embeddings = ParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(layer_id, args) for layer_id in range(args.n_layers))
        self.kv_heads = max(1, args.n_kv_heads // shards())  # on this rank
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size, gather_output=True)
        self.cache: KVCache | None = None
        self._tables: tuple[int, Tensor, Tensor] | None = None

    def forward(self, tokens: Tensor, start_pos: Start | None = None, cache: KVCache | None = None) -> Tensor:
        """Scores (B, T, V), float32, of the token that follows each of `tokens` (B, T).

        Without `start_pos` the tokens are whole sequences and nothing is remembered: the way to train. With it (one
        position, one for each row, or a `span` of the cache) they continue what `cache` holds: any number of tokens at
        any position, as long as the positions before them were once written. Without `cache` it is the model's own,
        made at the first use from max_batch_size and max_seq_len. No gradient flows through a cache.
        """
        return self.logits(self.hidden(tokens, start_pos, cache))

    def hidden(self, tokens: Tensor, start_pos: Start | None = None, cache: KVCache | None = None) -> Tensor:
        """`forward` up to the last norm: (B, T, dim). For those who need the scores of a few positions only."""
        B, T = tokens.shape
        if start_pos is None and cache is None:
            span = Span([0], T, T, self.norm.weight.dtype, tokens.device)
        else:
            cache = cache or self.own_cache()
            start_pos = 0 if start_pos is None else start_pos
            span = start_pos if isinstance(start_pos, Span) else cache.span(start_pos, B, T)
        cos, sin = self.rotation(cache.slots if cache else T)
        rotation = cos[span.positions].unsqueeze(2), sin[span.positions].unsqueeze(2)  # (B or 1, T, 1, D/2)
        h = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            h = layer(h, rotation, span, partial(cache.extend, i, span) if cache else heads_first)
        normed: Tensor = self.norm(h)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V), float32, from what `hidden` gives (..., dim)."""
        scores: Tensor = self.output(hidden)
        return scores.float()

    def new_cache(self, rows: int, slots: int, bucket: int = 128) -> KVCache:
        """An empty cache for this model, on its device and in its dtype."""
        like = self.norm.weight
        sizes = self.args.n_layers, self.kv_heads, self.args.head_dim
        return KVCache(*sizes, rows, slots, dtype=like.dtype, device=like.device, bucket=bucket)

    def own_cache(self) -> KVCache:
        if self.cache is None:
            self.cache = self.new_cache(self.args.max_batch_size, self.args.max_seq_len)
        return self.cache

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (length, D/2). They are made for a length, since a dynamic spectrum depends on it."""
        device = self.norm.weight.device
        if self._tables is None or self._tables[0] != length or self._tables[1].device != device:
            args = self.args
            scheme = spectrum(args.head_dim, args.rope_theta, args.rope_scaling, length)
            self._tables = (length, *rotation_tables(scheme, length, device))
        return self._tables[1:]


class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], span: Span, extend: Extend) -> Tensor:
        """(B, T, dim) to (B, T, dim)."""
        h = x + self.attention(self.attention_norm(x), rotation, span, extend)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


def scaled_dot_product(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """softmax(q·k / sqrt(D))·v by PyTorch's fused kernels.

    Each kv head becomes a row of its own, of which its H/K query heads are the heads: so it is read where it lies, by
    a stride of 0. (With `enable_gqa` and a mask, PyTorch falls back to copying keys and values on CUDA.)
    """
    B, H, T, D = q.shape
    K, mask = keys.shape[1], None
    if T == 1 and span.start is not None:  # one token sees all slots up to its own
        keys, values = keys[:, :, : span.start + 1], values[:, :, : span.start + 1]
    elif not span.is_square:
        mask = span.mask
    if K < H:
        q = q.reshape(B * K, H // K, T, D)
        keys, values = (x.flatten(0, 1).unsqueeze(1).expand(-1, H // K, -1, -1) for x in (keys, values))
        mask = None if mask is None else mask.expand(B, K, -1, -1).flatten(0, 1).unsqueeze(1)  # (B * K, 1, T, S)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=span.is_square)
    return out.reshape(B, H, T, D)


def heads_first(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, K, D) to (B, K, T, D): with no cache, the new tokens are all there is to see."""
    return keys.transpose(1, 2), values.transpose(1, 2)


class Attention(nn.Module):
    """Each token asks (q), each earlier one answers to its key (k) with its value (v); K heads serve H/K askers each.

    `attend` may be replaced by any function of the same shapes.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        width, kv_width, D = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.head_dim
        self.wq = ColumnParallelLinear(args.dim, width, unit=D)
        self.wk = ColumnParallelLinear(args.dim, kv_width, unit=D, repeat=True)  # more ranks than kv heads:
        self.wv = ColumnParallelLinear(args.dim, kv_width, unit=D, repeat=True)  # neighbours hold the same one
        self.wo = RowParallelLinear(width, args.dim)
        self.attend: Attend = scaled_dot_product

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], span: Span, extend: Extend) -> Tensor:
        """(B, T, dim) to (B, T, dim)."""
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        keys, values = extend(k, v)  # (B, K, S, D)
        out = self.attend(q.transpose(1, 2), keys, values, span)  # (B, H, T, D)
        mixed: Tensor = self.wo(out.transpose(1, 2).flatten(2))  # (B, T, H * D) to (B, T, dim)
        return mixed


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): a gate, silu(w1·x), lets through what w3·x proposes; w2 brings it back."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, hidden_dim)
        self.w2 = RowParallelLinear(hidden_dim, dim)
        self.w3 = ColumnParallelLinear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class RMSNorm(nn.Module):
    """x / rms(x), times a learned weight. In float32: a sum of thousands of squares has no room in bfloat16."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim), in x's dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight
