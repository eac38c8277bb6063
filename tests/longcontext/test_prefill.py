"""The benchmark of long prompts, at toy lengths: what it counts is all there is, and it says what can't be counted."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures_text import greedy, training_texts
from llama import parallel
from llama.config import ModelArgs
from llama.evals.sources import File
from llama.generation import Llama
from llama.interop.memory import Settings, plan
from llama.longcontext.prefill import (
    Chunk,
    Reading,
    by_position,
    command,
    joined,
    planned_bytes,
    read,
    reading_of,
    straight_line,
)
from llama.tokenizer import Tokenizer

CHUNKS = tuple(Chunk(10 * i, 10, seconds=i + 1) for i in range(6))


def test_every_token_is_read_once_and_the_answer_is_the_models_own(tiny_checkpoint: Path) -> None:
    """Against float64: a prompt read in chunks, of which nothing is read again, and its likeliest continuation."""
    llama = Llama.build(tiny_checkpoint, max_seq_len=64, max_batch_size=1, prefill_chunk=16)
    tokens = [1, *range(300, 337)]
    chunks, written, seconds = read(llama, tokens, 5)
    assert [(chunk.first, chunk.tokens) for chunk in chunks] == [(0, 16), (16, 16), (32, 6)]
    assert min(*(chunk.seconds for chunk in chunks), seconds) > 0
    assert written == greedy(tokens, 5)


def test_a_line_is_the_one_through_the_points() -> None:
    exact = straight_line([1, 2, 5], [5.0, 8.0, 17.0])
    assert (exact.slope, exact.start, exact.residual) == pytest.approx((3, 2, 0))
    bent = straight_line([0, 1, 2], [10.0, 13.0, 10.0])  # the line is 11 everywhere
    assert (bent.slope, bent.start, bent.residual) == pytest.approx((0, 11, 2 / 13))
    with pytest.raises(ValueError, match="at least two --lengths"):
        straight_line([7], [1.0])


def test_speed_by_position_is_tokens_over_seconds_of_whole_chunks() -> None:
    """Not the mean of the chunks' speeds, which would hide the slow ones."""
    reading = Reading("codellama", CHUNKS, (1,), 1.0, 1)
    assert (reading.length, reading.seconds) == (60, 21)
    assert by_position(reading, 2) == [(0, 30 / 6), (30, 30 / 15)]
    assert [first for first, _ in by_position(reading, 8)] == [0, 10, 20, 30, 40, 50]


def test_the_prompt_is_the_files_in_order_and_over_again(tokenizer: Tokenizer) -> None:
    sources = [File("a", "import os\n"), File("b", "x = 1\n")]
    once = [t for source in sources for t in tokenizer.encode(source.text, bos=False, eos=False)]
    assert joined(tokenizer, sources, 2 * len(once) + 2) == [tokenizer.bos_id, *once, *once, once[0]]
    for nothing in ([], [File("a", " \n")]):
        with pytest.raises(ValueError, match="have no text"):
            joined(tokenizer, nothing, 10)


@pytest.mark.parametrize(("kv_dtype", "stored"), [(None, None), ("int8", torch.int8)])
def test_the_plan_is_that_of_codellama_plan(kv_dtype: str | None, stored: torch.dtype | None, tiny: ModelArgs) -> None:
    expected = plan(tiny, Settings(1, torch.float32, stored, prefill_chunk=64, device="cpu")).total
    assert planned_bytes(tiny, torch.float32, 64, kv_dtype) == expected


@pytest.fixture
def asked(tmp_path: Path, tiny_checkpoint: Path) -> dict[str, Any]:
    (tmp_path / "text.py").write_text(training_texts()[2], encoding="utf-8")
    options = {"sources": str(tmp_path / "text.py"), "out": str(tmp_path / "out"), "ckpt_dir": str(tiny_checkpoint)}
    return {**options, "generate": 4, "prefill_chunk": 128}


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_command_writes_every_chunk_and_a_row_for_each_length(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(lengths=(512, 256), kv_dtype="int8", json=True, **asked)
    found = json.loads(capsys.readouterr().out)
    rows, chunks = (table(tmp_path / "out", name) for name in ("prefill_int8", "prefill_int8_chunks"))
    assert [(row["length"], row["kv_dtype"], row["written"]) for row in rows] == [
        ("256", "int8", "4"),
        ("512", "int8", "4"),
    ]
    assert [(c["length"], c["first"]) for c in chunks] == [("256", str(n)) for n in (0, 128)] + [
        ("512", str(n)) for n in (0, 128, 256, 384)
    ]
    for row in rows:
        total = sum(float(c["seconds"]) for c in chunks if c["length"] == row["length"])
        assert float(row["seconds"]) == pytest.approx(total, abs=1e-3)
        assert 0 < int(row["peak"]) < 10**9
    assert found["line"]["residual"] == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "out" / "prefill_int8.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_transformers_reads_the_same_prompt_to_the_same_end(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    command(lengths=(256,), against="transformers", **asked)
    ours, theirs = table(tmp_path / "out", "prefill")
    assert (ours["reader"], theirs["reader"]) == ("codellama", "transformers")
    assert (ours["length"], ours["written"]) == (theirs["length"], theirs["written"]) == ("256", "4")
    assert "times our time" in capsys.readouterr().out


def test_what_fails_in_the_other_process_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    job = {"reader": "codellama", "tokens": [1] * 80, "generate": 1, "kv_dtype": None}
    with pytest.raises(ValueError, match=r"did not read 80 tokens: there is no folder .*elsewhere"):
        reading_of({**job, "options": {"ckpt_dir": str(tmp_path / "elsewhere")}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "give one or several"),
        ({"lengths": (256, 256)}, "each another"),
        ({"dtype": "float16"}, "--dtype float16 is not for a CPU"),
        ({"max_seq_len": 512}, "--max_seq_len is not free here"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(**options)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        command()
    assert parallel.shards() == 1
