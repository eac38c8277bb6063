"""The stages, at a size of seconds: each goes on from the one before, and leaves a checkpoint as published."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama.cli import run as run_command
from llama.generation import Llama
from llama.model import Transformer
from llama.system import replacing
from llama.tokenizer import Tokenizer
from llama.train import stages
from llama.train.cli import ALL, COMMANDS
from llama.train.corpus import Source
from llama.train.sequences import Mixture
from llama.train.stages import SHAPES, STAGES, Run, read_run, results, start_run, train_stage
from llama.train.tokenfile import read_tokens

SMALL: dict[str, Any] = {
    "dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 700, "multiple_of": 32,
}  # fmt: skip
NAMES = ("textwrap.py", "fractions.py", "argparse.py", "bisect.py", "inspect.py", "shutil.py", "tarfile.py")
LENGTH = 96


def make_small(patch: pytest.MonkeyPatch) -> None:
    """A few files for a corpus, of which fractions.py is held out; a model of one layer, and short rows.

    Where the stages differ, they still do."""
    texts = {name: (Path(os.__file__).parent / name).read_text(encoding="utf-8") for name in NAMES}
    patch.setattr(stages, "read_corpus", lambda: [Source(name, text) for name, text in texts.items()])
    patch.setattr(stages, "PASSES", 1)
    patch.setattr(stages, "SHAPE", "small")
    patch.setitem(SHAPES, "small", SMALL)
    for name, stage in list(STAGES.items()):
        training = replace(stage.training, rows_per_step=2, rows_at_once=1, warmup_steps=1)
        patch.setitem(STAGES, name, replace(stage, length=stage.length * LENGTH // 256, training=training))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `codellama train all` left `out` and `out.training`; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        COMMANDS["all"](f"{folder}/out", steps=3, device="cpu")
    return folder


def row_facts(run: Run, name: str, file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder / name / f"{file}.json").read_text())["made_from"]
    return found


# --- what is left ----------------------------------------------------------------------------------------------------


def test_files_are_the_published_ones(made: Path) -> None:
    assert {path.name for path in (made / "out").iterdir()} == {
        "params.json", "consolidated.00.pth", "tokenizer.model", "MODEL_CARD.md",
    }  # fmt: skip
    params = json.loads((made / "out" / "params.json").read_text())
    assert params == {**SMALL, "norm_eps": 1e-5, "rope_theta": 1e6}  # theta is the last stage's
    assert Tokenizer(made / "out" / "tokenizer.model").n_words == 700


def test_weights_are_plain_bfloat16_by_metas_names(made: Path) -> None:
    weights = torch.load(made / "out" / "consolidated.00.pth", weights_only=True)
    block = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm"]
    block += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    names = {"tok_embeddings.weight", "norm.weight", "output.weight", *(f"layers.0.{name}.weight" for name in block)}
    assert set(weights) == names
    for weight in weights.values():
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes  # no view into something larger was written


def test_library_writes_with_it(made: Path) -> None:
    llama = Llama.build(made / "out", max_seq_len=64, max_batch_size=1, device="cpu")
    (answer,) = llama.text_infilling(["def f("], ["):\n"], temperature=0, max_gen_len=8)
    assert answer["full_text"].startswith("def f(")


def test_each_stage_has_its_theta_its_length_and_its_checkpoint(made: Path) -> None:
    found = {result.stage: result for result in results(read_run(made / "out.training"))}
    assert list(found) == ["base", "long", "instruct"]
    assert found["long"].length == 8 * found["base"].length == 8 * LENGTH
    for name, theta in (("base", 1e4), ("long", 1e6), ("instruct", 1e6)):
        folder = made / "out.training" / name
        assert found[name].rope_theta == theta
        assert json.loads((folder / "checkpoint" / "params.json").read_text())["rope_theta"] == theta
        shape = json.loads((folder / "train.json").read_text())["shape"]
        assert shape == [6, found[name].length + 1]


def test_long_trains_with_its_theta_and_at_its_length(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation that is used, not the one that is written down."""
    used = []
    rotation = Transformer.rotation

    def note(model: Transformer, length: int) -> Any:
        cos, sin = rotation(model, length)
        used.append((length, torch.atan2(sin[1], cos[1]).tolist()))
        return cos, sin

    monkeypatch.setattr(Transformer, "rotation", note)
    work = copy_of(made, "base")
    assert train_stage(STAGES["long"], read_run(work), steps=1)
    length, angles = used[0]
    assert length == 8 * LENGTH
    assert angles == pytest.approx([1e6 ** (-2 * i / 8) for i in range(4)], rel=1e-5)


