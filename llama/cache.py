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
    """T new tokens of B neighbouring rows: where they stand, and what each sees."""

    starts: Sequence[int]
    """The position of each row's first new token; a single one where all rows share it."""
    T: int
    slots: int
    """S: the slots that attention is given. Those after a token's own are masked."""
    dtype: torch.dtype
    device: torch.device
    row: int = 0
    """The first of the cache's rows that the tokens belong to."""
    given: Tensor | None = None
    """(B, more than T) on the device: the T new tokens, then `starts`: so both come from the host in one copy."""
    _positions: Tensor | None = None
    _mask: Tensor | None = None

    @property
    def start(self) -> int | None:
        """The first position where all rows share it, else None."""
        return self.starts[0] if len(self.starts) == 1 else None

    @property
    def positions(self) -> Tensor:
        """(B or 1, T) int64: the slot that each new token writes; it sees the slots up to that one."""
        if self._positions is None:
            known = None if self.given is None else self.given[: len(self.starts), self.T, None]
            first = torch.tensor(self.starts, device=self.device)[:, None] if known is None else known
            self._positions = first + torch.arange(self.T, device=self.device)
        return self._positions

    @property
    def is_square(self) -> bool:
        """Nothing stands before the new tokens, and nothing after: plain causal attention, without a mask."""
        return self.start == 0 and self.slots == self.T

    @property
    def mask(self) -> Tensor:
        """(B or 1, 1, T, S): 0 where a token sees a slot, -inf where not. Made once, for all layers."""
        if self._mask is None:  # functools.cached_property takes a lock, which can't be traced and compiled
            slots = torch.arange(self.slots, device=self.device)
            hidden = slots > self.positions[:, None, :, None]
            zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            self._mask = zeros.masked_fill_(hidden, -torch.inf)
        return self._mask


class KVCache:
    """Keys and values of `rows` sequences of up to `slots` tokens, for each layer (rows, K, slots, D); allocated once.

    A step's tokens are those of B neighbouring rows. Single tokens are shown a number of slots rounded up to a multiple
    of `bucket`, so that the shapes of a decode step change rarely and can be compiled; longer steps, what they need.

    The cache knows which tokens each row holds (`tokens`), so that a sequence which begins the same needn't be read
    again. Every writer passes through `span`, which forgets what is about to be overwritten; a writer that knows its
    tokens adds them after the step.
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, rows: int, slots: int, *,
        dtype: torch.dtype, device: torch.device, bucket: int = 128,
    ) -> None:  # fmt: skip
        shape = (rows, n_kv_heads, slots, head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 x NaN would be NaN. And usable outside inference mode,
        # even if the first to need it was inside.
        with torch.inference_mode(False):
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.rows, self.slots, self.bucket = rows, slots, bucket
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        """Of each row, those whose keys and values stand in its first slots."""
        self.used = [0] * rows
        """When each row was last written: a count of spans."""
        self._spans = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def span(
        self, start_pos: int | Sequence[int] | Tensor, B: int, T: int, row: int = 0, given: Tensor | None = None
    ) -> Span:
        """Places T new tokens of B rows, from `row` on, at `start_pos`: one position, or one for each row; `given` is
        Span's. What the rows held from these positions on is forgotten.

        Raises ValueError where the rows or the slots don't suffice.
        """
        where = start_pos.tolist() if isinstance(start_pos, Tensor) else start_pos
        starts = [where] * B if isinstance(where, int) else list(where)
        if len(starts) != B or not 0 <= row <= self.rows - B:
            allowed = f"the cache has {self.rows} rows (max_batch_size); give one start position, or one for each row"
            raise ValueError(f"{B} rows of tokens from row {row} on with {len(starts)} start positions: {allowed}")
        low, end = min(starts), max(starts) + T
        if low < 0 or end > self.slots:
            allowed = f"the cache has slots 0 to {self.slots - 1}: build with max_seq_len of at least {end}"
            raise ValueError(f"tokens at positions {low} to {end - 1}; {allowed}")
        self.forget(row, starts)
        aligned = low == end - T
        visible = end if T > 1 else min(-(-end // self.bucket) * self.bucket, self.slots)
        stores = self.keys[0]
        return Span(starts[:1] if aligned else starts, T, visible, stores.dtype, stores.device, row, given)

    def forget(self, row: int = 0, starts: Sequence[int] | None = None) -> None:
        """Rows from `row` on no longer hold the tokens from `starts` on; without them, no row holds any."""
        self._spans += 1
        for i, start in enumerate([0] * self.rows if starts is None else starts, row):
            del self.tokens[i][start:]
            self.used[i] = self._spans

    def extend(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new keys and values (B, T, K, D); returns views (B, K, S, D) of what is visible."""
        B, T = keys.shape[:2]
        rows = slice(span.row, span.row + B)
        for store, new in ((self.keys[layer], self.pack(keys)), (self.values[layer], self.pack(values))):
            if span.start is None:
                store[rows][torch.arange(B, device=new.device)[:, None], :, span.positions] = new
            else:
                store[rows, :, span.start : span.start + T] = new.transpose(1, 2)
        visible = self.keys[layer][rows, :, : span.slots], self.values[layer][rows, :, : span.slots]
        return self.unpack(visible[0]), self.unpack(visible[1])

    def pack(self, x: Tensor) -> Tensor:
        """Keys or values (..., D) in the form in which the cache keeps them."""
        return x.detach()

    def unpack(self, stored: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return stored

    def copy_row_(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` slots of row `source` over row `target`, and what is known of them."""
        if source == target:
            return
        for store in (*self.keys, *self.values) if length else ():
            store[target, :, :length] = store[source, :, :length]
        self.tokens[target] = self.tokens[source][:length]
        self.used[target] = self.used[source]

    def swap_rows_(self, one: int, other: int) -> None:
        """Two rows exchange what they are known to hold."""
        if one == other:
            return
        length = max(len(self.tokens[one]), len(self.tokens[other]))
        for store in (*self.keys, *self.values) if length else ():
            kept = store[one, :, :length].clone()
            store[one, :, :length] = store[other, :, :length]
            store[other, :, :length] = kept
        self.tokens[one], self.tokens[other] = self.tokens[other], self.tokens[one]
        self.used[one], self.used[other] = self.used[other], self.used[one]
