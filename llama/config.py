"""The numbers that fix an architecture.

A Llama is described by nine numbers: how wide (`dim`), how deep (`n_layers`), into how many heads the width is cut
(`n_heads`, `n_kv_heads`), how wide the feed-forward layer is, how many words it knows (`vocab_size`), and three
details (`norm_eps`, `rope_theta`, `rope_scaling`). They stand in the `params.json` beside a checkpoint. Two limits,
`max_seq_len` and `max_batch_size`, are the user's: they size the cache and nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

from llama.arguments import Range, checked

RopeScaling = dict[str, Any]
"""A scheme of rope.py and its parameters: {"rope_type": "linear", "factor": 4.0}; the names are transformers'."""


RANGES: dict[str, Range] = {
    "n_layers": (int, "at least", 1, 1000),  # a model of more would take minutes to be made, even without weights
    "norm_eps": (float, "above", 0, 1),
    "rope_theta": (float, "above", 1, 1e30),
    "ffn_dim_multiplier": (float, "above", 0, 100),
    **dict.fromkeys(
        ("dim", "n_heads", "n_kv_heads", "multiple_of", "hidden_dim", "vocab_size", "max_batch_size", "max_seq_len"),
        (int, "at least", 1, 2**31 - 1),
    ),
}
"""Of each number of ModelArgs. What a number may be derived from stands before it."""


@dataclass
class ModelArgs:
    """An architecture, and the limits of its cache. The defaults are those of Llama 2 7B.

    `n_kv_heads` and `hidden_dim` may be left out, as in the published files; after construction they hold the real
    numbers. `hidden_dim`, the inner width of the SwiGLU layer, then follows from the other sizes: two thirds of
    4·dim, times `ffn_dim_multiplier`, rounded up to a multiple of `multiple_of`.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = cast(int, None)  # None: as many as n_heads
    vocab_size: int = -1  # -1: taken from the embedding when a checkpoint is read
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    hidden_dim: int = cast(int, None)  # None: from the three numbers above
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        derived = {"n_kv_heads": lambda: self.n_heads, "hidden_dim": self.swiglu_dim}
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is None and name in derived:
                value = derived[name]()
            if (name, value) not in (("vocab_size", -1), ("ffn_dim_multiplier", None)):
                setattr(self, name, checked(name, value, allowed))
        if self.dim % self.n_heads or self.head_dim % 2:
            cut = f"can't be cut into n_heads {self.n_heads} heads of an even size"
            raise ValueError(f"dim {self.dim} {cut}; choose dim a multiple of 2 x n_heads")
        if self.n_heads % self.n_kv_heads:
            rule = "each KV head must serve equally many query heads"
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}; {rule}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def swiglu_dim(self) -> int:
        """The feed-forward width that the published sizes follow (Llama's two thirds of 4·dim, rounded up)."""
        hidden = int((self.ffn_dim_multiplier or 1.0) * int(2 * 4 * self.dim / 3))
        return self.multiple_of * -(-hidden // self.multiple_of)

    @classmethod
    def from_params(cls, params: dict[str, Any], **limits: Any) -> tuple[ModelArgs, list[str]]:
        """Reads the contents of a params.json. Returns the arguments, and the keys that mean nothing here.

        Raises ValueError where the sizes that no model can do without are missing: they are not taken from 7B.
        """
        missing = [key for key in ("dim", "n_layers", "n_heads") if key not in params]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}, so it describes no model: download it again")
        known = {field.name for field in dataclasses.fields(cls)} - {"max_batch_size", "max_seq_len"}
        unknown = sorted(set(params) - known)
        return cls(**{key: value for key, value in params.items() if key in known}, **limits), unknown

    def to_params(self) -> dict[str, Any]:
        """What a params.json holds: the architecture without the limits, and without what the formula gives."""
        params = dataclasses.asdict(self)
        del params["max_batch_size"], params["max_seq_len"]
        if self.hidden_dim == self.swiglu_dim():
            del params["hidden_dim"]
        return {key: value for key, value in params.items() if value is not None}


_GROUPED: dict[str, Any] = {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "rope_theta": 1e6}
PRESETS: dict[str, dict[str, Any]] = {
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32016, "rope_theta": 1e6},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40, "vocab_size": 32016, "rope_theta": 1e6},
    "34B": {**_GROUPED, "n_layers": 48, "vocab_size": 32000},
    "70B": {**_GROUPED, "n_layers": 80, "vocab_size": 32016, "hidden_dim": 28672},
}
"""The published sizes: `ModelArgs(**PRESETS["34B"])`. 7B and 13B Python have 32000 pieces, and 70B's Python and
Instruct variants a theta of 1e4: a checkpoint's own params.json is what counts."""
