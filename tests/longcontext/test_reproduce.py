"""The ablation in miniature: thetas as they match, statements that can fail, and all of it at a size of seconds."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.longcontext.reproduce import cli
from llama.longcontext.reproduce.cli import START, Work, command
from llama.longcontext.reproduce.conditions import (
    PAPER_BASE,
    PAPER_TUNED,
    PRESETS,
    conditions,
    matched_theta,
)
from llama.longcontext.reproduce.figures import pooled
from llama.longcontext.reproduce.statements import AIMS, ORDERINGS, PAPER, Findings, judge
from llama.model import Transformer

SMOKE = PRESETS["smoke"]
NAMES = ["start", "start-raised", "kept", "linear", "raised", "yarn", "ntk_by_parts"]
TUNED = NAMES[2:]


# --- conditions -------------------------------------------------------------------------------------------------------


def test_thetas_let_the_papers_shares_of_pairs_turn() -> None:
    """72.5 and 2,272 are those of the toy in the specification; counted here on 100,000 pairs."""
    base, raised = matched_theta(128, PAPER_BASE), matched_theta(512, PAPER_TUNED)
    assert base == pytest.approx(72.5, abs=0.1)
    assert raised == pytest.approx(2272, abs=1)
    for theta, length, (paper_length, paper_theta) in ((base, 128, PAPER_BASE), (raised, 512, PAPER_TUNED)):
        pairs = torch.arange(100_000, dtype=torch.float64) / 100_000
        turn = [
            (2 * math.pi * t**pairs <= n).double().mean() for t, n in ((theta, length), (paper_theta, paper_length))
        ]
        assert turn[0] == pytest.approx(turn[1].item(), abs=1e-4)


def test_conditions_differ_in_how_positions_are_told_and_in_nothing_else() -> None:
    listed = conditions(128, 4, 72.5, 2272.0)
    assert [c.name for c in listed] == NAMES
    assert [c.name for c in listed if c.tuned] == TUNED
    assert len({json.dumps([c.tuned, c.rope_theta, c.rope_scaling]) for c in listed}) == len(listed)
    by_name = {c.name: c for c in listed}
    assert by_name["linear"].rope_scaling == {"rope_type": "linear", "factor": 4}
    assert by_name["yarn"].rope_scaling == {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128,
    }  # fmt: skip


def test_full_preset_is_what_was_promised() -> None:
    full = PRESETS["full"]
    assert (full.seeds, full.samples, full.base_length, full.factor) == (3, 64, 128, 4)
    lengths = [times * full.base_length for times in full.lengths]
    assert {128, 512, 768, 1024} <= set(lengths)  # the start's, T, 1.5 T and 2 T
    assert {0.0, 0.4} <= set(full.depths)


# --- statements -------------------------------------------------------------------------------------------------------


def findings(**rates: float) -> Findings:
    """Every key found at the rate of its condition and length ("kept_1": at T), the paper's otherwise."""
    times = {0.25: 0, 0.5: 1, 1.0: 2, 1.5: 3}
    keys: dict[str, dict[tuple[int, float], list[float]]] = {}
    for name in NAMES:
        keys[name] = {}
        for lengths in (*times, 2.0):
            for i, depth in enumerate((0.0, 0.2, 0.4)):
                paper = PAPER.get(name, PAPER["raised"])[times[lengths]].split(" / ") if lengths in times else []
                rate = float(paper[i]) / 100 if i < len(paper) else {"raised": 0.9}.get(name, 0.0)
                rate = rates.get(f"{name}_{lengths:g}".replace(".", "_"), rate)
                keys[name][round(512 * lengths), depth] = [rate, rate]
    bins = [(128 * i + 1, 128 * i + 129) for i in range(8)]
    nats = {name: [[3.0] * 2 + [2.8] * 2 + [2.7] * 4] * 2 for name in NAMES}
    return Findings(128, 512, keys, nats, bins)


def test_papers_own_figures_fulfil_every_ordering() -> None:
    """Else a statement would not be what the paper found."""
    assert [v.text for v in judge(findings(), ORDERINGS) if v.holds is not True] == []


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"start_0_25": 0.5}, "The start finds"),
        ({"start_0_5": 0.2}, "Without fine-tuning there is nothing"),
        ({"start-raised_0_5": 0.6}, "Raising θ without fine-tuning"),
        ({"kept_1": 0.2}, "Fine-tuning with θ kept"),
        ({"linear_1": 0.9}, "Linear loses the front"),
        ({"linear_1": 0.0}, "Linear loses the front"),
        ({"linear_1": 0.9}, "finds more than linear"),
        ({"linear_1": 0.95}, "means over depths"),
        ({"raised_1_5": 0.0}, "At 1.5 T and depth 0.2"),
        ({"linear_1_5": 0.3}, "Linear finds nothing"),
        ({"kept_1": 0.9}, "Loss hardly tells"),
    ],
)
def test_each_ordering_can_fail(wrong: dict[str, float], part: str) -> None:
    failed = [verdict.text for verdict in judge(findings(**wrong), ORDERINGS) if verdict.holds is False]
    assert any(part in text for text in failed)


