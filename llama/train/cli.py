"""The room's commands: `codellama train corpus`, each stage, `all`, and `shapes`; or `python -m llama.train …`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist

from llama import parallel
from llama.cli import run
from llama.evals.record import begin
from llama.options import (
    MaybeAbove,
    MaybeCount,
    MaybeDevice,
    MaybeOut,
    MaybePath,
    MaybeSeed,
    Out,
    Positional,
    choice,
)
from llama.train.card import write_card
from llama.train.collection import corpus, whole_corpus
from llama.train.loop import Workers
from llama.train.report.cli import gaps, report
from llama.train.shapes import compare
from llama.train.stages import ALL, SHAPE, SHAPES, STAGES, read_run, results, start_run, train_stage

_OPTIONS = """

    Stop it with Ctrl-C and give the same command again: it continues where it was. Under torchrun, several processes
    share the rows of each step; the result is the same.

    Args:
        out: the checkpoint's folder: params.json, consolidated.00.pth, tokenizer.model, MODEL_CARD.md.
        corpus: a folder made by `codellama train corpus` (none: the standard library alone).
        minutes: how long {what} may take on this machine as it is now (none: {minutes:g}).
        steps: how many steps of each stage instead.
        work: where the run keeps its files (none: OUT with .training appended), a folder for each stage; there
            log.csv and curves.png show how it goes.
        seed: of the weights, of the gaps in documents, and of their order (none: 0, or the run's).
        shape: the model's size (none: {shape}, or the run's).
        device: where (none: a GPU if there is one).
        rows_per_step: how many rows a step takes (none: the stage's own number).
"""


def join(device: str | None) -> Workers:
    """This process among those that torchrun started, each to hold the whole model. `cuda` is a GPU for each."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch finds no GPU here; leave it out to train on the CPU")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    # A process may wait for the first to encode the corpus; torchrun ends it if that one fails.
    ranks = parallel.start(1, device=device, timeout=4 * 3600)
    return Workers(dist.get_rank(), dist.get_world_size(), ranks.device)


def command(names: tuple[str, ...], summary: str) -> Callable[..., None]:
    """A command that trains these stages in order and leaves the last one's checkpoint in OUT."""

    def train(
        out: Positional[Out],
        *,
        corpus: MaybePath = None,
        minutes: MaybeAbove = None,
        steps: MaybeCount = None,
        work: MaybeOut = None,
        seed: MaybeSeed = None,
        shape: Annotated[str | None, choice(SHAPES)] = None,
        device: MaybeDevice = None,
        rows_per_step: MaybeCount = None,
    ) -> None:
        whole_corpus(corpus)
        begin(work or out)
        workers = join(device)
        folder = Path(work if work is not None else f"{out.rstrip('/')}.training")
        if workers.lead:
            start_run(folder, shape, seed, corpus)
        workers.wait()
        own = read_run(folder)
        for name in names:
            share = STAGES[name].minutes
            if minutes is not None:
                share = minutes if len(names) == 1 else minutes * share / 100
            if not train_stage(
                STAGES[name], own, minutes=share, steps=steps, rows_per_step=rows_per_step, workers=workers
            ):
                if workers.lead:
                    print(f"Stopped; the same command continues the run in {folder}.", file=sys.stderr)
                return
        if workers.lead:
            publish(folder, names[-1], Path(out))
            print(f"The checkpoint is in {out}; {folder} can be removed.")

    train.__doc__ = summary + _OPTIONS.format(
        what="this stage" if len(names) == 1 else "all of it",
        minutes=STAGES[names[0]].minutes if len(names) == 1 else 100,
        shape=SHAPE,
    )
    return train


def publish(work: Path, stage: str, out: Path) -> None:
    """Copies a finished stage's checkpoint to `out`, with its card."""
    shutil.copytree(work / stage / "checkpoint", out, dirs_exist_ok=True)
    own = read_run(work)
    order = list(STAGES)
    write_card(out / "MODEL_CARD.md", own, [r for r in results(own) if order.index(r.stage) <= order.index(stage)])


COMMANDS: dict[str, Callable[..., None]] = {
    "corpus": corpus,
    "plain": command(("plain",), "A first stage of code without gaps, for `base` to go on from; `all` leaves it out."),
    "base": command(("base",), "Train a model from nothing, or from `plain`: code, most of it with a gap to fill in."),
    "long": command(("long",), "Go on from `base` with rows eight times as long and a theta of 1e6."),
    "instruct": command(("instruct",), "Go on from `long` with dialogs, of which the answers are learned."),
    "exercises": command(
        ("exercises",), "Go on from `instruct` with exercises that passed their tests, and real code."
    ),
    "answers": command(("answers",), "Go on from `exercises` with more dialogs, at a falling rate."),
    "all": command(ALL, "Make a checkpoint: base, long and instruct, one after the other."),
    "shapes": compare,
    "gaps": gaps,
    "report": report,
}


def main() -> None:
    """The command `codellama train`, alone."""
    run(COMMANDS, name="codellama train")
