"""Rotary position embedding: where a token stands, told by turning its query and key.

Each head's D numbers are taken as D/2 pairs; pair i of the token at position p is turned by the angle p·w_i. The
score of a query and a key then depends on their distance alone (RoFormer, arXiv 2104.09864, section 3.2). The
frequencies w_i are the *spectrum*: theta^(-2i/D) for the plain scheme, which Code Llama stretches by raising theta
from 10,000 to 1,000,000 (arXiv 2308.12950, section 2.4). Every scaling scheme is one function here that gives
`(inv_freq, attention_scale)`; nothing else in the model knows that there is more than one.

Angles are computed in float64 and kept as float32 cosines and sines; the rotation is done in float32 whatever the
dtype of the weights, since rounding either to bfloat16 destroys long contexts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.arguments import Range, checked
from llama.config import RANGES, RopeScaling


class Spectrum(NamedTuple):
    """What a scheme chooses."""

    inv_freq: Tensor
    """(D/2,) float64: radians per position of each pair."""
    attention_scale: float = 1.0
    """Factor on cos and sin, so its square is one on every attention score (YaRN's temperature)."""


def default(head_dim: int, theta: float, length: int) -> Spectrum:
    """w_i = theta^(-2i/D) (arXiv 2104.09864, eq. 15)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim  # even in a meta model
    return Spectrum(theta**-exponent)


def linear(head_dim: int, theta: float, length: int, *, factor: float) -> Spectrum:
    """Position interpolation, w_i / s (arXiv 2306.15595)."""
    return Spectrum(default(head_dim, theta, length).inv_freq / factor)


def ntk(head_dim: int, theta: float, length: int, *, factor: float) -> Spectrum:
    """NTK-aware scaling with a fixed base, theta' = theta·s^(D/(D-2)): the slowest pair turns s times slower, the
    fastest as before (arXiv 2309.00071, section 3.1)."""
    return default(head_dim, theta * factor ** (head_dim / (head_dim - 2)), length)


def dynamic(
    head_dim: int, theta: float, length: int, *, factor: float, original_max_position_embeddings: int,
) -> Spectrum:  # fmt: skip
    """NTK-aware scaling whose base grows with the length l: theta·(s·l/L - (s-1))^(D/(D-2)) where l > L
    (arXiv 2309.00071, section 3.3).

    l is the length the tables are made for: the tokens given, or with a cache all its slots. So the base never
    changes under keys that are already rotated.
    """
    stretch = factor * max(length / original_max_position_embeddings, 1.0) - (factor - 1)
    return ntk(head_dim, theta, length, factor=stretch)


def ntk_by_parts(
    head_dim: int, theta: float, length: int, *, factor: float, original_max_position_embeddings: int,
    alpha: float = 1.0, beta: float = 32.0,
) -> Spectrum:  # fmt: skip
    """By the number of turns r = L/wavelength that a pair makes within the trained context L: w/s below `alpha`, w
    above `beta`, the mix linear in r between (arXiv 2309.00071, section 3.2)."""
    if not alpha < beta:
        raise ValueError(f"rope_scaling has alpha {alpha} and beta {beta}; alpha must be below beta")
    plain = default(head_dim, theta, length).inv_freq
    turns = original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - alpha) / (beta - alpha)).clamp(0, 1)
    return Spectrum(plain * kept + plain / factor * (1 - kept))


def yarn(
    head_dim: int, theta: float, length: int, *, factor: float, original_max_position_embeddings: int,
    attention_factor: float | None = None, beta_fast: float = 32.0, beta_slow: float = 1.0,
    mscale: float | None = None, mscale_all_dim: float | None = None, truncate: bool = True,
) -> Spectrum:  # fmt: skip
    """YaRN as released: pairs that turn more than `beta_fast` times within the trained context keep their frequency,
    those that turn less than `beta_slow` times are interpolated, with a ramp linear in the pair's index between
    (arXiv 2309.00071, section 3.2; the paper's own equation is `yarn_paper`).
    """

    if beta_slow > beta_fast:
        raise ValueError(f"rope_scaling has beta_slow {beta_slow} and beta_fast {beta_fast}; beta_fast is the larger")

    def pair_that_turns(times: float) -> float:
        turns_of_first = original_max_position_embeddings / (2 * math.pi)
        return head_dim * math.log(turns_of_first / times) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    interpolated = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    plain = default(head_dim, theta, length).inv_freq
    if attention_factor is None:
        attention_factor = _temperature(factor)
        if mscale and mscale_all_dim:
            attention_factor = _temperature(factor, mscale) / _temperature(factor, mscale_all_dim)
    return Spectrum(plain * (1 - interpolated) + plain / factor * interpolated, attention_factor)


def yarn_paper(
    head_dim: int, theta: float, length: int, *, factor: float, original_max_position_embeddings: int,
    attention_factor: float | None = None, alpha: float = 1.0, beta: float = 32.0,
) -> Spectrum:  # fmt: skip
    """YaRN as the paper has it: `ntk_by_parts`, whose ramp is linear in the number of turns, and the temperature
    0.1·ln(s) + 1 (arXiv 2309.00071, sections 3.2 and 3.4). Every released implementation has the other ramp."""
    trained = original_max_position_embeddings
    parts = ntk_by_parts(
        head_dim, theta, length, factor=factor, original_max_position_embeddings=trained, alpha=alpha, beta=beta
    )
    return Spectrum(parts.inv_freq, _temperature(factor) if attention_factor is None else attention_factor)


def _temperature(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1.0


def longrope(
    head_dim: int, theta: float, length: int, *, short_factor: Sequence[float], long_factor: Sequence[float],
    factor: float, original_max_position_embeddings: int, attention_factor: float | None = None,
) -> Spectrum:  # fmt: skip
    """LongRoPE: each pair has a divisor of its own, found by search, and another beyond the trained context L; cos and
    sin are scaled by sqrt(1 + ln s / ln L) (arXiv 2402.13753, and its released code)."""
    for factors in (short_factor, long_factor):
        if len(factors) != head_dim // 2:
            raise ValueError(f"rope_scaling has {len(factors)} factors for {head_dim // 2} pairs: give one for each")
    chosen = long_factor if length > original_max_position_embeddings else short_factor
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original_max_position_embeddings))
    plain = default(head_dim, theta, length).inv_freq
    return Spectrum(plain / torch.tensor(chosen, dtype=torch.float64, device="cpu"), attention_factor)


def llama3(
    head_dim: int, theta: float, length: int, *, factor: float, original_max_position_embeddings: int,
    low_freq_factor: float = 1.0, high_freq_factor: float = 4.0,
) -> Spectrum:  # fmt: skip
    """Llama 3.1's: `ntk_by_parts` that keeps pairs from `high_freq_factor` turns on, 4 instead of 32
    (arXiv 2407.21783, section 3.4.2, and its model code)."""
    if not low_freq_factor < high_freq_factor:
        raise ValueError(f"low_freq_factor {low_freq_factor} must be below high_freq_factor {high_freq_factor}")
    trained, bounds = original_max_position_embeddings, {"alpha": low_freq_factor, "beta": high_freq_factor}
    return ntk_by_parts(head_dim, theta, length, factor=factor, original_max_position_embeddings=trained, **bounds)


def proportional(head_dim: int, theta: float, length: int, *, partial_rotary_factor: float) -> Spectrum:
    """p-RoPE: the fastest floor(p·D/2) pairs turn as ever, the others not at all (arXiv 2410.06205)."""
    plain = default(head_dim, theta, length).inv_freq
    turning = torch.arange(len(plain), device="cpu") < int(partial_rotary_factor * head_dim // 2)
    return Spectrum(plain * turning)


def none(head_dim: int, theta: float, length: int) -> Spectrum:
    """No rotation: what a token knows of places, the causal mask alone tells it (NoPE, arXiv 2305.19466)."""
    return Spectrum(torch.zeros(head_dim // 2, dtype=torch.float64, device="cpu"))


SPECTRA: dict[str, Callable[..., Spectrum]] = {
    scheme.__name__: scheme
    for scheme in (
        default, linear, ntk, dynamic, ntk_by_parts, yarn, yarn_paper, longrope, llama3, proportional, none
    )
}  # fmt: skip
"""Every scheme by its name, which is transformers' where it has it. One of your own is a function of the same kind
(what it takes besides head_dim, theta and length, by keyword alone), put in here under its name."""

_POSITIVE = ("attention_factor", "alpha", "beta", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
_RANGES: dict[str, Range] = {
    "original_max_position_embeddings": (float, "at least", 1, 1e9),
    "factor": (float, "at least", 1e-3, 1e9),  # below 1, as transformers allows, positions are spread
    **dict.fromkeys((*_POSITIVE, "short_factor", "long_factor"), (float, "at least", 1e-9, 1e9)),
    **dict.fromkeys(("mscale", "mscale_all_dim"), (float, "at least", 0, 1e9)),
    "partial_rotary_factor": (float, "at least", 0, 1),
}
"""Of a scaling's numbers, and of each number of a list."""


def spectrum(head_dim: int, theta: float, scaling: RopeScaling | None, length: int) -> Spectrum:
    """The spectrum that a `rope_scaling` names, for tables of `length` positions; ValueError where it can't be."""
    if scaling is not None and not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling is {scaling!r:.50}; give a dictionary: {{'rope_type': 'linear', 'factor': 4}}")
    parameters = dict(scaling or {})
    name = parameters.pop("rope_type", parameters.pop("type", "default"))
    if not isinstance(name, str) or name not in SPECTRA:
        raise ValueError(f"rope_scaling asks for rope_type {name!r}; there are {', '.join(SPECTRA)}")
    scheme = SPECTRA[name]
    accepted = inspect.signature(scheme).parameters
    options = {key: p for key, p in accepted.items() if p.kind is p.KEYWORD_ONLY}
    missing = [key for key, p in options.items() if p.default is p.empty and key not in parameters]
    unknown = [key for key in parameters if key not in options]
    if missing or unknown:
        raise ValueError(
            f"rope_scaling {scaling} lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}; "
            f"{name!r} takes {list(options) or 'no parameters'}"
        )
    for key, value in parameters.items():
        default_value = options[key].default
        if isinstance(default_value, bool) and not isinstance(value, bool):
            raise ValueError(f"rope_scaling's {key} is {value!r:.80}; give true or false")
        if key in _RANGES and not (value is None and default_value is None):
            many = key in ("short_factor", "long_factor") and isinstance(value, (list, tuple))
            for number in value if many else [value]:
                checked(f"rope_scaling's {key}", number, _RANGES[key])
    checked("rope_theta", theta, RANGES["rope_theta"])
    try:
        found = Spectrum(*scheme(head_dim, theta, length, **parameters))
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"rope_scaling {scaling} can't be used for heads of {head_dim} ({error})") from error
    if found.inv_freq.shape != (head_dim // 2,):
        right = f"a scheme gives one for each of the {head_dim // 2} pairs, and an attention scale"
        raise ValueError(f"{name!r} gives frequencies of shape {tuple(found.inv_freq.shape)}; {right}")
    return found


def rotation_tables(spectrum: Spectrum, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, each (length, D/2) float32 on `device`."""
    with torch.inference_mode(False):  # the tables are kept, and training may need them next
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), spectrum.inv_freq.clone())
        cos, sin = angles.cos() * spectrum.attention_scale, angles.sin() * spectrum.attention_scale
        return cos.float().to(device), sin.float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns adjacent pairs of x (B, T, H, D) by the angles whose cos and sin are (B or 1, T, 1, D/2)."""
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)  # each (B, T, H, D/2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)
