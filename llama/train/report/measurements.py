"""Measurements that are made once: each is a file of JSON, with what it was made of.

A report takes long, and may be stopped. What is measured stays, as long as the checkpoint, the corpus and the
settings are the same; anything else is measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.system import replacing

Figures = dict[str, Any]
"""What JSON can hold."""


@dataclass(frozen=True)
class Measurement:
    """`make` returns figures of a stage's checkpoint; `facts` say of what, so that another is not taken for it."""

    stage: str
    name: str
    facts: Figures
    make: Callable[[], Figures]


def measure(measurement: Measurement, folder: Path) -> Figures:
    """The figures, from `folder` where they were made of the same, else made and left there.

    `seconds` among them says how long it took.
    """
    path = folder / f"{measurement.stage}-{measurement.name}.json"
    facts = json.loads(json.dumps(measurement.facts))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["facts"] == facts:
            figures: Figures = found["figures"]
            return figures
    started = time.monotonic()
    figures = json.loads(json.dumps(measurement.make()))
    figures["seconds"] = round(time.monotonic() - started, 1)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"facts": facts, "figures": figures}, indent=1), encoding="utf-8")
    return figures
