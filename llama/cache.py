"""The KV cache: what the model remembers of the tokens it has read.

A *row* is a sequence's place in the cache, a *slot* a position in it. The whole design rests on one invariant:

    a slot is written before it becomes visible.

The token at position p writes slot p and sees the slots up to p. So whatever lies in later slots (padding, the rest
of a longer sequence that used the row before, a speculation that was rejected) is overwritten before anything can
see it, and nothing ever needs clearing. An example, one row of six slots, fed "a b c" padded to four tokens, then d:

    model(["a", "b", "c", pad], start_pos=0)   slots  a b c pad . .
    model(["d"], start_pos=3)                  slots  a b c d   . .    d sees a b c d
    model(["x"], start_pos=1)                  slots  a x c d   . .    x sees a x, as if the rest were not there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Span:
    """T new tokens of B rows: where they stand, and what each sees."""

    positions: Tensor
    """(B or 1, T) int64: the slot that each new token writes; it sees the slots up to that one."""
    slots: int
    """S: the slots that attention is given. Those after a token's own are masked."""
    start: int | None
    """The first position where all rows share it, else None."""
    dtype: torch.dtype
    _mask: Tensor | None = None

    @property
    def is_square(self) -> bool:
        """Nothing stands before the new tokens, and nothing after: plain causal attention, without a mask."""
        return self.start == 0 and self.slots == self.positions.shape[1]

    @property
    def mask(self) -> Tensor:
        """(B or 1, 1, T, S): 0 where a token sees a slot, -inf where not. Made once, for all layers."""
        if self._mask is None:  # functools.cached_property takes a lock, which can't be traced and compiled
            slots = torch.arange(self.slots, device=self.positions.device)
            hidden = slots > self.positions[:, None, :, None]
            zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=slots.device)
            self._mask = zeros.masked_fill_(hidden, -torch.inf)
        return self._mask


class KVCache:
    """Keys and values of `rows` sequences of up to `slots` tokens, for each layer (rows, K, slots, D); allocated once.

    A step's tokens are those of the first B rows. Single tokens are shown a number of slots rounded up to a multiple
    of `bucket`, so that the shapes of a decode step change rarely and can be compiled; longer steps, what they need.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        rows: int,
        slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bucket: int = 128,
    ) -> None:
        shape = (rows, n_kv_heads, slots, head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 x NaN would be NaN. And usable outside inference mode,
        # even if the first to need it was inside.
        with torch.inference_mode(False):
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.rows, self.slots, self.bucket = rows, slots, bucket
        self.owner: object = None
        """Whoever writes rows over many steps puts itself here, and can tell when another has taken them."""
        self.tokens: list[int] = []
        """Those of row 0, as far as they are known; all but the last are written. Who begins the same may build on
        them, and whoever writes the row by himself sets them."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def span(self, start_pos: int | Sequence[int] | Tensor, B: int, T: int) -> Span:
        """Places T new tokens of the first B rows at `start_pos`: one position, or one for each row.

        Raises ValueError where the rows or the slots don't suffice.
        """
        given = start_pos.tolist() if isinstance(start_pos, Tensor) else start_pos
        starts = [given] * B if isinstance(given, int) else list(given)
        if len(starts) != B or self.rows < B:
            raise ValueError(
                f"{B} rows of tokens with {len(starts)} start positions; the cache has {self.rows} rows "
                "(max_batch_size) and wants one start position, or one for each row"
            )
        first, end = min(starts), max(starts) + T
        if first < 0 or end > self.slots:
            raise ValueError(
                f"tokens at positions {first} to {end - 1}; the cache has slots 0 to {self.slots - 1}: "
                f"build with max_seq_len of at least {end}"
            )
        device = self.keys[0].device
        aligned = first == end - T
        visible = end if T > 1 else min(-(-end // self.bucket) * self.bucket, self.slots)
        positions = torch.arange(T, device=device) + torch.tensor(starts[: 1 if aligned else B], device=device)[:, None]
        return Span(positions, visible, first if aligned else None, self.keys[0].dtype)

    def extend(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new keys and values (B, T, K, D); returns views (B, K, S, D) of what is visible."""
        B, T = keys.shape[:2]
        for store, new in ((self.keys[layer], keys.detach()), (self.values[layer], values.detach())):
            if span.start is None:
                store[torch.arange(B, device=new.device)[:, None], :, span.positions] = new
            else:
                store[:B, :, span.start : span.start + T] = new.transpose(1, 2)
        return self.keys[layer][:B, :, : span.slots], self.values[layer][:B, :, : span.slots]

    def copy_row_(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` slots of row `source` over row `target`, so that active rows stay together."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]
