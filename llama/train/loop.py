"""The training loop: AdamW, warm-up and cosine, and a run that can be stopped and started as if it had never stopped.

Which rows a step trains on follows from the step's number and the seed, and the state on disk holds the weights and
the optimizer's moments; so a run that is continued goes the way that it would have gone. Weights are float32, and
matrices are multiplied in bfloat16. Several processes, as torchrun starts them, share the rows of each step and add up
their gradients: every token weighs the same wherever it was counted, so their number changes nothing but the time. The
log is a CSV file that anything can plot.
"""

from __future__ import annotations

import csv
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from llama.system import replacing
from llama.train.sequences import PADDING, Rows


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The same numbers and data give the same model, whatever `rows_at_once` (but for the order of
    sums) and `minutes_between_saves` are."""

    steps: int
    rows_per_step: int = 8
    rows_at_once: int = 2  # of those, in one forward: what fits a CPU's cache is fastest
    peak_lr: float = 2e-3
    final_lr: float = 1 / 30  # as a part of peak_lr, as in Code Llama; 1 for a constant rate
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    steps_between_evaluations: int = 100
    minutes_between_saves: float = 3.0

    def lr(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to `final_lr` of the peak at the last step."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.peak_lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * min(done, 1))) / 2)


@dataclass(frozen=True)
class Workers:
    """The processes that train one model together, each with all of its weights; by default, this one alone."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    """This process's, where its model is."""

    @property
    def lead(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of some rows; it may be empty."""
        return rows[self.rank :: self.count]

    def add_(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over the processes, which takes one message for all of them."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        """Returns when all have come here."""
        self.add_(torch.zeros((), device=self.device))


ALONE = Workers()


@dataclass(frozen=True)
class Data:
    """Rows (N, length) to train on, rows to measure on, and how many bytes of text the latter stand for."""

    rows: Rows
    held_out: Rows
    held_out_bytes: int


@dataclass
class Entry:
    """A line of the log. Losses are in nats a token, `seconds` is the time spent training so far."""

    step: int
    tokens: int
    loss: float
    lr: float
    seconds: float
    held_out_loss: float | None = None
    bits_per_byte: float | None = None


def train(model: nn.Module, data: Data, config: TrainingConfig, folder: Path, workers: Workers = ALONE) -> list[Entry]:
    """Trains in place to the last step, or from where `folder` says that an earlier call stopped; returns the log.

    `folder` gets state.pt and log.csv. SIGINT and SIGTERM end it after the step at hand, with the state saved: the
    log is then shorter than `config.steps`. A run may be continued by another number of workers.
    """
    optimizer = new_optimizer(model, config)
    log = resume(model, optimizer, folder, config)
    tokens, spent = (log[-1].tokens, log[-1].seconds) if log else (0, 0.0)
    saved = started = time.monotonic()
    with (
        ending_on_signals() as ended,
        tqdm(total=config.steps, initial=len(log), unit="step", mininterval=5, disable=not workers.lead) as progress,
    ):
        while len(log) < config.steps and not _any(workers, ended):
            step = len(log)
            batch = take_rows(data.rows, step, config)
            loss = train_step(model, optimizer, batch, config.lr(step), config, workers)
            tokens += int((batch != PADDING).sum())
            entry = Entry(step + 1, tokens, loss, config.lr(step), 0.0)
            if entry.step % config.steps_between_evaluations == 0 or entry.step == config.steps:
                entry.held_out_loss, entry.bits_per_byte = evaluate(model, data, config.rows_at_once, workers=workers)
            now = time.monotonic()
            entry.seconds = round(spent + now - started, 1)
            log.append(entry)
            progress.set_postfix_str(_describe(log), refresh=False)
            progress.update()
            if workers.lead and now - saved > 60 * config.minutes_between_saves:
                save(model, optimizer, log, folder, config)
                saved = now
    if workers.lead:
        save(model, optimizer, log, folder, config)
    return log


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    lr: float,
    config: TrainingConfig,
    workers: Workers = ALONE,
) -> float:
    """One update from `batch` (rows, length), this worker's rows in parts of `rows_at_once`.

    Every worker passes the whole batch and returns the mean loss of its tokens.
    """
    # Of the whole batch: divided by it, the workers' gradients need only be added up.
    count = int((targets(batch) != PADDING).sum())
    total = torch.zeros((), device=workers.device)
    for part in torch.split(workers.share(batch).to(workers.device), config.rows_at_once):
        if len(part):
            loss = summed_loss(model, part) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if workers.count > 1:
        for parameter in parameters:
            if parameter.grad is None:  # of a worker without a row
                parameter.grad = torch.zeros_like(parameter)
        workers.add_(total, *(parameter.grad for parameter in parameters if parameter.grad is not None))
    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


def targets(rows: Tensor) -> Tensor:
    """What each token but a row's last is followed by, with PADDING where nothing is to be learned from it."""
    return rows[:, 1:].clamp(min=PADDING)


def summed_loss(model: nn.Module, rows: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Cross-entropy of every target of `rows`, summed, with matrices multiplied in `dtype`."""
    with torch.autocast(rows.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(torch.where(rows < 0, ~rows, rows)[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets(rows).flatten(), ignore_index=PADDING, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    rows_at_once: int,
    dtype: torch.dtype = torch.bfloat16,
    workers: Workers = ALONE,
) -> tuple[float, float]:
    """The held-out loss, and the bits it takes to write a byte of the held-out text."""
    rows = torch.from_numpy(data.held_out.astype(np.int64))
    nats = torch.zeros((), device=workers.device, dtype=torch.float32)
    for part in torch.split(workers.share(rows).to(workers.device), rows_at_once):
        if len(part):
            nats += summed_loss(model, part, dtype)
    workers.add_(nats)
    count = int((targets(rows) != PADDING).sum())
    return nats.item() / count, nats.item() / math.log(2) / data.held_out_bytes


def take_rows(rows: Rows, step: int, config: TrainingConfig) -> Tensor:
    """The rows of a step (rows, length): every row once, in an order of its own, before any comes again."""
    wanted = np.arange(step * config.rows_per_step, (step + 1) * config.rows_per_step)
    orders = {
        epoch: np.random.default_rng((config.seed, epoch)).permutation(len(rows))
        for epoch in set((wanted // len(rows)).tolist())
    }
    chosen = [orders[place // len(rows)][place % len(rows)] for place in wanted.tolist()]
    return torch.from_numpy(rows[chosen].astype(np.int64))


def _any(workers: Workers, ended: threading.Event) -> bool:
    """Whether a worker was told to end. All must leave after the same step, or one would wait for the others."""
    flag = torch.tensor(float(ended.is_set()), device=workers.device)
    workers.add_(flag)
    return bool(flag)


def new_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW as one kernel over all weights, which PyTorch has for CPUs too: for small models a tenth of a step."""
    groups = decay_matrices(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True)


def decay_matrices(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups: weight decay is for matrices; a norm's weights have no reason to be small."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def save(
    model: nn.Module, optimizer: torch.optim.Optimizer, log: Sequence[Entry], folder: Path, config: TrainingConfig
) -> None:
    """Writes state.pt, from which a run continues, and log.csv, which is for people."""
    state = {
        "config": asdict(config),
        "log": [asdict(entry) for entry in log],
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with replacing(folder / "state.pt") as temporary:
        torch.save(state, temporary)
    with replacing(folder / "log.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Entry.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(entry) for entry in log)


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, config: TrainingConfig) -> list[Entry]:
    """Loads the state in `folder` if there is one; returns its log. Raises ValueError if it is another run's."""
    if not (folder / "state.pt").exists():
        return []
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    free = {"rows_at_once": config.rows_at_once, "minutes_between_saves": config.minutes_between_saves}
    if {**state["config"], **free} != asdict(config):
        raise ValueError(
            f"{folder} holds a run with {state['config']}, not {asdict(config)}: continue that, or use another folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [Entry(**entry) for entry in state["log"]]


@contextmanager
def ending_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets in this block, instead of ending the process within a step."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()
        for each, handler in before.items():  # the second time, they do what they always did
            signal.signal(each, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, end)
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(log: Sequence[Entry]) -> str:
    recent = log[-20:]
    loss = sum(entry.loss for entry in recent) / len(recent)
    seconds = recent[-1].seconds - recent[0].seconds
    speed = (recent[-1].tokens - recent[0].tokens) / seconds if seconds else 0
    measured = [entry.held_out_loss for entry in log if entry.held_out_loss is not None]
    held_out = f", held out {measured[-1]:.3f}" if measured else ""
    return f"loss {loss:.3f}{held_out}, {speed:,.0f} tokens/s"
