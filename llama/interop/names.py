"""Meta's parameter names and Hugging Face's, and the order of the rows that they keep queries and keys in.

The two formats hold the same numbers under different names, and two matrices in a different order. Meta rotates
adjacent pairs of a head's D numbers, (0, 1), (2, 3) …; Hugging Face rotates number i with number i + D/2. So the rows
of a head's wq and wk are dealt out: Meta's even rows make the first half, its odd rows the second. The order within
one head is all that changes, so a cut between whole heads and the change of order can be done in either order.
"""

from __future__ import annotations

import re

from torch import Tensor

TABLE: dict[str, str] = {
    "tok_embeddings": "model.embed_tokens",
    "layers.#.attention.wq": "model.layers.#.self_attn.q_proj",
    "layers.#.attention.wk": "model.layers.#.self_attn.k_proj",
    "layers.#.attention.wv": "model.layers.#.self_attn.v_proj",
    "layers.#.attention.wo": "model.layers.#.self_attn.o_proj",
    "layers.#.feed_forward.w1": "model.layers.#.mlp.gate_proj",
    "layers.#.feed_forward.w2": "model.layers.#.mlp.down_proj",
    "layers.#.feed_forward.w3": "model.layers.#.mlp.up_proj",
    "layers.#.attention_norm": "model.layers.#.input_layernorm",
    "layers.#.ffn_norm": "model.layers.#.post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}
"""Meta's name to Hugging Face's, without the `.weight` at the end; # is the number of a layer."""
ROTATED = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")
"""Meta's names of the matrices whose rows the formats keep in different orders."""

_TO_META = {theirs: ours for ours, theirs in TABLE.items()}


def to_huggingface(name: str) -> str | None:
    """Hugging Face's name of a parameter by Meta's; None where there is none."""
    return _translated(name, TABLE)


def to_meta(name: str) -> str | None:
    """Meta's name of a parameter by Hugging Face's; None where there is none."""
    return _translated(name, _TO_META)


def _translated(name: str, table: dict[str, str]) -> str | None:
    match = re.fullmatch(r"([^#]*?)(?:(?<=layers\.)(\d+)(?=\.)([^#]*))?\.weight", name)
    if match is None:
        return None
    before, layer, after = match.groups()
    found = table.get(before if layer is None else f"{before}#{after}")
    return None if found is None else found.replace("#", layer or "") + ".weight"


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, (heads·D, dim), from Meta's order to Hugging Face's, head by head; a copy."""
    rows, dim = weight.shape
    return weight.reshape(rows // head_dim, head_dim // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`: rows of q_proj or k_proj in Meta's order; a copy."""
    rows, dim = weight.shape
    return weight.reshape(rows // head_dim, 2, head_dim // 2, dim).transpose(1, 2).reshape(rows, dim)
