"""The recipe, at a size of seconds: it leaves a checkpoint in the published format, and a card with its figures."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

from llama.config import ModelArgs
from llama.generation import Llama
from llama.tokenizer import Tokenizer
from llama.train import recipe
from llama.train.atomic import replacing
from llama.train.cli import train
from llama.train.corpus import Source
from llama.train.sequences import read_rows

SMALL = ModelArgs(
    dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=700, multiple_of=32, rope_theta=10000.0, max_seq_len=64
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files for a corpus, one of them held out, and a model of one layer."""
    names = ("bisect.py", "textwrap.py", "fractions.py")
    texts = {name: (Path(os.__file__).parent / name).read_text(encoding="utf-8") for name in names}
    monkeypatch.setattr(recipe, "read_corpus", lambda: [Source(name, text) for name, text in texts.items()])
    monkeypatch.setattr(recipe, "TINY", SMALL)
    monkeypatch.setattr(recipe, "CONTEXT", 64)
    monkeypatch.setattr(recipe, "PASSES", 1)


@pytest.fixture
def made(tmp_path: Path, small: None) -> Path:
    assert recipe.make_checkpoint(tmp_path / "out", tmp_path / "work", steps=3)
    return tmp_path / "out"


def test_files_are_the_published_ones(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        "params.json", "consolidated.00.pth", "tokenizer.model", "MODEL_CARD.md",
    }  # fmt: skip
    params = json.loads((made / "params.json").read_text())
    assert params == {
        "dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 700, "multiple_of": 32,
        "norm_eps": 1e-5, "rope_theta": 10000.0,
    }  # fmt: skip
    assert Tokenizer(made / "tokenizer.model").n_words == 700


def test_weights_are_plain_bfloat16_by_metas_names(made: Path) -> None:
    weights = torch.load(made / "consolidated.00.pth", weights_only=True)
    block = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm"]
    block += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    names = {"tok_embeddings.weight", "norm.weight", "output.weight", *(f"layers.0.{name}.weight" for name in block)}
    assert set(weights) == names
    for weight in weights.values():
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes  # no view into something larger was written


def test_library_writes_with_it(made: Path) -> None:
    llama = Llama.build(made, max_seq_len=64, max_batch_size=1, device="cpu")
    (answer,) = llama.text_infilling(["def f("], ["):\n"], temperature=0, max_gen_len=8)
    assert answer["full_text"].startswith("def f(")


def test_card_has_the_runs_figures(made: Path) -> None:
    card = (made / "MODEL_CARD.md").read_text(encoding="utf-8")
    with open(made.parent / "work" / "log.csv") as file:
        header, *_, last = (line.strip().split(",") for line in file)
    logged = dict(zip(header, last, strict=True))
    assert f"{int(logged['tokens']):,} tokens" in card
    measured = re.search(r"\*\*([\d.]+)\*\* nats a token,\s\*\*([\d.]+)\*\* bits", card)
    assert measured is not None
    assert float(measured[1]) == pytest.approx(float(logged["held_out_loss"]), rel=1e-2)  # rounded weights, other sums
    assert float(measured[2]) == pytest.approx(float(logged["bits_per_byte"]), rel=1e-2)
    assert f"{(Path(os.__file__).parent / 'fractions.py').stat().st_size:,} bytes, chosen by a hash" in card
    assert "--steps 3" in card
    assert "{" not in card


def test_held_out_text_is_in_no_row(made: Path) -> None:
    tokenizer = Tokenizer(made / "tokenizer.model")
    rows = read_rows(made.parent / "work" / "rows.npy")
    text = "".join(tokenizer.decode(row) for row in rows.tolist())
    assert "class TextWrapper" in text
    assert "class Fraction" not in text


def test_minutes_become_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "seconds_a_step", lambda work: 15.0)
    for _ in range(2):
        assert recipe.make_checkpoint(tmp_path / "out", tmp_path / "work", minutes=0.5)
        monkeypatch.setattr(recipe, "seconds_a_step", lambda work: pytest.fail("measured again"))
    assert json.loads((tmp_path / "work" / "plan.json").read_text())["steps"] == 2


def test_a_steps_time_is_measured(made: Path) -> None:
    assert 0 < recipe.seconds_a_step(made.parent / "work", timed=1) < 60


def test_command_says_where_the_checkpoint_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(f"{tmp_path}/out", steps=1)
    assert f"The checkpoint is in {tmp_path}/out; {tmp_path}/out.training can be removed." in capsys.readouterr().out


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with replacing(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [found.name for found in path.parent.iterdir()] == ["file"]
