"""What the three scripts print with the embedded checkpoint, greedily, in float32 on a CPU.

`make golden` (python tests/examples/golden.py) writes it anew: after a new checkpoint, or new prompts. Read the
difference before it is committed: nothing else may change these texts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from unittest import mock

import torch

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NAMES = ("completion", "infilling", "instructions")


def printed(name: str) -> str:
    """The standard output of example_NAME.py."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"example_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = io.StringIO()
    cpu = mock.patch("llama.system.default_device", return_value=torch.device("cpu"))
    with cpu, contextlib.redirect_stdout(out):
        script.main(temperature=0.0)
    return out.getvalue()


def golden(name: str) -> Path:
    return FOLDER / f"{name}.txt"


if __name__ == "__main__":
    for name in NAMES:
        golden(name).write_text(printed(name), encoding="utf-8")
        print(golden(name).read_text(encoding="utf-8"))
