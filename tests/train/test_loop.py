"""The loop learns, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import csv
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llama.config import ModelArgs
from llama.model import Transformer
from llama.train.loop import Data, Entry, TrainingConfig, decay_matrices, evaluate, take_rows, train, train_step
from llama.train.sequences import PADDING, Rows

CONFIG = TrainingConfig(steps=8, rows_per_step=4, rows_at_once=2, warmup_steps=2, steps_between_evaluations=4)


def make_model(tiny: ModelArgs) -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny)


def make_rows(count: int, length: int = 12) -> Rows:
    """Counting up from anywhere: easy to learn. Every third row ends in padding."""
    rows = (np.random.default_rng(0).integers(1, 60, count)[:, None] + np.arange(length)).astype(np.uint16)
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


def test_learning_rate_warms_up_and_falls_to_a_thirtieth() -> None:
    config = TrainingConfig(steps=101, peak_lr=3.0, warmup_steps=10)
    rates = [config.lr(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.3)
    assert rates[9] == rates[10] == 3.0
    assert rates[55] == pytest.approx((3.0 + 0.1) / 2)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_every_row_comes_once_before_any_comes_again() -> None:
    rows = np.arange(10, dtype=np.uint16)[:, None]
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
    rows = np.array([[1, 2, 3, 4], [1, 5, PADDING, PADDING]], dtype=np.uint16)
    loss, bits_per_byte = evaluate(Uniform(), Data(rows, rows, held_out_bytes=12), rows_at_once=1)
    assert loss == pytest.approx(math.log(64))
    assert bits_per_byte == pytest.approx(4 * 6 / 12)  # four tokens of six bits for twelve bytes
