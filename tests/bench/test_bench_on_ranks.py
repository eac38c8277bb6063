"""Two ranks measure one model together: both compute, the first one prints."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from llama import parallel
from llama.bench import shapes
from llama.bench.cli import command
from parallel.ranks import on_ranks

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 5000, "hidden_dim": 96}


def _measured(init_method: str, folder: str, options: dict[str, Any]) -> tuple[str, str]:
    """What a rank prints, or the ValueError that it raises."""
    parallel.start(init_method=init_method, device="cpu")
    shapes.SHAPES["tiny"] = SHAPE
    quick: dict[str, Any] = {
        "rounds": 1,
        "tokens": 2,
        "prompt": 5,
        "batches": (2,),
        "lengths": (9,),
        "size": 1e-4,
        "json": True,
    }
    quick["variants"] = ("plain",)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            command(**{"preset": "tiny", "layers": 1, "device": "cpu", "out": folder, **quick, **options})
    except ValueError as error:
        return out.getvalue(), str(error)
    return out.getvalue(), ""


def test_all_ranks_measure_and_the_first_prints(tmp_path: Path) -> None:
    """A rank that did other rounds than the rest would wait for ever."""
    (first, _), (second, _) = on_ranks(_measured, 2, str(tmp_path / "out"), {}, limit=300)
    found = json.loads(first)
    assert second == ""
    assert found["ranks"] == 2
    assert {f["measure"] for f in found["figures"]} >= {"decode", "decode, loop", "prefill", "first token"}
    assert not any(f["measure"].startswith("memory") for f in found["figures"])
    assert (tmp_path / "out" / "bench.csv").is_file()


@pytest.mark.parametrize("options", [{"against": ("transformers",)}, {"measures": ("load",)}])
def test_what_needs_one_process_says_so_on_every_rank(tmp_path: Path, options: dict[str, Any]) -> None:
    for _, error in on_ranks(_measured, 2, str(tmp_path / "out"), options, limit=300):
        assert "leave torchrun out" in error
