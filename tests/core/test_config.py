"""The numbers that fix an architecture: those of the published sizes, and those that can't be."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from llama.config import PRESETS, ModelArgs
from llama.model import Transformer

PUBLISHED: dict[str, tuple[dict[str, Any], int, int, int]] = {
    # The sizes as a published params.json has them (without a vocabulary), the vocabulary, hidden_dim, parameters.
    "7B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}, 32016, 11008, 6_738_546_688),
    "13B": ({"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256}, 32016, 13824, 13_016_028_160),
    "34B": (
        {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": 1.0},
        32000,
        22016,
        33_743_970_304,
    ),
    "70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        32016,
        28672,
        68_976_910_336,
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_give_the_published_hidden_dim_and_number_of_parameters(size: str) -> None:
    params, vocab_size, hidden_dim, parameters = PUBLISHED[size]
    args, unknown = ModelArgs.from_params({**params, "norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": vocab_size})
    assert unknown == []
    assert (args.hidden_dim, args.head_dim) == (hidden_dim, 128)
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_preset_is_the_published_size(size: str) -> None:
    params, vocab_size, hidden_dim, _ = PUBLISHED[size]
    preset = ModelArgs(**PRESETS[size])
    assert (preset.dim, preset.n_layers, preset.n_heads) == (params["dim"], params["n_layers"], params["n_heads"])
    assert preset.n_kv_heads == params.get("n_kv_heads", params["n_heads"])
    assert (preset.vocab_size, preset.hidden_dim) == (vocab_size, hidden_dim)
    assert (preset.norm_eps, preset.rope_theta) == (1e-5, 1e6)


def test_theta_comes_from_params_json_alone() -> None:
    assert ModelArgs.from_params({"rope_theta": 123.0})[0].rope_theta == 123.0
    assert ModelArgs.from_params({})[0].rope_theta == 10_000.0  # as Llama 2, whose files don't say


def test_unknown_keys_are_reported_and_limits_are_the_users_own() -> None:
    args, unknown = ModelArgs.from_params({"dim": 64, "n_heads": 4, "use_scaled_rope": True, "max_seq_len": 5})
    assert unknown == ["max_seq_len", "use_scaled_rope"]
    assert args.max_seq_len == ModelArgs().max_seq_len
    assert ModelArgs.from_params({"dim": 64, "n_heads": 4}, max_seq_len=7, max_batch_size=3)[0].max_seq_len == 7


@pytest.mark.parametrize("given", [{}, {"hidden_dim": 99}, {"n_kv_heads": 2, "multiple_of": 32}, {"vocab_size": 7}])
def test_params_json_keeps_the_architecture(given: dict[str, Any]) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 64}
    args = ModelArgs(
        dim=64, n_heads=4, n_layers=3, norm_eps=1e-6, rope_scaling=scaling, ffn_dim_multiplier=1.3, **given
    )
    read, unknown = ModelArgs.from_params(json.loads(json.dumps(args.to_params())))
    assert (read, unknown) == (args, [])
    assert "max_seq_len" not in args.to_params()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"dim": 100, "n_heads": 8}, "dim 100"),  # no whole head
        ({"dim": 24, "n_heads": 8}, "dim 24"),  # heads of 3: no pairs to rotate
        ({"n_heads": 8, "n_kv_heads": 3}, "n_kv_heads 3"),
    ],
)
def test_sizes_that_cannot_be_are_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelArgs(**{"dim": 64, "n_heads": 8} | given)


def test_a_model_needs_its_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocab_size is -1"):
        Transformer(ModelArgs(dim=64, n_heads=4))


def test_hidden_dim_is_two_thirds_of_four_dims_rounded_up() -> None:
    for dim in range(2, 400, 2):
        for multiple in (1, 7, 32):
            args = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple)
            assert args.hidden_dim % multiple == 0
            assert 0 <= args.hidden_dim - math.floor(8 * dim / 3) < multiple
