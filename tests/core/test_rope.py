"""Rotary positions: each scheme against transformers' or its formula, and the rotation against complex numbers."""

from __future__ import annotations

import inspect
import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from llama.rope import SPECTRA, Spectrum, rotate, rotation_tables, spectrum

CPU = torch.device("cpu")
L = 4096

SCALINGS: list[tuple[int, float, dict[str, Any] | None]] = [
    (128, 1e4, None),
    (128, 1e6, {"rope_type": "default"}),
    (128, 1e6, {"rope_type": "linear", "factor": 4.0}),
    (64, 1e4, {"type": "linear", "factor": 1.7}),  # the key's older name
    (128, 1e4, {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": L}),
    (64, 1e6, {"rope_type": "dynamic", "factor": 8.0, "original_max_position_embeddings": L}),
    (128, 1e4, {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": L}),
    (128, 1e6, {"rope_type": "yarn", "factor": 6.5, "original_max_position_embeddings": 16384}),
    (
        64,
        1e4,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ),
    (
        128,
        1e4,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": L,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        },
    ),
    (
        128,
        1e4,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": L, "attention_factor": 1.25},
    ),
    (128, 1e4, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": L, "truncate": False}),
    (8, 1e4, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),  # the ramp's ends beyond
    (8, 1e4, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100_000}),  # the first and last
    (128, 5e5, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}),
    (
        64,
        5e5,
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "original_max_position_embeddings": 1024,
            "low_freq_factor": 2.0,
            "high_freq_factor": 16.0,
        },
    ),
    (
        64,
        1e4,
        {
            "rope_type": "longrope",
            "factor": 8.0,
            "original_max_position_embeddings": L,
            "short_factor": [1.0 + 0.01 * i for i in range(32)],
            "long_factor": [1.0 + 0.5 * i for i in range(32)],
        },
    ),
    (
        8,
        1e6,
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "original_max_position_embeddings": L,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "attention_factor": 1.5,
        },
    ),
    (64, 1e4, {"rope_type": "proportional", "partial_rotary_factor": 0.75}),
    (16, 1e6, {"rope_type": "proportional", "partial_rotary_factor": 0.3}),  # 2.4 pairs: 2
]


def of_transformers(head_dim: int, theta: float, scaling: dict[str, Any] | None, length: int) -> tuple[Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**(scaling or {}), "rope_theta": theta}
    name = parameters.setdefault("rope_type", parameters.pop("type", "default"))
    if name == "llama3":  # what Llama 3.1 has; transformers wants them spelled out
        parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | parameters
    trained = parameters.get("original_max_position_embeddings", L)
    if name == "dynamic":  # transformers takes the trained length from max_position_embeddings
        del parameters["original_max_position_embeddings"]
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=trained, rope_parameters=parameters
    )
    scheme = ROPE_INIT_FUNCTIONS.get(name, LlamaRotaryEmbedding.compute_default_rope_parameters)
    return scheme(config, device=CPU, seq_len=length)


