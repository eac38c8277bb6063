"""The numbers that fix an architecture: those of the published sizes, and those that can't be."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy
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
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4}
    assert ModelArgs.from_params({**sizes, "rope_theta": 123.0})[0].rope_theta == 123.0
    assert ModelArgs.from_params(sizes)[0].rope_theta == 10_000.0  # as Llama 2, whose files don't say


def test_unknown_keys_are_reported_and_limits_are_the_users_own() -> None:
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4}
    args, unknown = ModelArgs.from_params({**sizes, "use_scaled_rope": True, "max_seq_len": 5})
    assert unknown == ["max_seq_len", "use_scaled_rope"]
    assert args.max_seq_len == ModelArgs().max_seq_len
    assert ModelArgs.from_params(sizes, max_seq_len=7, max_batch_size=3)[0].max_seq_len == 7


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


WHOLE = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "hidden_dim"),
    *("max_batch_size", "max_seq_len"),
)
NUMBERS = (*WHOLE, "ffn_dim_multiplier", "norm_eps", "rope_theta")
OPTIONAL = ("n_kv_heads", "hidden_dim", "ffn_dim_multiplier")


def test_every_number_of_an_architecture_is_checked() -> None:
    assert {*NUMBERS, "rope_scaling"} == {field.name for field in dataclasses.fields(ModelArgs)}


@pytest.mark.parametrize(
    "value",
    ["64", "1e-5", "", True, False, [64], {"of": 64}, 0, 0.0, -1.5, -2, math.nan, math.inf, -math.inf, 1j, 10**400],
    ids=str,
)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_in_range_is_named_with_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*; give a (whole )?number, (at least|above) -?\d.* at most \d"):
        ModelArgs(**{"dim": 64, "n_heads": 8, name: value})


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - set(OPTIONAL)))
def test_only_what_follows_from_other_numbers_may_be_left_out(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is None"):
        ModelArgs(**{"dim": 64, "n_heads": 8, name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, 64.5) for name in WHOLE), ("rope_theta", 1), ("rope_theta", 0.5), ("norm_eps", 1.5), ("dim", 2**40)],
)
def test_numbers_out_of_their_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}"):
        ModelArgs(**{"dim": 64, "n_heads": 8, name: value})


@pytest.mark.parametrize("given", [8.0, numpy.int64(8), numpy.float32(8.0), numpy.uint8(8)], ids=repr)
def test_a_whole_number_is_one_however_it_is_written(given: Any) -> None:
    """JSON does not tell 8.0 from 8, and sizes often come from numpy."""
    args = ModelArgs(dim=64, **{name: given for name in WHOLE if name != "dim"}, rope_theta=given)
    assert args == ModelArgs(dim=64, **{name: 8 for name in WHOLE if name != "dim"}, rope_theta=8.0)
    assert all(type(getattr(args, name)) is int for name in WHOLE)
    assert type(args.rope_theta) is float
    assert json.loads(json.dumps(args.to_params())) == args.to_params()  # which numpy's own types would not stand


def test_a_long_value_is_not_repeated_in_whole() -> None:
    with pytest.raises(ValueError, match="dim is 'wide") as caught:
        ModelArgs(dim="wide" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("params", "named"),
    [({}, "dim, n_layers, n_heads"), ({"n_layers": 2, "vocab_size": 5}, "dim, n_heads"), ({"dim": 64}, "n_layers")],
)
def test_sizes_that_params_json_lacks_are_not_those_of_7b(params: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"lacks {named}"):
        ModelArgs.from_params(params)
    assert ModelArgs().dim == 4096  # in Python the defaults are Llama 2 7B's


def test_a_model_too_deep_to_be_made_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"n_layers is 100000; .* at most 1000"):
        ModelArgs(n_layers=100_000)


def test_a_model_needs_its_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocab_size is -1"):
        Transformer(ModelArgs(dim=64, n_heads=4))


def test_hidden_dim_is_two_thirds_of_four_dims_rounded_up() -> None:
    for dim in range(2, 400, 2):
        for multiple in (1, 7, 32):
            args = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple)
            assert args.hidden_dim % multiple == 0
            assert 0 <= args.hidden_dim - math.floor(8 * dim / 3) < multiple
