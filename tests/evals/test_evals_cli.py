"""The commands: a table, or JSON in its place; and what a user got wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fixtures_text import training_texts
from llama import parallel
from llama.evals.cli import COMMANDS, read_sources
from llama.evals.intervals import share
from llama.evals.table import percent, render

SMALL: dict[str, dict[str, Any]] = {
    "compression": {"max_seq_len": 64, "files": 1},
    "positions": {"max_seq_len": 64, "bins": 2, "documents": 2},
    "functions": {"max_seq_len": 128, "max_gen_len": 4, "samples": 3, "show": 1},
    "lines": {"max_seq_len": 96, "samples": 2, "order": "spm"},
    "retrieval": {"lengths": (512,), "depths": (0, 0.5), "samples": 2},
}
OWN = {"exercises", "run", "score", "table"}
"""What asks its own questions, and not about files: tests/train/test_exercises.py, test_benchmarks.py."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sources")
    for i, text in enumerate(training_texts()):
        (folder / f"{i}.py").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", SMALL)
def test_command_prints_a_table_or_json(
    name: str, folder: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parallel.start()
    COMMANDS[name](sources=folder, ckpt_dir=str(tiny_checkpoint), **SMALL[name])
    table = capsys.readouterr().out
    COMMANDS[name](sources=folder, ckpt_dir=str(tiny_checkpoint), json=True, **SMALL[name])
    found = json.loads(capsys.readouterr().out)
    assert (found["measure"], found["sources"], found["dtype"]) == (name, folder, "torch.float32")
    assert found["max_seq_len"] == SMALL[name].get("max_seq_len", 512)
    expected = {
        "compression": lambda: f"{found['bits_per_byte']['value']:.3f}",
        "positions": lambda: f"{found['bins'][1]['nats_per_token']['value']:.3f}",
        "functions": lambda: f"{found['parsed']['rate']:.1%}",
        "lines": lambda: "spm",
        "retrieval": lambda: f"{found['cells'][0]['found']['high']:.1%}",
    }
    assert expected[name]() in table
    assert '"measure"' not in table


def test_every_command_is_tried() -> None:
    assert COMMANDS.keys() == SMALL.keys() | OWN


def test_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_sources(str(tmp_path))


def test_table_stands_in_columns() -> None:
    assert render(("", "n"), [("parses", 7), ("a", 1000)]) == "           n\nparses     7\na       1000"


def test_share_is_shown_with_its_interval() -> None:
    assert percent(share(5, 10)) == "50.0% (23.7%–76.3%)"