@pytest.mark.parametrize("length", [100, L, 3 * L + 5])
@pytest.mark.parametrize(("head_dim", "theta", "scaling"), SCALINGS)
def test_every_scheme_is_transformers(head_dim: int, theta: float, scaling: dict[str, Any] | None, length: int) -> None:
    ours = spectrum(head_dim, theta, scaling, length)
    inv_freq, attention_factor = of_transformers(head_dim, theta, scaling, length)
    assert ours.inv_freq.dtype == torch.float64
    assert ours.inv_freq.shape == (head_dim // 2,)
    torch.testing.assert_close(ours.inv_freq, inv_freq.double(), rtol=2e-6, atol=0)  # theirs is float32
    assert ours.attention_scale == pytest.approx(attention_factor, rel=1e-12)


def test_the_comparison_covers_every_scheme_that_transformers_has() -> None:
    compared = {(scaling or {}).get("rope_type", "default") for _, _, scaling in SCALINGS}
    assert compared == {"default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"}
    assert set(SPECTRA) == compared | {"ntk", "ntk_by_parts", "yarn_paper", "none"}  # which have tests of their own


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 32.0), (2.0, 5.0)])
@pytest.mark.parametrize(("head_dim", "theta", "factor", "trained"), [(128, 1e4, 4.0, 4096), (64, 1e6, 16.0, 16384)])
def test_by_parts_is_linear_in_the_number_of_turns(
    head_dim: int, theta: float, factor: float, trained: int, alpha: float, beta: float
) -> None:
    """The paper's formula, a pair at a time; and YaRN's, which is the same with a temperature."""
    ours = spectrum(
        head_dim,
        theta,
        {
            "rope_type": "ntk_by_parts",
            "factor": factor,
            "original_max_position_embeddings": trained,
            "alpha": alpha,
            "beta": beta,
        },
        100,
    )
    parts = []
    for i in range(head_dim // 2):
        w = theta ** (-2 * i / head_dim)
        turns = trained / (2 * math.pi / w)
        ramp = 0.0 if turns < alpha else 1.0 if turns > beta else (turns - alpha) / (beta - alpha)
        parts.append((1 - ramp) * w / factor + ramp * w)
    torch.testing.assert_close(ours.inv_freq, torch.tensor(parts, dtype=torch.float64), rtol=1e-13, atol=0)
    assert ours.attention_scale == 1.0
    if (alpha, beta) == (1.0, 32.0):
        scaling = {"rope_type": "yarn_paper", "factor": factor, "original_max_position_embeddings": trained}
        paper = spectrum(head_dim, theta, scaling, 100)
        assert torch.equal(paper.inv_freq, ours.inv_freq)
        assert paper.attention_scale == pytest.approx(0.1 * math.log(factor) + 1)
        released = spectrum(head_dim, theta, {**scaling, "rope_type": "yarn"}, 100)
        assert not torch.allclose(paper.inv_freq, released.inv_freq, rtol=1e-3)


def test_parts_join_without_a_jump() -> None:
    """At the edges of the bands too: a trained context that moves a pair across one changes its frequency by little."""
    for edge in (1.0, 32.0):
        w = 1e4 ** (-2 * 10 / 64)
        values = [
            spectrum(
                64, 1e4, {"rope_type": "ntk_by_parts", "factor": 8.0, "original_max_position_embeddings": trained}, 1
            ).inv_freq[10]
            for trained in (edge * 2 * math.pi / w * (1 - 1e-9), edge * 2 * math.pi / w * (1 + 1e-9))
        ]
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-7)


