"""Sweeps over RoPE: each cell against the oracle in float64, and what happens between cells, on disk and on Ctrl-C."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures_text import ARGS, WEIGHTS, training_texts
from llama import parallel
from llama.cli import dispatch
from llama.evals.sources import File
from llama.generation import Llama
from llama.longcontext.sweep import CELLS, Sweep, command, draw, sweep, with_rope
from parallel.ranks import on_ranks
from reference import llama as reference_llama

TEXTS = training_texts()
FILES = [File("a.py", TEXTS[0][2000:2300]), File("b.py", TEXTS[1][2000:2250]), File("short.py", "import os\n")]
D = ARGS.dim // ARGS.n_heads
LENGTHS = (16, 40)
TRAINED = 16
GRID: dict[str, Any] = {"thetas": [1e4, 1e6], "factors": [1, 2], "schemes": ["default", "linear", "dynamic"]}


def frequencies(theta: float) -> Tensor:
    """theta^(-2i/D)."""
    return torch.tensor([theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)


def by_hand(scheme: str, theta: float, factor: float | None, length: int) -> Tensor:
    """The formulas of three schemes, from the papers."""
    if scheme == "linear":
        return frequencies(theta) / (factor or 1)
    if scheme == "dynamic" and length > TRAINED:
        s = factor or 1
        return frequencies(theta * ((s * length / TRAINED) - (s - 1)) ** (D / (D - 2)))
    return frequencies(theta)


def loss_by_the_oracle(llama: Llama, text: str, inv_freq: Tensor, length: int, longest: int, last: int) -> float:
    """Of the last tokens of a text's first `longest`, with bos and the `length` - 1 that end there."""
    ids = llama.tokenizer.encode(text, bos=True, eos=False)[:longest]
    window = [llama.tokenizer.bos_id, *ids[longest - length + 1 :]]
    table = torch.log_softmax(reference_llama(ARGS, WEIGHTS, torch.tensor([window]), inv_freq)[0], -1)
    return -sum(float(table[p - 1, window[p]]) for p in range(length - last, length)) / last


