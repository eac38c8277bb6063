"""Two names for every parameter, and two orders of the rows of queries and keys."""

from __future__ import annotations

import pytest
import torch

from llama.config import ModelArgs
from llama.interop.names import ROTATED, to_halves, to_huggingface, to_meta, to_pairs
from llama.model import Transformer

ARGS = ModelArgs(dim=64, n_layers=12, n_heads=8, n_kv_heads=2, vocab_size=96, hidden_dim=96)


def test_every_parameter_has_one_name_in_each_format() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 12}
    with torch.device("meta"):
        ours = Transformer(ARGS).state_dict()
        theirs = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=96, vocab_size=96)).state_dict()
    translated = {name: to_huggingface(name) for name in ours}
    assert sorted(map(str, translated.values())) == sorted(theirs)
    assert {name: to_meta(str(hf)) for name, hf in translated.items()} == {name: name for name in ours}
    assert all(ours[name].shape == theirs[hf].shape for name, hf in translated.items() if hf)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "norm",
        "model.norm",
        "rope.freqs",
        "layers.#.attention.wq.weight",
        "layers.0.attention.wq.bias",
        "x.norm.weight",
    ],
)
def test_what_is_no_parameter_has_no_other_name(name: str) -> None:
    assert to_huggingface(name) is None
    assert to_meta(name) is None


def test_queries_and_keys_alone_are_reordered() -> None:
    names = [name for name in ("wq", "wk", "wv", "wo") if ROTATED.fullmatch(f"layers.10.attention.{name}.weight")]
    assert names == ["wq", "wk"]
    assert not ROTATED.fullmatch("layers.0.feed_forward.w1.weight")


def test_the_order_is_that_of_the_published_conversion() -> None:
    """`w.view(H, D/H/2, 2, dim).transpose(1, 2).reshape(D, dim)`, on a matrix whose rows are numbered."""
    numbered = torch.arange(16).view(16, 1).expand(16, 3)
    halves = to_halves(numbered, head_dim=8)
    assert halves[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(halves, numbered.view(2, 4, 2, 3).transpose(1, 2).reshape(16, 3))
    assert torch.equal(to_pairs(halves, head_dim=8), numbered)


def test_reordering_commutes_with_cutting_between_heads() -> None:
    weight = torch.randn(64, 5)
    parts = [to_pairs(part, 8) for part in weight.tensor_split(4)]
    assert torch.equal(torch.cat(parts), to_pairs(weight, 8))