def test_falling_loss_can_fail_too() -> None:
    good = findings()
    rising = replace(good, nats={**good.nats, "raised": [[3.0, 3.0, 2.8, 2.8, 2.9, 2.9, 3.0, 3.0]] * 2})
    verdicts = judge(rising, ORDERINGS)
    assert [v.text for v in verdicts if v.holds is False] == [ORDERINGS[-1].text]
    assert verdicts[-1].here == "2.80, then 2.95 nats"


def test_aims_are_those_of_the_task_at_their_bars() -> None:
    """At most 10 %, at least 85 and 80 %, at most 10 %: each met at the bar, and missed beside it."""
    just = {"kept_1": 0.1, "raised_1": 0.85, "raised_2": 0.8, "linear_2": 0.1}
    assert [v.holds for v in judge(findings(**just), AIMS)] == [True] * 4
    for i, (name, value) in enumerate({"kept_1": 0.11, "raised_1": 0.84, "raised_2": 0.79, "linear_2": 0.11}.items()):
        holds = [verdict.holds for verdict in judge(findings(**{**just, name: value}), AIMS)]
        assert holds == [j != i for j in range(4)]


def test_seeds_count_by_their_mean_and_each_depth_by_itself() -> None:
    good = findings(kept_1=0.0)
    kept = {**good.keys["kept"], (512, 0.0): [0.2, 0.0], (512, 0.4): [0.0, 0.0]}
    assert judge(replace(good, keys={**good.keys, "kept": kept}), AIMS)[0].holds  # a mean of 10 %
    kept = {**kept, (512, 0.0): [0.3, 0.0]}
    assert judge(replace(good, keys={**good.keys, "kept": kept}), AIMS)[0].holds is False  # though both depths: 7.5 %


def test_what_was_not_measured_is_said() -> None:
    good = findings()
    without = {place: rates for place, rates in good.keys["raised"].items() if place[0] != 768}
    verdicts = judge(replace(good, keys={**good.keys, "raised": without}), ORDERINGS)
    assert {v.word for v in verdicts if "1.5 T and depth 0.2" in v.text} == {"not measured"}


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    command(out=f"{folder}/out", preset="smoke", processes=1, page=f"{folder}/docs/ablation.md")
    return folder


def work(folder: Path) -> Work:
    return Work(folder / "out", SMOKE, None, None)