def test_none_turns_nothing_and_proportional_of_1_everything() -> None:
    cos, sin = rotation_tables(spectrum(8, 1e4, {"rope_type": "none"}, 50), 50, CPU)
    assert torch.equal(cos, torch.ones(50, 4))
    assert torch.equal(sin, torch.zeros(50, 4))
    plain = spectrum(64, 1e4, None, 1).inv_freq
    assert torch.equal(
        spectrum(64, 1e4, {"rope_type": "proportional", "partial_rotary_factor": 1.0}, 1).inv_freq, plain
    )


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            {"rope_type": "proportional", "partial_rotary_factor": 1.5},
            "partial_rotary_factor is 1.5; .* at least 0 and at most 1",
        ),
        (
            {"rope_type": "ntk_by_parts", "factor": 2.0, "original_max_position_embeddings": 9, "alpha": 4, "beta": 3},
            "alpha 4 and beta 3; alpha must be below",
        ),
        (
            {
                "rope_type": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 9,
                "short_factor": [1.0],
                "long_factor": [1.0],
            },
            "1 factors for 4 pairs",
        ),
    ],
)
def test_parameters_that_cannot_be_are_named(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectrum(8, 1e4, scaling, 5)


@pytest.mark.parametrize(("head_dim", "theta", "factor"), [(128, 1e4, 4.0), (64, 1e6, 2.5), (8, 1e4, 16.0)])
def test_ntk_raises_the_base_by_its_formula(head_dim: int, theta: float, factor: float) -> None:
    ours = spectrum(head_dim, theta, {"rope_type": "ntk", "factor": factor}, 100)
    base = theta * factor ** (head_dim / (head_dim - 2))
    expected = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    torch.testing.assert_close(ours.inv_freq, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    # What the formula is for: the slowest pair is slowed by exactly the factor, the fastest not at all.
    plain = spectrum(head_dim, theta, None, 100).inv_freq
    assert (plain[0] / ours.inv_freq[0]).item() == 1.0
    assert (plain[-1] / ours.inv_freq[-1]).item() == pytest.approx(factor)
    assert ours.attention_scale == 1.0


def test_dynamic_leaves_the_trained_length_alone_and_stretches_beyond() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 1000}
    plain = spectrum(64, 1e4, None, 1000).inv_freq
    assert torch.equal(spectrum(64, 1e4, scaling, 1000).inv_freq, plain)
    stretched = spectrum(64, 1e4, scaling, 3000).inv_freq  # 4 * 3000 / 1000 - 3 = 9
    assert (plain[-1] / stretched[-1]).item() == pytest.approx(9.0)


@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic", "ntk_by_parts", "yarn", "yarn_paper", "llama3"])
def test_factor_1_is_the_default_scheme(name: str) -> None:
    trained = {} if name in ("linear", "ntk") else {"original_max_position_embeddings": 2048}
    ours = spectrum(128, 1e6, {"rope_type": name, "factor": 1.0, **trained}, 2048)
    torch.testing.assert_close(ours.inv_freq, spectrum(128, 1e6, None, 2048).inv_freq, rtol=1e-14, atol=0)
    assert ours.attention_scale == 1.0


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_tables_are_exact_to_a_millionth_at_position_a_million(theta: float) -> None:
    last, head_dim = 1_048_576, 16
    cos, sin = rotation_tables(spectrum(head_dim, theta, None, last + 1), last + 1, CPU)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (last + 1, head_dim // 2)
    with mpmath.workdps(40):
        for position in (0, 1, 4_097, 100_000, 999_983, last):
            for i in range(head_dim // 2):
                angle = position * mpmath.mpf(theta) ** (mpmath.mpf(-2 * i) / head_dim)
                assert abs(mpmath.cos(angle) - cos[position, i].item()) < 1e-6
                assert abs(mpmath.sin(angle) - sin[position, i].item()) < 1e-6


def test_attention_scale_is_in_both_tables() -> None:
    inv_freq = torch.tensor([1.0, 0.01], dtype=torch.float64)
    cos, sin = rotation_tables(Spectrum(inv_freq, 1.5), 50, CPU)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((50, 2), 2.25))


@pytest.mark.parametrize("start", [0, 100_000])
def test_rotation_is_multiplication_by_a_complex_number(start: int) -> None:
    torch.manual_seed(0)
    B, T, H, D = 2, 7, 3, 16
    x = torch.randn(B, T, H, D)
    scheme = spectrum(D, 1e6, None, start + T)
    cos, sin = (table[start:, None] for table in rotation_tables(scheme, start + T, CPU))  # (T, 1, D/2)
    turns = torch.exp(1j * torch.outer(torch.arange(start, start + T).double(), scheme.inv_freq))
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns[:, None]).flatten(-2)
    torch.testing.assert_close(rotate(x, cos[None], sin[None]).double(), expected, rtol=0, atol=1e-6)


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64)
    cos, sin = rotation_tables(spectrum(64, 1e4, None, 20_000), 20_000, CPU)

    def score(at: int, distance: int) -> float:
        turned = [
            rotate(x, cos[p].view(1, 1, 1, -1), sin[p].view(1, 1, 1, -1)) for x, p in ((q, at + distance), (k, at))
        ]
        return (turned[0].double() * turned[1].double()).sum().item()

    for distance in (0, 1, 50, 3000):
        near = score(0, distance)
        assert score(16_384, distance) == pytest.approx(near, abs=1e-4)
        assert abs(score(0, distance + 1) - near) > 1e-2  # another distance is another score


