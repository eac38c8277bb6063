"""A scheme seen before anything is trained: its frequencies, and how far attention can tell distances with them.

Rotary embedding gives each pair of a head's numbers a clock hand, and pair i turns by w_i a token. What a scheme does
to long contexts can be read off the hands alone. A hand whose wavelength 2·pi/w_i is longer than the trained context
never came round in training: at a longer distance it shows an angle that no weight has seen. A query and a key that
are alike score sum_i cos(n·w_i) at distance n, on average over contents: g(n), the *attention expectation*. It begins
at D/2 and falls; where it first drops below zero, near and far can no longer be told by it. That distance foretells
where retrieval breaks (arXiv 2308.12950, sections 3.3 and G.2, figure 9a).

All of it is exact: float64, every integer distance, and no model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama.checkpoint import open_checkpoint
from llama.config import RopeScaling
from llama.evals.record import Record, begin, save_record, tell
from llama.evals.table import render
from llama.front import register_scheme, scaling_of
from llama.options import Bases, Count, MaybeAbove, MaybeBase, MaybeCount, MaybePath, Out, Scalings, nearest, unset
from llama.parallel import start
from llama.rope import SPECTRA, default, ntk, spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FURTHEST = 2**20
"""Distances up to a million tokens are searched for the first zero."""
_BLOCK = 1024
"""Distances in a row of the angle addition below; a million are as many rows."""
_POINTS = 400
"""Of a curve; they are spread evenly over the logarithm of the distance."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A scheme at one theta, and what follows from its spectrum alone."""

    scheme: str
    theta: float
    scaling: RopeScaling
    """The `rope_scaling` that makes it: to try the same in `Llama.build`."""
    inv_freq: NDArray[np.float64]
    """(D/2,): radians a token."""
    attention_scale: float
    expectation: NDArray[np.float64]
    """g(n) at each of the `distances`."""
    lowest: NDArray[np.float64]
    """The smallest g up to each of them: g jitters, and this is what falls."""
    first_zero: int | None
    """The smallest distance n with g(n) < 0; None where there is none up to FURTHEST."""
    turning: NDArray[np.float64]
    """The share of pairs that complete a turn within each of the `distances`."""
    turning_trained: float
    turning_length: float
    """The same, within the trained context and within the target length."""

    @property
    def wavelengths(self) -> NDArray[np.float64]:
        """(D/2,): tokens a turn; infinite for a pair that stands still."""
        with np.errstate(divide="ignore"):
            return 2 * math.pi / self.inv_freq


@dataclass(frozen=True, eq=False)
class Spectra:
    """Schemes side by side."""

    head_dim: int
    theta: float
    factor: float
    trained: int
    length: int
    distances: NDArray[np.int64]
    curves: tuple[Curve, ...]

    def name(self, curve: Curve) -> str:
        """Of a curve in a table or a picture: the scheme, with its theta where that is another than the others'."""
        return curve.scheme if curve.theta == self.theta else f"{curve.scheme}, θ = {curve.theta:,.0f}"


