"""The loop learns, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import csv
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from llama import parallel
from llama.config import ModelArgs
from llama.model import Transformer
from llama.train.loop import (
    Data,
    Entry,
    TrainingConfig,
    Workers,
    decay_matrices,
    evaluate,
    summed_loss,
    take_rows,
    targets,
    train,
    train_step,
)
from llama.train.sequences import PADDING, Rows
from parallel.ranks import on_ranks

CONFIG = TrainingConfig(steps=8, rows_per_step=4, rows_at_once=2, warmup_steps=2, steps_between_evaluations=4)


def make_model(tiny: ModelArgs) -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny)


def make_rows(count: int, length: int = 12) -> Rows:
    """Counting up from anywhere: easy to learn. Every third row ends in padding."""
    rows = (np.random.default_rng(0).integers(1, 60, count)[:, None] + np.arange(length)).astype(np.int16)
    rows[::3, -4:] = PADDING
    return rows


@pytest.fixture
def data() -> Data:
    return Data(make_rows(30), make_rows(5), held_out_bytes=200)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tiny: ModelArgs, data: Data, tmp_path: Path) -> None:
    """Stopped by a signal in the middle of a step, and continued with a fresh model and optimizer."""
    whole = make_model(tiny)
    expected = train(whole, data, CONFIG, tmp_path / "whole")

    stopped, passes = make_model(tiny), 0

    def interrupt(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:  # two passes a step: this is the first of the third
            signal.raise_signal(signal.SIGINT)

    hook = stopped.register_forward_hook(interrupt)
    first = train(stopped, data, CONFIG, tmp_path / "parts")
    hook.remove()
    assert len(first) == 3
    continued = make_model(tiny)
    log = train(continued, data, CONFIG, tmp_path / "parts")

    def comparable(entries: list[Entry]) -> list[Entry]:
        return [replace(entry, seconds=0.0) for entry in entries]

    assert len(expected) == CONFIG.steps
    assert comparable(log) == comparable(expected)
    for mine, theirs in zip(continued.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_handlers_of_signals_are_put_back(tiny: ModelArgs, data: Data, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(make_model(tiny), data, replace(CONFIG, steps=1), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_not_trained_again(tiny: ModelArgs, data: Data, tmp_path: Path) -> None:
    train(make_model(tiny), data, CONFIG, tmp_path)
    model = make_model(tiny)
    model.register_forward_hook(lambda *_: pytest.fail("it trained"))
    assert len(train(model, data, CONFIG, tmp_path)) == CONFIG.steps


def test_another_runs_folder_is_refused(tiny: ModelArgs, data: Data, tmp_path: Path) -> None:
    train(make_model(tiny), data, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="use another folder"):
        train(make_model(tiny), data, replace(CONFIG, peak_lr=1.0), tmp_path)


def test_the_log_is_on_disk(tiny: ModelArgs, data: Data, tmp_path: Path) -> None:
    log = train(make_model(tiny), data, CONFIG, tmp_path)
    with open(tmp_path / "log.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(1, 9))
    assert [float(line["loss"]) for line in lines] == [entry.loss for entry in log]
    assert [bool(line["held_out_loss"]) for line in lines] == [step % 4 == 0 for step in range(1, 9)]
    padding = int((np.stack([take_rows(data.rows, step, CONFIG) for step in range(8)]) == PADDING).sum())
    assert int(lines[-1]["tokens"]) == 8 * 4 * 12 - padding


def test_it_learns(tiny: ModelArgs, data: Data, tmp_path: Path) -> None:
    log = train(make_model(tiny), data, replace(CONFIG, steps=60, warmup_steps=5, peak_lr=5e-3), tmp_path)
    assert log[0].loss == pytest.approx(math.log(96), abs=0.2)  # knows nothing yet
    assert log[-1].loss < 1
    assert log[-1].held_out_loss is not None
    assert log[-1].held_out_loss < 1


def test_learning_rate_can_be_constant() -> None:
    config = TrainingConfig(steps=50, peak_lr=3.0, warmup_steps=2, final_lr=1.0)
    assert [config.lr(step) for step in range(50)] == [1.5, *[3.0] * 49]


def test_learning_rate_warms_up_and_falls_to_a_thirtieth() -> None:
    config = TrainingConfig(steps=101, peak_lr=3.0, warmup_steps=10)
    rates = [config.lr(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.3)
    assert rates[9] == rates[10] == 3.0
    assert rates[55] == pytest.approx((3.0 + 0.1) / 2)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_every_row_comes_once_before_any_comes_again() -> None:
    rows = np.arange(10, dtype=np.int16)[:, None]
    config = TrainingConfig(steps=1, rows_per_step=4)
    seen = torch.cat([take_rows(rows, step, config) for step in range(5)]).flatten().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert seen[:4] != take_rows(rows, 0, replace(config, seed=1)).flatten().tolist()


def test_parts_of_a_step_add_up_to_the_step(tiny: ModelArgs) -> None:
    """A mean of means would weigh tokens in padded rows more than others."""
    batch = torch.from_numpy(make_rows(6).astype(np.int64))
    outcomes = []
    for rows_at_once in (1, 6):
        model = make_model(tiny).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        config = replace(CONFIG, rows_at_once=rows_at_once, max_grad_norm=1e9)
        loss = train_step(model, optimizer, batch, 1.0, config)
        outcomes.append((loss, [p.detach().clone() for p in model.parameters()]))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-2)  # matrices are multiplied in bfloat16
    for one, all_at_once in zip(outcomes[0][1], outcomes[1][1], strict=True):
        torch.testing.assert_close(one, all_at_once, rtol=2e-2, atol=2e-2)


def test_a_step_is_as_long_as_its_rate_and_the_clipped_gradient_say(tiny: ModelArgs) -> None:
    model = make_model(tiny)
    before = [p.detach().clone() for p in model.parameters()]
    batch = torch.from_numpy(make_rows(4).astype(np.int64))
    train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), batch, 0.5, replace(CONFIG, max_grad_norm=0.01))
    moved = sum((p.detach() - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)) ** 0.5
    assert float(moved) == pytest.approx(0.005, rel=1e-3)


def test_weight_decay_spares_the_norms(tiny: ModelArgs) -> None:
    model = make_model(tiny)
    decayed, spared = decay_matrices(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert spared["weight_decay"] == 0
    assert {names[id(p)].split(".")[-2] for p in spared["params"]} == {"attention_norm", "ffn_norm", "norm"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


class Uniform(nn.Module):
    """Finds all of 64 tokens equally likely."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 64)