def test_every_condition_and_seed_is_measured_at_every_length_and_depth(made: Path) -> None:
    with open(made / "out" / "reproduce.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = {(r["condition"], r["seed"], r["length"], r["depth"]) for r in rows if r["metric"] == "found"}
    expected = {
        (name, str(seed), str(round(128 * times)), str(depth))
        for name in NAMES for seed in range(SMOKE.seeds) for times in SMOKE.lengths for depth in SMOKE.depths
    }  # fmt: skip
    assert cells == expected
    losses = [r for r in rows if r["metric"] == "nats_per_token"]
    assert len(losses) == len(NAMES) * SMOKE.seeds * SMOKE.bins
    assert {r["n"] for r in losses} == {str(SMOKE.documents)}
    schemes = {r["condition"]: (r["scheme"], float(r["theta"])) for r in rows}
    assert schemes["yarn"] == ("yarn", pytest.approx(72.5, abs=0.1))
    assert schemes["raised"] == ("default", pytest.approx(matched_theta(256, PAPER_TUNED)))


def test_conditions_start_from_the_same_weights_and_read_the_same_rows(made: Path) -> None:
    rows = {name: (made / "out" / "seed-0" / name / "train.bin").read_bytes() for name in TUNED}
    assert len(set(rows.values())) == 1
    assert (made / "out" / "seed-1" / "kept" / "train.bin").read_bytes() != rows["kept"]
    start, *tuned = (
        torch.load(made / "out" / "seed-0" / name / "state.pt", weights_only=True)["model"] for name in (START, *TUNED)
    )
    for weights in tuned:
        # Two steps of Adam at 4e-4 move no weight further.
        assert 0 < max((weights[name] - start[name]).abs().max().item() for name in start) < 2e-3


def test_every_condition_trains_with_its_own_rotation(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotation that is used, not the one that is written down: angles at position 1, and the scale of yarn."""
    used: list[Any] = []
    rotation = Transformer.rotation

    def note(model: Transformer, length: int) -> Any:
        cos, sin = rotation(model, length)
        used.append(torch.stack([cos[1], sin[1]]))
        return cos, sin

    monkeypatch.setattr(Transformer, "rotation", note)
    own = replace(work(made), out=tmp_path)
    (tmp_path / "seed-0").mkdir()
    for name in ("tokenizer.model", START, "rows"):
        (tmp_path / "seed-0" / name).symlink_to(made / "out" / "seed-0" / name)
    plain, raised = (theta ** -(torch.arange(8) / 8) for theta in (own.base[1], own.raised))
    expected = {"kept": plain, "linear": plain / 2, "raised": raised}
    for name, angles in expected.items():
        used.clear()
        assert cli.fine_tune(own, 0, own.conditions[name])
        torch.testing.assert_close(used[0], torch.stack([angles.cos(), angles.sin()]), atol=1e-6, rtol=0)
    used.clear()
    assert cli.fine_tune(own, 0, own.conditions["yarn"])
    assert used[0].square().sum(0).sqrt() == pytest.approx(0.1 * math.log(8) + 1)


def test_starts_differ_by_seed(made: Path) -> None:
    weights = [
        torch.load(made / "out" / f"seed-{seed}" / START / "state.pt", weights_only=True)["model"][
            "tok_embeddings.weight"
        ]
        for seed in range(2)
    ]
    assert not torch.equal(*weights)


def test_page_has_the_tables_the_pictures_and_no_open_blank(made: Path) -> None:
    page = (made / "docs" / "ablation.md").read_text(encoding="utf-8")
    assert not re.search(r"[{}]", page)
    for title in (c.title for c in conditions(128, 2, 72.5, 1.0)):
        assert page.count(f"| {title} |") >= 3  # keys, effective length, losses
    for text in (*(s.text for s in AIMS), *(s.text for s in ORDERINGS), PAPER["kept"][1]):
        assert text in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(pictures) == 3
    for name in pictures:
        assert (made / "docs" / name).read_bytes().startswith(b"\x89PNG")
    made_of = json.loads((made / "out" / "reproduce.json").read_text())
    verdicts = {statement["text"]: statement["holds"] for statement in made_of["statements"]}
    assert len(verdicts) == len(AIMS) + len(ORDERINGS)
    assert verdicts[AIMS[1].text] is False  # four steps find no keys


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "retrieval_grid", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr("llama.train.stages.train", lambda *_, **__: pytest.fail("trained again"))
    command(out=f"{made}/out", preset="smoke", processes=1, page=f"{made}/docs/ablation.md", json=True)
    last = json.loads(capsys.readouterr().out)
    assert last["page"] == f"{made}/docs/ablation.md"
    monkeypatch.setitem(PRESETS, "smoke", replace(SMOKE, samples=5))
    with pytest.raises(ValueError, match="was begun with samples 3, not 5"):
        command(out=f"{made}/out", preset="smoke", processes=1)


def test_run_of_the_train_room_can_be_the_start(made: Path, tmp_path: Path) -> None:
    """Its length, theta and tokenizer are taken, and its base stage is left as it is."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tokenizer.model", START):
        (run / name).symlink_to(made / "out" / "seed-0" / name)
    facts = {"params": dict(SMOKE.params), "seed": 0, "corpus": None, "made_of": "a few files"}
    (run / "run.json").write_text(json.dumps(facts))
    own = Work(tmp_path / "out", replace(SMOKE, seeds=1), run, None)
    assert own.base == (128, pytest.approx(72.5, abs=0.1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "held_out.json").write_bytes((made / "out" / "held_out.json").read_bytes())
    folder = tmp_path / "out" / "seed-0"
    folder.mkdir()
    (folder / "rows").symlink_to(made / "out" / "seed-0" / "rows")
    (folder / "tokenizer.model").write_bytes((run / "tokenizer.model").read_bytes())
    assert cli.make_start(own, 0)
    assert (folder / START).resolve() == (run / START).resolve()
    figures = cli.figures_of(own, 0, own.conditions["start"])
    first = cli.figures_of(work(made), 0, work(made).conditions["start"])
    assert figures["keys"]["found"] == first["keys"]["found"]
    assert figures["losses"]["bins"] == first["losses"]["bins"]


def test_grids_of_seeds_are_added_up(made: Path) -> None:
    own = work(made)
    of_seeds = [cli.figures_of(own, seed, own.conditions["kept"]) for seed in range(2)]
    found = pooled(of_seeds)
    for i, cell in enumerate(found.cells):
        assert cell.found.n == 2 * SMOKE.samples
        assert cell.found.hits == sum(f["keys"]["found"]["cells"][i]["found"]["hits"] for f in of_seeds)


@pytest.mark.slow
def test_processes_side_by_side_make_the_same(made: Path, tmp_path: Path) -> None:
    command(out=f"{tmp_path}/out", preset="smoke", processes=2)
    for name in ("kept", "yarn"):
        one, other = (
            torch.load(folder / "out" / "seed-1" / name / "state.pt", weights_only=True)["model"]
            for folder in (made, tmp_path)
        )
        assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


_PARENT = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from llama.longcontext.reproduce.cli import _settle_process

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), _settle_process, (Path(sys.argv[1]),)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.slow
def test_workers_end_with_what_started_them(tmp_path: Path) -> None:
    """Those of a killed command would go on writing into the folder in which the next one continues."""
    (tmp_path / "parent.py").write_text(_PARENT)
    command = [sys.executable, f"{tmp_path}/parent.py", f"{tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        try:
            parent.communicate(timeout=30)  # the pipe ends when the last of them does
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("the worker was still there after 30 s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "nowhere"}, "nowhere has no finished stage base"),
        ({"corpus": "nowhere"}, "nowhere holds no whole corpus"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        command(**{"out": f"{tmp_path}/out", "preset": "smoke", **options})
    assert not (tmp_path / "out").exists()