def spectra(
    schemes: Sequence[str | RopeScaling] | None = None,
    head_dim: int = 128,
    theta: float = 10_000.0,
    trained: int = 4_096,
    length: int | None = None,
    factor: float | None = None,
    other_thetas: Sequence[float] = (),
) -> Spectra:
    """Some of the schemes in `llama.rope.SPECTRA` (default: all), or whole scalings, at one theta, trained context and
    target length.

    `factor` and `length` follow from each other by length = factor·trained; with neither, the factor is 4. The plain
    scheme is shown at `other_thetas` as well: raising theta is Code Llama's own way. What a scheme takes besides,
    `parameters` chooses. Raises ValueError for an unknown scheme and for numbers that can't be.
    """
    if head_dim < 4 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; give an even number of at least 4")
    if trained < 1:
        raise ValueError(f"a trained context of {trained} tokens; give at least 1")
    if factor is None:
        factor = 4.0 if length is None else length / trained
    length = round(factor * trained) if length is None else length
    if length < trained:
        raise ValueError(
            f"a length of {length} for a trained context of {trained} (factor {factor:g}): give a length that is not "
            "shorter, or a factor of at least 1"
        )
    if not all(1 < base < math.inf for base in (theta, *other_thetas)):
        raise ValueError(f"theta is {[theta, *other_thetas]}; it must be a number above 1")
    every: Sequence[str | RopeScaling] = list(SPECTRA) if schemes is None else schemes
    asked = [(scheme, theta) for scheme in every]
    asked += [("default", base) for base in other_thetas]
    furthest = max(length, min(8 * length, FURTHEST))
    spread = np.geomspace(1, furthest, _POINTS).round().astype(np.int64)
    distances = np.unique(np.concatenate([spread, [0, trained, length]]))
    curves = []
    for scheme, base in asked:
        whole = parameters(scheme, head_dim, base, factor, trained) if isinstance(scheme, str) else scheme
        name, scaling = str(whole.get("rope_type", whole.get("type", "default"))), whole
        found = spectrum(head_dim, base, scaling, length)
        inv_freq = found.inv_freq
        expected = expectation(inv_freq, 0, furthest + 1)
        curves.append(
            Curve(
                scheme=name,
                theta=base,
                scaling=scaling,
                inv_freq=inv_freq.numpy(),
                attention_scale=found.attention_scale,
                expectation=expected[distances].numpy(),
                lowest=expected.cummin(0).values[distances].numpy(),
                first_zero=first_zero(inv_freq),
                turning=turning(inv_freq, distances),
                turning_trained=float(turning(inv_freq, trained)),
                turning_length=float(turning(inv_freq, length)),
            )
        )
    return Spectra(head_dim, theta, factor, trained, length, distances, tuple(curves))