def test_rotation_of_bfloat16_is_rounded_once() -> None:
    """Done in bfloat16, three roundings would make a quarter of the results differ."""
    torch.manual_seed(0)
    x = torch.randn(1, 512, 4, 64).bfloat16()
    scheme = spectrum(64, 1e6, None, 16_384)
    cos, sin = (table[-512:, None] for table in rotation_tables(scheme, 16_384, CPU))
    turned = rotate(x, cos[None], sin[None])
    turns = torch.exp(1j * torch.outer(torch.arange(16_384 - 512, 16_384).double(), scheme.inv_freq))
    exact = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns[:, None]).flatten(-2)
    assert turned.dtype == torch.bfloat16
    assert (turned != exact.bfloat16()).float().mean() < 1e-3  # where float32 falls on the other side of a tie


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "su"}, "'su'.*default, linear, ntk, dynamic, ntk_by_parts"),
        ({"rope_type": "linear"}, r"lacks \['factor'\]"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fats": 1.0}, "unknown.*beta_fats"),
        ({"rope_type": "linear", "factor": 1e-4}, "factor is 0.0001.*at least 0.001"),
        ({"rope_type": "linear", "factor": math.nan}, "factor is nan"),
        ({"rope_type": "linear", "factor": "4"}, "factor is '4'"),
        ({"rope_type": "linear", "factor": None}, "factor is None"),
        (
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 0},
            "original_max_position_embeddings",
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            },
            "low_freq_factor 4.0",
        ),
        ("linear", "'linear'"),
    ],
)
def test_a_scaling_that_cannot_be_is_named(scaling: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        spectrum(64, 1e4, scaling, 100)


def complete(name: str) -> dict[str, Any]:
    """Every parameter of a scheme, at a value that is possible."""
    values: dict[str, Any] = {
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim", "alpha", "beta_slow"), 1.0),
        **dict.fromkeys(("beta", "beta_fast", "high_freq_factor"), 4.0),
        "low_freq_factor": 1.0,
        "truncate": True,
    }
    taken = inspect.signature(SPECTRA[name]).parameters.values()
    return {p.name: values[p.name] for p in taken if p.kind is p.KEYWORD_ONLY}


PARAMETERS = [(name, key) for name in SPECTRA for key in complete(name)]


@pytest.mark.parametrize("name", SPECTRA)
def test_every_parameter_of_a_scheme_may_be_given(name: str) -> None:
    found = spectrum(8, 1e4, {"rope_type": name, **complete(name)}, 100)
    assert found.inv_freq.isfinite().all()
    assert 0 < found.attention_scale < 10


@pytest.mark.parametrize(
    "value", ["2", True, -1, -0.5, math.nan, math.inf, [math.nan] * 4, {}, 1e300, 10**400], ids=str
)
@pytest.mark.parametrize(("name", "key"), PARAMETERS)
def test_a_parameter_that_is_no_number_in_range_is_named(name: str, key: str, value: Any) -> None:
    if key == "truncate" and value is True:
        value = "false"  # a string, which Python takes for true
    with pytest.raises(ValueError, match=rf"rope_scaling.*{key}"):
        spectrum(8, 1e4, {"rope_type": name, **complete(name), key: value}, 100)


@pytest.mark.parametrize(("name", "key"), [pair for pair in PARAMETERS if pair[1].endswith("freq_factor")])
def test_0_turns_are_no_bound(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is 0"):
        spectrum(8, 1e4, {"rope_type": name, **complete(name), key: 0}, 100)


@pytest.mark.parametrize("key", ["short_factor", "long_factor"])
@pytest.mark.parametrize("length", [10, 100])
def test_both_lists_of_longrope_are_checked_whatever_the_length(key: str, length: int) -> None:
    scaling = {"rope_type": "longrope", **complete("longrope"), key: [1.0, 2.0]}
    with pytest.raises(ValueError, match="2 factors for 4 pairs"):
        spectrum(8, 1e4, scaling, length)


@pytest.mark.parametrize(
    ("head_dim", "scaling", "said"),
    [
        (8, {"rope_type": "longrope", **complete("longrope"), "original_max_position_embeddings": 1}, "heads of 8"),
        (2, {"rope_type": "ntk", "factor": 4.0}, "heads of 2"),
        (8, {"rope_type": "yarn", **complete("yarn"), "beta_fast": 0.5}, "beta_fast is the larger"),
        (8, {"rope_type": ["yarn"]}, r"\['yarn'\]"),
    ],
)
def test_a_formula_that_has_no_value_is_named(head_dim: int, scaling: dict[str, Any], said: str) -> None:
    if scaling.get("attention_factor"):
        scaling = {key: value for key, value in scaling.items() if key != "attention_factor"}
    with pytest.raises(ValueError, match=said):
        spectrum(head_dim, 1e4, scaling, 100)


@pytest.mark.parametrize("theta", [1, 1.0, 0, -1e4, math.nan, math.inf, "1e4", None, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_theta_that_cannot_be_is_named(name: str, theta: Any) -> None:
    with pytest.raises(ValueError, match=r"rope_theta is .*above 1"):
        spectrum(8, theta, {"rope_type": name, **complete(name)}, 100)


@pytest.mark.parametrize("name", SPECTRA)
def test_tables_do_not_depend_on_the_default_device(name: str) -> None:
    scaling = {"rope_type": name, **complete(name)}
    expected = rotation_tables(spectrum(8, 1e4, scaling, 100), 100, CPU)
    torch.set_default_device("meta")
    try:
        found = rotation_tables(spectrum(8, 1e4, scaling, 100), 100, CPU)
    finally:
        torch.set_default_device(None)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == CPU
        assert torch.equal(ours, theirs)
