"""Rows of tokens on disk: written once, a part at a time, and read through a memory map.

Beside NAME.bin, 16-bit integers and nothing else, stands NAME.json: the shape, a checksum, how many bytes of text
the tokens stand for, and what they were made from: corpus, tokenizer, length, mixture, seed. That is compared before
a token is read, for ids of another tokenizer look like any ids, and a model would learn them without a complaint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llama.system import replacing
from llama.train.sequences import Rows

Facts = dict[str, Any]
"""What rows were made from, as JSON has it."""


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def write_tokens(path: Path, facts: Facts, parts: Iterable[tuple[Rows, int]]) -> None:
    """Writes `path`.bin and, when that is whole, `path`.json. `parts` are rows with the bytes of text they hold."""
    rows = length = text_bytes = 0
    path.with_suffix(".json").unlink(missing_ok=True)
    try:
        with replacing(path.with_suffix(".bin")) as temporary:
            with open(temporary, "wb") as file:
                for part, size in parts:
                    file.write(part.astype("<i2").tobytes())
                    rows, length, text_bytes = rows + len(part), part.shape[1], text_bytes + size
            if not rows:
                raise ValueError(f"{path}: there is not a single row to write; the corpus is too small for {facts}")
            header = {
                "made_from": facts,
                "shape": [rows, length],
                "text_bytes": text_bytes,
                "sha256": digest(temporary),
            }
    except OSError as error:
        raise ValueError(f"{path}.bin can't be written ({error}); make room, or choose another folder") from error
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(header, indent=1), encoding="utf-8")


def has_tokens(path: Path) -> bool:
    return path.with_suffix(".json").is_file()


def read_tokens(path: Path, facts: Facts) -> tuple[Rows, int]:
    """The rows, and the bytes of text they hold. Raises ValueError where they are broken, or of other `facts`."""
    remedy = f"remove {path}.json, and the next start writes it anew"
    try:
        header = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        made_from, shape, text_bytes = header["made_from"], tuple(header["shape"]), int(header["text_bytes"])
        intact = header["sha256"] == digest(path.with_suffix(".bin"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}.json and .bin can't be read ({error}): {remedy}") from error
    if not intact:
        raise ValueError(
            f"{path}.bin is not what was written ({path.with_suffix('.bin').stat().st_size:,} bytes): {remedy}"
        )
    differing = [key for key in {**facts, **made_from} if facts.get(key) != made_from.get(key)]
    if differing:
        said = "; ".join(f"{key} {made_from.get(key)!r}, and now it is {facts.get(key)!r}" for key in differing)
        raise ValueError(f"{path}.bin was made from {said}: {remedy}, or use another folder")
    rows: Rows = np.memmap(path.with_suffix(".bin"), dtype="<i2", mode="r", shape=shape)
    return rows, text_bytes