def parameters(name: str, head_dim: int, theta: float, factor: float, trained: int) -> RopeScaling:
    """A `rope_scaling` for the scheme `name`, with all that it must be given.

    Where factor and trained context don't say it, an example: p-RoPE turns 0.75 of the pairs, and LongRoPE's divisors,
    which its authors search for each model, are 1 within the trained context and those of `ntk` beyond. Raises
    ValueError for a name that SPECTRA doesn't have, and for a scheme that must be given something else.
    """
    if name not in SPECTRA:
        raise ValueError(f"there is no scheme {name!r}; there are {', '.join(SPECTRA)}, and FILE.py:FUNCTION")
    divisors = default(head_dim, theta, trained).inv_freq / ntk(head_dim, theta, trained, factor=factor).inv_freq
    examples: dict[str, Any] = {
        "factor": factor,
        "original_max_position_embeddings": trained,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * (head_dim // 2),
        "long_factor": divisors.tolist(),
    }
    accepted = inspect.signature(SPECTRA[name]).parameters.values()
    wanted = [p.name for p in accepted if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    unknown = [key for key in wanted if key not in examples]
    if unknown:
        raise ValueError(
            f"the scheme {name!r} must be given {', '.join(unknown)}, which this command can't choose: give its "
            f"function a default (what it can choose: {', '.join(examples)})"
        )
    return {"rope_type": name, **{key: examples[key] for key in wanted}}


def expectation(inv_freq: Tensor, start: int, stop: int) -> Tensor:
    """g(n) for every distance from `start` to `stop` - 1: (stop - start,) float64.

    By cos(a + b) = cos a · cos b - sin a · sin b, the distances a + b, where a counts blocks and b the places in one,
    are a product of two matrices: so a million distances take the cosines of two thousand.
    """
    within = torch.outer(torch.arange(_BLOCK).double(), inv_freq)  # (b, D/2)
    before = torch.outer(torch.arange(start, stop, _BLOCK).double(), inv_freq)  # (a, D/2)
    found = torch.cat([before.cos(), -before.sin()], -1) @ torch.cat([within.cos(), within.sin()], -1).mT  # (a, b)
    return found.flatten()[: stop - start]


def first_zero(inv_freq: Tensor, furthest: int = FURTHEST) -> int | None:
    """The smallest distance, up to `furthest`, at which g is negative."""
    start, stop = 0, 4 * _BLOCK
    while start <= furthest:
        below = (expectation(inv_freq, start, min(stop, furthest + 1)) < 0).nonzero()
        if len(below):
            return start + int(below[0])
        start, stop = stop, 2 * stop
    return None


def turning(inv_freq: Tensor, within: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """The share of pairs whose wavelength is at most `within` tokens."""
    lengths = np.sort(2 * math.pi / inv_freq[inv_freq > 0].numpy())
    found: NDArray[np.float64] = np.searchsorted(lengths, within, side="right") / len(inv_freq)
    return found


def turning_share(theta: float, within: float) -> float:
    """That share for the plain scheme with as many pairs as you please: ln(T/2pi) / ln(theta)."""
    return min(max(math.log(within / (2 * math.pi)) / math.log(theta), 0.0), 1.0)


# The command ---------------------------------------------------------------------------------------------------------


def rows_of(found: Spectra) -> Iterator[dict[str, Any]]:
    """The tidy table: one figure a row; `at` is the pair, the distance or the length that it belongs to."""
    for curve in found.curves:
        base = {"scheme": curve.scheme, "theta": curve.theta, "factor": found.factor}
        base |= {"trained": found.trained, "length": found.length}
        for pair, (w, wavelength) in enumerate(zip(curve.inv_freq, curve.wavelengths, strict=True)):
            yield {**base, "metric": "inv_freq", "at": pair, "value": float(w)}
            yield {**base, "metric": "wavelength", "at": pair, "value": float(wavelength)}
        for i, distance in enumerate(found.distances):
            yield {**base, "metric": "expectation", "at": int(distance), "value": float(curve.expectation[i])}
            yield {**base, "metric": "lowest", "at": int(distance), "value": float(curve.lowest[i])}
            yield {**base, "metric": "turning", "at": int(distance), "value": float(curve.turning[i])}
        yield {**base, "metric": "attention_scale", "at": "", "value": curve.attention_scale}
        yield {**base, "metric": "first_zero", "at": "", "value": "" if curve.first_zero is None else curve.first_zero}


def draw(found: Spectra, figure: Figure) -> None:
    """Four panels: frequencies, wavelengths against the trained context, expectation, pairs that turn."""
    figure.set_size_inches(13, 9)
    (frequencies, wavelengths), (expected, turns) = figure.subplots(2, 2)
    pairs, positive = np.arange(found.head_dim // 2), found.distances > 0
    for i, curve in enumerate(found.curves):
        # Many schemes share most of their course, so later ones are drawn thinner and let the earlier show.
        look: dict[str, Any] = {
            "label": found.name(curve),
            "color": f"C{i % 10}",
            "linestyle": ("-", "--", ":")[i // 10 % 3],
            "linewidth": 2.6 - 1.8 * i / max(1, len(found.curves) - 1),
        }
        moving = curve.inv_freq > 0
        frequencies.plot(pairs[moving], curve.inv_freq[moving], **look)
        wavelengths.plot(pairs[moving], curve.wavelengths[moving] / found.trained, **look)
        expected.plot(found.distances[positive], curve.lowest[positive] / len(pairs), **look)
        if curve.first_zero is not None and curve.first_zero <= found.distances[-1]:
            expected.plot(curve.first_zero, 0, "o", color=look["color"], markersize=4)
        turns.plot(found.distances[positive], curve.turning[positive], **look)
    frequencies.set(title="inverse frequencies", xlabel="pair", ylabel="radians a token", yscale="log")
    wavelengths.set(title="wavelength / trained context", xlabel="pair", yscale="log")
    wavelengths.axhline(1, color="0.5", linewidth=0.8)
    expected.set(title="lowest attention expectation up to n, g / g(0)", xlabel="distance n", xscale="log")
    expected.axhline(0, color="0.5", linewidth=0.8)
    turns.set(title="share of pairs that turn within T", xlabel="T", xscale="log", ylim=(0, 1.02))
    for panel in (expected, turns):
        panel.axvline(found.trained, color="0.5", linewidth=0.8)
        panel.axvline(found.length, color="0.5", linewidth=0.8, linestyle="--")
    turns.legend(fontsize="small")


def named(schemes: Sequence[str | RopeScaling]) -> list[str | RopeScaling]:
    """Schemes as the command line gives them: a name in `llama.rope.SPECTRA`, or a function of a user's own, which is
    put there under its name; and whole scalings, with the same. Raises ValueError for a name that there is not."""
    found = []
    for given in schemes:
        scheme = given
        if isinstance(scheme, str) and ".py:" in scheme:
            scheme = register_scheme(scheme)
        elif not isinstance(scheme, str):
            scheme = scaling_of(scheme) or {}
        elif scheme not in SPECTRA:
            known = f"there are {', '.join(SPECTRA)}, and FILE.py:FUNCTION"
            raise ValueError(f"there is no scheme {scheme!r}{nearest(scheme, list(SPECTRA))} ({known})")
        found.append(scheme)
    return found


def command(
    *,
    out: Out = "longcontext",
    schemes: Annotated[Scalings, unset("all")] = (),
    head_dim: MaybeCount = None,
    theta: MaybeBase = None,
    trained: Count = 4096,
    length: MaybeCount = None,
    factor: MaybeAbove = None,
    other_thetas: Bases = (1_000_000.0,),
    ckpt_dir: MaybePath = None,
    json: bool = False,
) -> None:
    """RoPE schemes side by side: frequencies, attention expectation with its first zero, and pairs that turn.

    The defaults are Code Llama's beginning: Llama 2's head and theta, 4,096 tokens trained, 16,384 wanted.

    Args:
        out: the folder for spectra.csv, spectra.json and spectra.png.
        schemes: names of the table in rope.py, FILE.py:FUNCTION for one of your own, or a whole rope_scaling:
            yarn,linear.
        head_dim: numbers a head (none: 128, or the checkpoint's).
        theta: the base (none: 10000, or the checkpoint's).
        trained: the context that the model was trained on.
        length: the context that is wanted (none: factor times as much).
        factor: by how much the schemes stretch (none: length / trained, or 4).
        other_thetas: bases at which the plain scheme is shown as well: 500000,1000000.
        ckpt_dir: a checkpoint to take head_dim and theta of.
        json: print JSON instead of the table.
    """
    started, asked = begin(out), named(schemes) or None
    ranks = start()
    if ckpt_dir is not None:
        args = open_checkpoint(ckpt_dir).args()
        head_dim, theta = head_dim or args.head_dim, theta or args.rope_theta
    found = spectra(asked, head_dim or 128, theta or 10_000.0, trained, length, factor, other_thetas)
    if not ranks.leads:
        return
    made_of = {name: getattr(found, name) for name in ("head_dim", "theta", "factor", "trained", "length")}
    schemes_of = [{"theta": c.theta, "rope_scaling": c.scaling, "first_zero": c.first_zero} for c in found.curves]
    record = Record("spectra", list(rows_of(found)), {**made_of, "schemes": schemes_of})
    save_record(record, out, started, draw=lambda figure: draw(found, figure))
    header = (
        f"d = {found.head_dim}, θ = {found.theta:,.0f}, factor {found.factor:g}",
        "slowest / trained",
        "g(n) < 0 from",
        f"turn in {found.trained:,}",
        f"turn in {found.length:,}",
        "scale",
    )
    rows = [
        (
            found.name(curve),
            f"{curve.wavelengths.max() / found.trained:.2f}",
            "never" if curve.first_zero is None else f"{curve.first_zero:,}",
            f"{curve.turning_trained:.1%}",
            f"{curve.turning_length:.1%}",
            f"{curve.attention_scale:.3f}",
        )
        for curve in found.curves
    ]
    tell(render(header, rows), {"measure": "spectra", "out": out, **made_of, "schemes": schemes_of}, json)