def test_bits_per_byte_count_what_is_predicted_and_no_padding() -> None:
    rows = np.array([[1, 2, 3, 4], [1, 5, PADDING, PADDING]], dtype=np.int16)
    loss, bits_per_byte = evaluate(Uniform(), Data(rows, rows, held_out_bytes=12), rows_at_once=1)
    assert loss == pytest.approx(math.log(64))
    assert bits_per_byte == pytest.approx(4 * 6 / 12)  # four tokens of six bits for twelve bytes


class Recorder(nn.Module):
    """Finds all of 64 tokens equally likely, and remembers what it read."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.read = tokens
        return torch.zeros(*tokens.shape, 64)


def test_what_is_not_to_be_learned_is_read_and_costs_nothing() -> None:
    rows = torch.tensor([[~1, ~7, ~8, 9, 2, PADDING], [1, 5, 6, 2, PADDING, PADDING]])
    assert targets(rows).tolist() == [[0, 0, 9, 2, 0], [5, 6, 2, 0, 0]]
    model = Recorder()
    assert summed_loss(model, rows).item() == pytest.approx(5 * math.log(64))
    assert model.read.tolist() == [[1, 7, 8, 9, 2], [1, 5, 6, 2, 0]]


def test_a_question_that_is_not_learned_still_shapes_the_answer(tiny: ModelArgs) -> None:
    """The gradient of a row is that of its answer's targets alone, written out."""
    model = make_model(tiny).double()
    row = torch.tensor([[1, 7, 8, 9, 11, 2]])
    summed_loss(model, torch.where(torch.arange(6) < 3, ~row, row), torch.float32).backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    logprobs = model(row[:, :-1]).log_softmax(-1)
    (-logprobs[0, [2, 3, 4], [9, 11, 2]].sum()).backward()
    for mine, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_with_other_parts_of_a_step(tiny: ModelArgs, data: Data, tmp_path: Path) -> None:
    """How many rows are computed at once is the machine's business, not the run's."""
    log = train(make_model(tiny), data, CONFIG, tmp_path)
    assert len(train(make_model(tiny), data, replace(CONFIG, rows_at_once=4), tmp_path)) == len(log)