def copy_of(made: Path, *names: str) -> Path:
    """A run like the one made, with only these stages done."""
    work = made / f"copy{len(list(made.iterdir()))}"
    work.mkdir()
    for name in ("run.json", "tokenizer.model", *names):
        (work / name).symlink_to(made / "out.training" / name)
    return work


@pytest.mark.parametrize(("name", "before"), [("long", "base"), ("instruct", "long")])
def test_a_stage_begins_with_the_weights_of_the_one_before(made: Path, name: str, before: str) -> None:
    """At a rate of 0, what comes out is what went in."""
    work = copy_of(made, "base", *(["long"] if name == "instruct" else []))
    still = replace(STAGES[name], training=replace(STAGES[name].training, peak_lr=0.0))
    assert train_stage(still, read_run(work), steps=1)
    was, now = (torch.load(work / stage / "state.pt")["model"] for stage in (before, name))
    assert all(torch.equal(was[key], now[key]) for key in was)


def test_long_keeps_a_constant_low_rate() -> None:
    config = STAGES["long"].training
    assert (
        config.lr(config.steps - 1) == config.lr(config.steps // 2) == config.peak_lr < STAGES["base"].training.peak_lr
    )


@pytest.mark.slow
def test_held_out_text_is_in_no_row(made: Path) -> None:
    run = read_run(made / "out.training")
    tokenizer = Tokenizer(run.tokenizer_path)
    # Whole files, so that what is looked for in them is not left out as being no function.
    assert train_stage(replace(STAGES["base"], name="many", mixture=Mixture(functions=0, keys=0.2)), run, steps=150)
    texts = {}
    for file in ("train", "held_out"):
        rows, _ = read_tokens(run.folder / "many" / file, row_facts(run, "many", file))
        texts[file] = "".join(tokenizer.decode(row) for row in np.where(rows < 0, ~rows, rows).tolist())
    assert "TextWrapper" in texts["train"]
    assert "Fraction" not in texts["train"]
    assert "Fraction" in texts["held_out"]


def test_dialogs_are_in_the_last_stage_alone_and_only_answers_count(made: Path) -> None:
    run = read_run(made / "out.training")
    for name in ALL:
        rows, _ = read_tokens(run.folder / name / "train", row_facts(run, name, "train"))
        assert (rows < 0).any() == (name == "instruct")


def test_card_has_the_runs_figures(made: Path) -> None:
    card = (made / "out" / "MODEL_CARD.md").read_text(encoding="utf-8")
    for name in ALL:
        with open(made / "out.training" / name / "log.csv") as file:
            *_, logged = csv.DictReader(file)
        line = re.search(rf"^\| {name} \| (.*) \|$", card, re.MULTILINE)
        assert line is not None
        cells = line[1].split(" | ")
        assert cells[0] == f"{int(logged['tokens']):,}"
        assert cells[1] == "3"
        assert float(cells[-2].strip("*")) == pytest.approx(float(logged["held_out_loss"]), rel=1e-2)  # rounded weights
        assert float(cells[-1].strip("*")) == pytest.approx(float(logged["bits_per_byte"]), rel=1e-2)
        assert f"codellama train {name} OUT --seed 0 --steps 3" in card
    assert "the standard library of CPython 3" in card
    assert "{" not in card


def test_curves_are_a_picture(made: Path) -> None:
    for name in ALL:
        content = (made / "out.training" / name / "curves.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert content[-8:-4] == b"IEND"
        width, height = struct.unpack(">II", content[16:24])
        assert min(width, height) > 300


def test_without_matplotlib_there_is_a_sentence_and_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="matplotlib is missing: pip install matplotlib"):
        COMMANDS["base"](f"{tmp_path}/out", steps=1, device="cpu")
    assert (tmp_path / "out" / "params.json").exists()
    assert not list(tmp_path.rglob("*.png"))


# --- starting, stopping, and what a user may get wrong ---------------------------------------------------------------


def test_a_stage_needs_the_one_before(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    with pytest.raises(ValueError, match=r"long goes on from base, which is not finished in .*codellama train base"):
        train_stage(STAGES["long"], run, steps=1)
    assert not (tmp_path / "long").exists()


@pytest.mark.slow
def test_base_goes_on_from_plain_where_there_is_one(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    assert train_stage(STAGES["plain"], run, steps=2)
    assert train_stage(STAGES["base"], run, steps=4)
    assert json.loads((tmp_path / "base" / "plan.json").read_text())["starts_from"] == "plain"
    tokenizer = Tokenizer(run.tokenizer_path)
    has_gaps = [
        bool((read_tokens(tmp_path / name / "train", row_facts(run, name, "train"))[0] == tokenizer.eot_id).any())
        for name in ("plain", "base")
    ]
    assert has_gaps == [False, True]


def test_a_stopped_stage_says_so_and_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in its second step, the command ends without the next stage; then it makes what it would have made."""
    real = stages.train

    def stopping(model: Any, *args: Any) -> Any:
        calls: list[int] = []

        def interrupt(*_: object) -> None:
            calls.append(1)
            if len(calls) == 4:  # two passes a step
                signal.raise_signal(signal.SIGINT)

        model.register_forward_hook(interrupt)
        return real(model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", stopping)
        COMMANDS["all"](f"{tmp_path}/parts", steps=3, device="cpu")
    work = tmp_path / "parts.training"
    assert f"Stopped; the same command continues the run in {work}." in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()
    assert not (work / "long").exists()
    assert len((work / "base" / "log.csv").read_text().splitlines()) == 3
    COMMANDS["base"](f"{tmp_path}/parts", device="cpu")  # the number of steps is settled
    assert f"The checkpoint is in {tmp_path}/parts;" in capsys.readouterr().out
    first, second = (torch.load(run / "base" / "state.pt")["model"] for run in (made / "out.training", work))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_steps_that_are_settled_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "train", lambda *_: [])
    run = start_run(tmp_path)
    assert not train_stage(STAGES["base"], run, steps=5)
    assert not train_stage(STAGES["base"], run, steps=5, minutes=1)
    with pytest.raises(ValueError, match="has steps 5, not 6"):
        train_stage(STAGES["base"], run, steps=6)
    with pytest.raises(ValueError, match="has rows_per_step 2, not 4"):
        train_stage(STAGES["base"], run, rows_per_step=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PyTorch finds no GPU here"):
        COMMANDS["base"](f"{tmp_path}/out", device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stages_train_on_a_gpu(tmp_path: Path) -> None:
    COMMANDS["all"](f"{tmp_path}/out", steps=2, device="cuda")
    assert (tmp_path / "out" / "params.json").exists()


def test_a_finished_stage_is_not_trained_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "train", lambda *_: pytest.fail("it trained"))
    COMMANDS["all"](f"{made}/out", device="cpu")


def test_minutes_become_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten minutes, base has six: 24 steps of 15 seconds."""
    monkeypatch.setattr(stages, "seconds_a_step", lambda *_: 15.0)
    monkeypatch.setattr(stages, "train", lambda *_: [])  # stopped before the first step
    for minutes in (10, 20):
        COMMANDS["all"](f"{tmp_path}/out", minutes=minutes, device="cpu")
    assert json.loads((tmp_path / "out.training" / "base" / "plan.json").read_text())["steps"] == 24
    COMMANDS["base"](f"{tmp_path}/other", minutes=10, device="cpu")
    assert json.loads((tmp_path / "other.training" / "base" / "plan.json").read_text())["steps"] == 40


def test_a_steps_time_is_measured(made: Path) -> None:
    model = stages.new_model(STAGES["base"], read_run(made / "out.training"), torch.device("cpu"))
    assert 0 < stages.seconds_a_step(model, STAGES["base"].training, 16, timed=1) < 60


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seed": 1}, "has seed 0, not 1: use another folder"),
        ({"shape": "4x256"}, "has params .* not .*use another folder"),
        ({"shape": "huge"}, "no shape 'huge'; there are 4x256, "),
        ({"corpus": "nowhere"}, "nowhere holds no whole corpus"),
    ],
)
def test_a_run_keeps_what_was_settled(made: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COMMANDS["base"](f"{made}/out", device="cpu", **asked)


def test_a_tokenizer_that_was_exchanged_is_noticed(made: Path, tokenizer_path: Path) -> None:
    work = made / "exchanged"
    work.mkdir()
    (work / "run.json").write_bytes((made / "out.training" / "run.json").read_bytes())
    run = start_run(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", lambda *_: [])
        train_stage(STAGES["base"], run, steps=1)
    (work / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    with pytest.raises(ValueError, match=r"base/train\.bin was made from tokenizer '\w+', and now it is"):
        train_stage(STAGES["base"], run)


def test_a_corpus_of_packages_is_read_by_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training reads `train`, the loss during training `validation`, and nobody `heldout`."""
    texts = {name: (Path(os.__file__).parent / name).read_text(encoding="utf-8") for name in NAMES}
    splits = {"train": texts["textwrap.py"], "validation": texts["fractions.py"]}
    read: list[str] = []

    def documents(folder: str, split: str) -> list[Source]:
        read.append(split)
        return [Source(f"package/{split}.py", splits[split])]

    monkeypatch.setattr(stages, "read_documents", documents)
    packages = {"p": {"version": "1", "licence": "MIT", "split": "train", "bytes": 5}}
    packages["q"] = {**packages["p"], "split": "heldout"}
    (tmp_path / "corpus.json").write_text(json.dumps({"packages": packages}))
    COMMANDS["base"](f"{tmp_path}/out", corpus=str(tmp_path), steps=1, device="cpu")
    assert set(read) == {"train", "validation"}
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "| p | 1 | MIT | 5 |" in card
    assert "| q |" not in card
    assert "--corpus CORPUS" in card


def test_rows_go_on_into_further_passes(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr(stages, "PASSES", 3)
    sources = [Source(str(n), "def f(x):\n    return x\n" * 40) for n in range(20)]
    stage = replace(STAGES["base"], mixture=Mixture())
    rows = np.concatenate(list(stages.training_rows(tokenizer, sources, stage, 0, 10_000)))
    once = list(stages.encode_corpus(tokenizer, sources, LENGTH + 1, stage.mixture, "0 0"))
    assert (rows != 0).sum() / sum(map(len, once)) == pytest.approx(3, abs=0.3)
    few = np.concatenate(list(stages.training_rows(tokenizer, sources, stage, 0, 3)))
    assert few.shape == (3, LENGTH + 1)


def test_held_out_bytes_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr(stages, "HELD_OUT_TOKENS", 500)
    texts = [Path(os.__file__).with_name(name).read_text(encoding="utf-8") for name in NAMES]
    rows, size = stages.held_out_rows(tokenizer, [Source(str(i), text) for i, text in enumerate(texts)], LENGTH)
    read = "".join(tokenizer.decode([t for t in row if t]) for row in rows.tolist())
    assert size == pytest.approx(len(read.encode()), abs=len(rows) * 4)  # a space begins each sequence but the first
    assert 500 <= (rows != 0).sum() < 500 + LENGTH


# --- the table -------------------------------------------------------------------------------------------------------


def test_shapes_fit_the_repository() -> None:
    for name, params in SHAPES.items():
        if name == "small":
            continue
        model = on_meta(params)
        assert 2 * sum(p.numel() for p in model.parameters()) <= 16e6, name
        assert params["n_heads"] % 8 == 0
        assert params["n_kv_heads"] < params["n_heads"]
        assert name.startswith(f"{params['n_layers']}x{params['dim']}")


def on_meta(params: dict[str, Any]) -> Transformer:
    with torch.device("meta"):
        return Transformer(stages.ModelArgs(**params))


@pytest.mark.slow
def test_shapes_are_compared_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "deeper", {**SMALL, "n_layers": 2})
    monkeypatch.setattr(stages, "seconds_a_step", lambda *_: 30.0)
    monkeypatch.setattr(
        sys, "argv", ["x", "shapes", "--out", str(tmp_path), "--shapes", "small,deeper", "--minutes", "1"]
    )
    run_command(COMMANDS, "codellama train")
    with open(tmp_path / "shapes.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["shape"] for line in lines] == ["small", "deeper"]
    assert [line["steps"] for line in lines] == ["2", "2"]
    assert int(lines[0]["parameters"]) < int(lines[1]["parameters"])
    assert all(float(line["bits_per_byte"]) > 1 for line in lines)
    assert "bits_per_byte" in capsys.readouterr().out


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
