"""What is compared: one start, several ways to tell positions, and the sizes at which it fits an hour.

A theta means something only beside a length. What it decides is how many of a head's pairs come round within the
context: ln(T/2·pi) / ln(theta) of them. So a model that is a thirtieth of the paper's length gets the thetas that let
the same shares turn: where Llama 2 had 1e4 at 4,096 tokens and Code Llama 1e6 at 16,384, a model of 128 tokens has
72.5, and fine-tuned on 512, 2,272.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama.config import RopeScaling
from llama.longcontext.spectra import turning_share

PAPER_BASE, PAPER_TUNED = (4096, 1e4), (16384, 1e6)
"""Length and theta of Llama 2, and of Code Llama's long-context fine-tuning."""
REACH = 4
"""The schemes that stretch further than the fine-tuned length (yarn, ntk_by_parts) do so by this factor: for Code
Llama's lengths that is 65,536 tokens."""


@dataclass(frozen=True)
class Condition:
    """A way to go on from the start. The same start and the same rows are everyone's."""

    name: str
    """Of its folder."""
    title: str
    tuned: bool
    rope_theta: float
    rope_scaling: RopeScaling | None = None


@dataclass(frozen=True)
class Preset:
    """How large all of it is. Lengths are in tokens."""

    params: Mapping[str, Any]
    """The model's numbers, but for those of RoPE."""
    base_length: int
    base_steps: int
    tuned_steps: int
    tokens_a_step: int
    base_lr: float
    tuned_lr: float
    keys: float
    """The share of tokens in texts with keys: plain code hardly rewards to look far back."""
    factor: int
    """The fine-tuned length is so many times the base's."""
    lengths: tuple[float, ...]
    """At which keys are looked for, in base lengths."""
    depths: tuple[float, ...]
    samples: int
    documents: int
    bins: int
    seeds: int
    files: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """Of the standard library, to train and to measure on; None: those that `llama.train` divides it into."""


_TOY = {"dim": 128, "n_layers": 3, "n_heads": 4, "vocab_size": 1024, "hidden_dim": 224}
_SMOKE = {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 512, "hidden_dim": 64}
PRESETS = {
    "full": Preset(
        params=_TOY,
        base_length=128,
        base_steps=5000,  # at 2,500 keys were just being learned: a third of them found at 128 tokens
        tuned_steps=500,  # 150 at 4e-4 were too few: with theta raised a third of the keys found at the new length
        tokens_a_step=4096,
        base_lr=3e-3,
        tuned_lr=1e-3,
        keys=0.5,
        factor=4,
        lengths=(1, 2, 4, 6, 8, 16),
        depths=(0.0, 0.2, 0.4),
        samples=64,
        documents=48,
        bins=16,
        seeds=3,
    ),
    "smoke": Preset(
        params=_SMOKE,
        base_length=128,
        base_steps=4,
        tuned_steps=2,
        tokens_a_step=512,
        base_lr=3e-3,
        tuned_lr=4e-4,
        keys=0.5,
        factor=2,
        lengths=(2, 3, 4),
        depths=(0.0, 0.2, 0.4),
        samples=3,
        documents=2,
        bins=4,
        seeds=2,
        files=(("argparse.py", "shutil.py", "textwrap.py"), ("_collections_abc.py", "bisect.py")),
    ),
}


def matched_theta(length: int, like: tuple[int, float]) -> float:
    """The theta with which the same share of pairs turns within `length` as with another length and its theta."""
    its_length, its_theta = like
    return float((length / (2 * math.pi)) ** (1 / turning_share(its_theta, its_length)))


def conditions(base_length: int, factor: int, theta: float, raised: float) -> tuple[Condition, ...]:
    """The start as it is and with theta raised, and what it is fine-tuned under at `factor` times its length."""
    stretched = {"factor": float(REACH * factor), "original_max_position_embeddings": base_length}
    tuned = "fine-tuned, "
    return (
        Condition("start", "no fine-tuning, θ kept", False, theta),
        Condition("start-raised", "no fine-tuning, θ raised", False, raised),
        Condition("kept", tuned + "θ kept", True, theta),
        Condition("linear", tuned + f"frequencies / {factor}", True, theta, {"rope_type": "linear", "factor": factor}),
        Condition("raised", tuned + "θ raised", True, raised),
        Condition("yarn", tuned + f"yarn s = {REACH * factor}", True, theta, {"rope_type": "yarn", **stretched}),
        Condition(
            "ntk_by_parts",
            tuned + f"NTK by parts s = {REACH * factor}",
            True,
            theta,
            {"rope_type": "ntk_by_parts", **stretched},
        ),
    )