# --- several processes ---------------------------------------------------------------------------------------------


def _train_together(
    init_method: str, folder: str, args: dict[str, Any], steps: int
) -> list[tuple[float, float | None]]:
    ranks = parallel.start(1, device="cpu", init_method=init_method)
    workers = Workers(dist.get_rank(), dist.get_world_size(), ranks.device)
    model = make_model(ModelArgs(**args))
    if steps < TOGETHER.steps and workers.rank == 1:  # one of them is told to end, within its last step
        count = 0

        def interrupt(*_: object) -> None:
            nonlocal count
            count += 1
            if count == steps:
                signal.raise_signal(signal.SIGINT)

        model.register_forward_hook(interrupt)
    log = train(model, Data(make_rows(31), make_rows(5), 200), TOGETHER, Path(folder), workers)
    return [(entry.loss, entry.held_out_loss) for entry in log]


TOGETHER = replace(CONFIG, rows_per_step=5, rows_at_once=5)


def figures(log: list[Entry]) -> list[float]:
    return [value for entry in log for value in (entry.loss, entry.held_out_loss or 0.0)]


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_processes_that_share_the_rows_train_as_one(count: int, tiny: ModelArgs, tmp_path: Path) -> None:
    """Five rows a step, a third of them padded, on two ranks; and on six, one of which never has a row."""
    alone = train(make_model(tiny), Data(make_rows(31), make_rows(5), 200), TOGETHER, tmp_path / "alone")
    logs = on_ranks(_train_together, count, str(tmp_path / "shared"), vars(tiny), TOGETHER.steps)
    assert len(logs) == count
    for log in logs:
        assert log == logs[0]
        flat = [value for loss, held_out in log for value in (loss, held_out or 0.0)]
        assert flat == pytest.approx(figures(alone), rel=2e-3)  # sums in another order, in bfloat16
    one, all_of_them = (torch.load(tmp_path / name / "state.pt")["model"] for name in ("alone", "shared"))
    moved = make_model(tiny).state_dict()
    for name, weight in one.items():
        assert (weight - all_of_them[name]).norm() < 0.1 * (weight - moved[name]).norm()


def test_a_run_of_two_processes_is_continued_by_one(tiny: ModelArgs, tmp_path: Path) -> None:
    """One of the two is interrupted; both stop after the same step, and neither waits for the other."""
    data = Data(make_rows(31), make_rows(5), 200)
    alone = train(make_model(tiny), data, TOGETHER, tmp_path / "alone")
    logs = on_ranks(_train_together, 2, str(tmp_path / "parts"), vars(tiny), 3)
    assert [len(log) for log in logs] == [3, 3]
    log = train(make_model(tiny), data, TOGETHER, tmp_path / "parts")
    assert len(log) == TOGETHER.steps
    assert figures(log) == pytest.approx(figures(alone), rel=2e-3)
