"""What a scheme loses, measured: within bounds on the embedded checkpoint; and the command that writes and measures."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures_text import training_texts
from llama import parallel
from llama.checkpoint import open_checkpoint
from llama.cli import dispatch
from llama.evals.cli import read_sources
from llama.evals.sources import File, choose_files
from llama.generation import EMBEDDED, Llama
from llama.quantize import cli, report
from llama.quantize.layers import quantize_
from llama.quantize.report import Loss, Texts, losses, possible, quantized, read_texts, sizes
from llama.quantize.saved import Saved
from llama.quantize.schemes import scheme_of

BOUNDS = {"int8": 0.002, "int8-dynamic": 0.01, "int4:32": 0.03, "int4-dynamic:32": 0.03}
"""How much more perplexity than bfloat16's each may have."""


@pytest.fixture(autouse=True)
def group() -> None:
    parallel.start()


@pytest.mark.slow
def test_perplexity_of_the_embedded_checkpoint_is_kept() -> None:
    """On some held-out files; the README has all, on two checkpoints. Broken codes, a wrong scale or a wrong group
    would multiply the perplexity."""
    llama = Llama.build(max_seq_len=256, max_batch_size=4, dtype=torch.bfloat16)
    texts = read_texts(llama, choose_files(read_sources(None), 12), most=300)
    found = losses(llama, open_checkpoint(EMBEDDED), [scheme_of(word) for word in BOUNDS], texts)
    base, *others = found
    assert (base.scheme, base.change.value, base.logit_error, base.bits) == ("bfloat16", 0, 0, 16)
    assert [loss.scheme for loss in others] == list(BOUNDS)
    for loss in others:
        assert abs(loss.change.value) < BOUNDS[loss.scheme]
        assert loss.change.low <= loss.change.value <= loss.change.high
        assert loss.perplexity == pytest.approx(base.perplexity * (1 + loss.change.value))
        assert 0 < loss.logit_error < (5 if "int4" in loss.scheme else 2)
    assert base.size > others[0].size > others[2].size
    assert others[2].logit_error > others[0].logit_error


def texts_of(llama: Llama) -> Texts:
    return read_texts(llama, [File(str(i), text) for i, text in enumerate(training_texts())], 48, 60)


def test_figures_are_what_they_say(tiny_checkpoint: Path) -> None:
    """Against the scores of both models, written down plainly."""
    llama = Llama.build(tiny_checkpoint, max_seq_len=64, dtype=torch.bfloat16)
    other = Llama.build(tiny_checkpoint, max_seq_len=64, dtype=torch.bfloat16)
    quantize_(other.model, "int4")
    texts = dataclasses.replace(texts_of(llama), sequences=[ids[:40] for ids in texts_of(llama).sequences], compared=2)
    base, loss = losses(llama, open_checkpoint(tiny_checkpoint), [scheme_of("int4")], texts)

    def nats(model: Llama) -> float:
        total = 0.0
        for ids in texts.sequences:
            scores = model.model(torch.tensor([[1, *ids]]))[0, :-1].double().log_softmax(-1)
            total -= float(scores[torch.arange(len(ids)), ids].sum())
        return total / sum(map(len, texts.sequences))

    with torch.inference_mode():
        for found, model in ((base, llama), (loss, other)):
            assert math.log(found.perplexity) == pytest.approx(nats(model), rel=3e-3)  # other batches, other rounding
        assert loss.change.value == pytest.approx(loss.perplexity / base.perplexity - 1)
        windows = [torch.tensor([[1, *ids]]) for ids in texts.sequences[:2]]
        error = max(float((llama.model(w) - other.model(w)).abs().max()) for w in windows)
        assert loss.logit_error == pytest.approx(error, rel=0.1)  # products of other rows of windows, other rounding
    plain = sum(p.nbytes for p in llama.model.parameters())
    linear = 2 * sum(p.numel() for name, p in llama.model.named_parameters() if p.dim() == 2 and "emb" not in name)
    assert sizes(llama.model) == (plain, 16)
    output = llama.model.output.weight
    kept = (linear // 2 - output.numel()) * 5 // 8 + output.numel() + 2 * len(output)
    assert sizes(other.model) == (plain - linear + kept, pytest.approx(16 * kept / linear))
    assert loss.size == sizes(quantized(llama, open_checkpoint(tiny_checkpoint), scheme_of("int4")).model)[0]


def test_what_is_possible(tiny_checkpoint: Path) -> None:
    model = Llama.build(tiny_checkpoint).model
    assert [word for word in ("int8", "int4:32", "int4:64", "nf4") if possible(scheme_of(word), model)] == [
        "int8",
        "int4:32",
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_writes(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.command((str(tiny_checkpoint), str(tmp_path / "it")), scheme="int4", group=32)
    assert f"{tmp_path / 'it'}: written as int4:32" in capsys.readouterr().out
    assert str(Saved(tmp_path / "it").scheme) == "int4:32"


def test_command_measures(tiny_checkpoint: Path, tmp_path: Path, told: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    for i, text in enumerate(training_texts()[:2]):
        (tmp_path / f"{i}.py").write_text(text, encoding="utf-8")
    words = f"--report {tiny_checkpoint} --schemes int8,int4 --out {tmp_path / 'out'} --sources {tmp_path} --tokens 80"
    dispatch(cli.command, [*words.split(), "--max_seq_len", "48"], "quantize")
    [(table, found)] = told
    assert [row["scheme"] for row in found["rows"]] == ["bfloat16", "int8", "int4:32"]
    assert f"{found['rows'][2]['perplexity']:.4f}" in table[-1]
    assert found["rows"][0]["tokens"] == 160
    with open(tmp_path / "out" / "quantize.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["change"]) for row in rows] == [row["change"] for row in found["rows"]]
    assert (tmp_path / "out" / "quantize.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "quantize.json").read_text())["dtype"] == "bfloat16"


def test_flag_without_a_checkpoint_measures_the_embedded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def build(**options: object) -> None:
        asked.append(options["ckpt_dir"])
        raise KeyError

    monkeypatch.setattr(cli, "build", build)
    monkeypatch.setattr(cli, "read_sources", lambda sources: [])
    for words in (["--report"], ["--report", "a", "b"], ["a", "b", "--report"]):
        with pytest.raises(KeyError):
            dispatch(cli.command, words, "quantize")
    assert asked == [str(EMBEDDED), "a", "a"]


def test_what_the_command_is_given_wrong(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="1 paths; give SRC and DST"):
        cli.command((str(tiny_checkpoint),))
    with pytest.raises(ValueError, match="--max_seq_len goes with --report"):
        cli.command(("a", "b"), max_seq_len=5)
    with pytest.raises(ValueError, match="there is no scheme 'int7'"):
        cli.command(("a", "b"), scheme="int7")
    with pytest.raises(ValueError, match="--dtype with --report"):
        cli.command(report=True, dtype="float32")


def test_picture_has_every_scheme() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    loss = {"checkpoint": "a", "bits": 5.0, "change": 0.01, "low": 0.005, "high": 0.02}
    report.draw(figure, [{**loss, "scheme": "int4"}, {**loss, "scheme": "int8", "bits": 8.1}])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["int4", "int8"]
    assert Loss.__dataclass_fields__.keys() >= {"scheme", "bits", "change"}