@pytest.fixture
def asked(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The rows of every batch that is scored, as a list that grows."""
    calls: list[list[list[int]]] = []
    score = tiny_llama.score

    def spy(rows: Sequence[list[int]]) -> Any:
        calls.append([list(row) for row in rows])
        return score(rows)

    monkeypatch.setattr(tiny_llama, "score", spy)
    return calls


# The rotation is replaced from outside -------------------------------------------------------------------------------


def test_model_rotates_by_what_it_is_given_and_then_by_its_own_again(tiny_llama: Llama) -> None:
    """Guards against tables that outlive their spectrum: same length, other frequencies."""
    model, tokens = tiny_llama.model, torch.randint(3, 1000, (1, 20))
    with torch.inference_mode():
        before = model(tokens)
        with with_rope(model, 300.0, {"rope_type": "linear", "factor": 4.0}):
            inside = model(tokens)
        after = model(tokens)
    expected = reference_llama(ARGS, WEIGHTS, tokens, frequencies(300.0) / 4)
    torch.testing.assert_close(inside, expected.float(), atol=2e-4, rtol=1e-4)
    assert torch.equal(before, after)
    assert (before - inside).abs().max() > 0.1


def test_rope_is_restored_whatever_happens(tiny_llama: Llama) -> None:
    model = tiny_llama.model
    own = model.args.rope_theta, model.args.rope_scaling
    with pytest.raises(KeyboardInterrupt), with_rope(model, 300.0, None):
        raise KeyboardInterrupt
    assert (model.args.rope_theta, model.args.rope_scaling) == own
    with pytest.raises(ValueError, match="'cubic'"), with_rope(model, 300.0, {"rope_type": "cubic"}):
        pass
    assert (model.args.rope_theta, model.args.rope_scaling) == own


def test_stream_that_runs_across_the_border_reads_its_tokens_again(tiny_llama: Llama) -> None:
    """Its keys were rotated by one spectrum, its next query would be by another. So it writes on as the new rotation
    would after the same tokens."""
    prompt = tiny_llama.tokenizer.encode("def f(x):", bos=True, eos=False)
    stream = tiny_llama.stream([prompt], max_gen_len=20, temperature=0.0)
    begun = [*prompt, *next(stream).tokens]
    with with_rope(tiny_llama.model, 300.0, None):
        rest = [token for event in stream for token in event.tokens]
        expected = tiny_llama.generate([begun], len(rest), temperature=0.0, reuse=False)[0][0]
    own = tiny_llama.generate([begun], len(rest), temperature=0.0, reuse=False)[0][0]
    assert rest == expected != own


# Cells ---------------------------------------------------------------------------------------------------------------


def test_cells_are_those_of_the_oracle(tiny_llama: Llama) -> None:
    """Guards the window's end, its bos, and a dynamic base, which must follow from the cell's length and not from the
    slots that the model was built with."""
    found = sweep(tiny_llama, FILES, LENGTHS, **GRID, last=6, trained=TRAINED)
    assert found.documents == ("a.py", "b.py")
    assert len(found.cells) == 2 * (1 + 2 + 2) * 2
    for cell in found.cells:
        inv_freq = by_hand(cell.scheme, cell.theta, cell.factor, cell.length)
        direct = [loss_by_the_oracle(tiny_llama, file.text, inv_freq, cell.length, 40, 6) for file in FILES[:2]]
        assert cell.nats_per_token is not None
        assert cell.nats_per_token.value == pytest.approx(sum(direct) / 2, rel=1e-5)
        assert cell.nats_per_token.n == 2
    assert [row[0].length for row in found.rows] == [16] * len(found.rows)
    assert all((row[0].scheme, row[0].factor) == (row[1].scheme, row[1].factor) for row in found.rows)


def test_every_cell_scores_the_same_tokens(tiny_llama: Llama, asked: list[list[list[int]]]) -> None:
    """The trap: the last tokens of a shorter beginning are other tokens, easier or harder ones."""
    sweep(tiny_llama, FILES, LENGTHS, [1e4], [1, 3], ["linear"], last=6)
    assert [len(rows[0]) for rows in asked] == [16, 16, 40, 40]
    assert len({tuple(tuple(row[-6:]) for row in rows) for rows in asked}) == 1
    assert all(row[0] == tiny_llama.tokenizer.bos_id for rows in asked for row in rows)


def test_one_spectrum_is_measured_once(tiny_llama: Llama, asked: list[list[list[int]]]) -> None:
    """At factor 1, linear is the plain scheme; and no rotation is none at every theta."""
    found = sweep(tiny_llama, FILES, [16], [1e4, 1e6], [1], ["default", "linear", "none"])
    assert len(found.cells) == 6
    assert len(asked) == 3
    first, same, none = (row[0].nats_per_token for row in found.rows[:3])
    assert first == same != none


def test_what_cannot_be_is_skipped_with_its_reason(tiny_llama: Llama) -> None:
    found = sweep(tiny_llama, FILES, [16], [1e4], [1e10, 2], ["linear", "yarn"])
    reasons = {(cell.scheme, cell.factor): cell.skipped for cell in found.cells}
    assert reasons["linear", 2.0] == ""
    assert "at most 1000000000" in reasons["linear", 1e10]
    assert reasons["yarn", 2.0] == "yarn needs the trained context: give trained (--trained)"
    with pytest.raises(ValueError, match="none of 2 combinations can be; the first: yarn needs"):
        sweep(tiny_llama, FILES, [16], [1e4], [1, 2], ["yarn"])


def test_whole_rope_scalings_are_taken_as_they_are(tiny_llama: Llama) -> None:
    lists = {"short_factor": [1.0] * (D // 2), "long_factor": [2.0] * (D // 2)}
    longrope = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 8, "attention_factor": 1.0}
    found = sweep(tiny_llama, FILES, [16], [1e4], [1, 2], [{**longrope, **lists}, "linear"])
    assert [(row[0].scheme, row[0].factor) for row in found.rows] == [("longrope", 2), ("linear", 1), ("linear", 2)]
    assert found.cells[0].nats_per_token == found.cells[2].nats_per_token, "divisors of 2 are a factor of 2"


def test_best_is_the_lowest_of_its_length(tiny_llama: Llama) -> None:
    found = sweep(tiny_llama, FILES, LENGTHS, [1e4, 100.0], [1, 4], ["linear"])
    for length in LENGTHS:
        values = [c.nats_per_token.value for c in found.cells if c.length == length and c.nats_per_token]
        best = found.best(length)
        assert best is not None
        assert best.nats_per_token is not None
        assert (best.length, best.nats_per_token.value) == (length, min(values))


def test_what_cannot_be_asked_is_refused(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="no document has 128 tokens"):
        sweep(tiny_llama, FILES[2:], [16, 128])
    with pytest.raises(ValueError, match="the last 16 tokens, with a shortest length of 16; give 1 to 15"):
        sweep(tiny_llama, FILES, LENGTHS, last=16)
    for wrong in ({"thetas": [1.0]}, {"thetas": []}, {"schemes": []}, {"factors": []}, {"factors": [-1]}):
        with pytest.raises(ValueError, match="at least one of each, thetas above 1 and factors above 0"):
            sweep(tiny_llama, FILES, [16], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no scheme 'cubic'"):
        sweep(tiny_llama, FILES, [16], schemes=["linear", "cubic"])
    with pytest.raises(ValueError, match="nothing to measure on"):
        sweep(tiny_llama, [File("a.py", "")], [16])


# On disk -------------------------------------------------------------------------------------------------------------


def test_interrupted_sweep_goes_on_where_it_stood(
    tiny_llama: Llama, tmp_path: Path, asked: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(tiny_llama, FILES, LENGTHS, **GRID, trained=TRAINED)
    cells = len(asked)
    spy = tiny_llama.score

    def interrupted(rows: Sequence[list[int]]) -> Any:
        if len(asked) == cells + 5:
            raise KeyboardInterrupt
        return spy(rows)

    monkeypatch.setattr(tiny_llama, "score", interrupted)
    own = tiny_llama.model.args.rope_theta, tiny_llama.model.cache
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny_llama, FILES, LENGTHS, **GRID, trained=TRAINED, out=tmp_path)
    assert (tiny_llama.model.args.rope_theta, tiny_llama.model.cache) == own
    file = tmp_path / CELLS
    assert len(file.read_text(encoding="utf-8").splitlines()) == 1 + 5
    with file.open("a", encoding="utf-8") as torn:
        torn.write('{"cell": "broken off he')
    monkeypatch.setattr(tiny_llama, "score", spy)
    asked.clear()
    assert sweep(tiny_llama, FILES, LENGTHS, **GRID, trained=TRAINED, out=tmp_path) == whole
    assert len(asked) == cells - 5
    asked.clear()
    assert sweep(tiny_llama, FILES, LENGTHS, **GRID, trained=TRAINED, out=tmp_path) == whole
    assert not asked, "a finished sweep is measured again"


def test_grid_may_grow_and_nothing_else_may_change(
    tiny_llama: Llama, tmp_path: Path, asked: list[list[list[int]]], tiny_checkpoint: Path
) -> None:
    limits: dict[str, Any] = {"trained": TRAINED, "out": tmp_path}
    sweep(tiny_llama, FILES, [40], [1e4], [2], ["linear"], last=6, **limits)
    asked.clear()
    more = sweep(tiny_llama, FILES, LENGTHS, [1e4, 1e5], [2], ["linear", "yarn"], last=6, **limits)
    assert (len(more.cells), len(asked)) == (8, 7)
    with pytest.raises(ValueError, match=r"another sweep \(last 6 there, 7 now\).*another --out, or delete"):
        sweep(tiny_llama, FILES, [40], last=7, **limits)
    with pytest.raises(ValueError, match=r"another sweep \(documents"):
        sweep(tiny_llama, FILES[:1], [40], last=6, **limits)
    other = Llama.build(tiny_checkpoint)
    other.model.norm.weight = torch.nn.Parameter(other.model.norm.weight + 1e-3)
    with pytest.raises(ValueError, match=r"another sweep \(weights"):
        sweep(other, FILES, [40], last=6, **limits)


def check_sweep(init_method: str, folder: Path, out: Path) -> Sweep:
    parallel.start(init_method=init_method, timeout=20)
    llama = Llama.build(folder, max_seq_len=64, timeout=20)
    return sweep(llama, FILES, LENGTHS, [1e4], [1, 2], ["linear"], last=6, out=out / str(llama.ranks.rank))


def test_ranks_measure_together_and_rank_0_keeps_the_cells(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its file stands for all: a rank without one must not measure what the others take from there."""
    alone = sweep(Llama.build(tiny_checkpoint, max_seq_len=64), FILES, LENGTHS, [1e4], [1], ["linear"], last=6)
    for out in (tmp_path, tmp_path):  # measured, and then found
        for found in on_ranks(check_sweep, 2, tiny_checkpoint, out):
            for one, other in zip(found.rows[0], alone.rows[0], strict=True):
                assert one.nats_per_token is not None
                assert other.nats_per_token is not None
                assert one.nats_per_token.value == pytest.approx(other.nats_per_token.value, rel=1e-5)
        assert len((tmp_path / "0" / CELLS).read_text(encoding="utf-8").splitlines()) == 1 + 4
        assert not (tmp_path / "1").exists()


def test_command_reads_its_words_and_leaves_its_files(tmp_path: Path, tiny_checkpoint: Path, told: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    parallel.start()
    for file in FILES:
        (tmp_path / file.path).write_text(file.text, encoding="utf-8")
    out = tmp_path / "out"
    words = f"--thetas 1e4,1e6 --factors 1,2 --schemes default,yarn,none --lengths 16,40 --documents 2 --out {out} "
    words += f"--sources {tmp_path} --ckpt_dir {tiny_checkpoint} --trained 16"
    dispatch(command, words.split(), "sweep")
    [(table, printed)] = told
    rows = list(csv.DictReader((out / "sweep.csv").open(encoding="utf-8")))
    schemes = [(r["scheme"], r["factor"]) for r in rows[:8:2]]
    assert schemes == [("default", ""), ("yarn", "1.0"), ("yarn", "2.0"), ("none", "")]
    places = {(theta, length) for theta in ("10000.0", "1000000.0") for length in ("16", "40")}
    assert {(r["theta"], r["length"]) for r in rows} == places
    assert {r["n"] for r in rows} == {"2"}
    assert json.loads(rows[4]["rope_scaling"])["original_max_position_embeddings"] == 16
    assert printed["rows"][0]["value"] == float(rows[0]["value"])
    assert json.loads((out / "sweep.json").read_text(encoding="utf-8"))["trained"] == 16
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(table) == 1 + 8
    assert sum(line.count("*") for line in table) >= 1 + 2, "the best of each length is starred"


def test_skipped_cells_are_dashes_in_the_picture(tiny_llama: Llama) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure()
    found = sweep(tiny_llama, FILES, [16], [1e4], [1e10, 2], ["linear"])
    draw(found, figure)
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert found.cells[1].nats_per_token is not None
    assert shown == ["–", f"{found.cells[1].nats_per_token.value:.2f}"]
    assert not math.isnan(found.cells[1].nats_per_token.value)
