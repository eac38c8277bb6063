"""The room's command: `codellama train`, or `python -m llama.train`."""

from __future__ import annotations

from pathlib import Path

from llama.cli import run
from llama.train.recipe import make_checkpoint


def train(out: str, minutes: float = 30, steps: int | None = None, work: str | None = None, seed: int = 0) -> None:
    """Train the tiny checkpoint from the standard library's source, and write it to a folder.

    Stop it with Ctrl-C and give the same command again: it continues where it was.

    Args:
        out: the checkpoint's folder: params.json, consolidated.00.pth, tokenizer.model, MODEL_CARD.md.
        minutes: how long training may take on this machine as it is now.
        steps: how many steps to train instead of what the minutes allow.
        work: where the run keeps its files (default: OUT with .training appended); log.csv there is its log.
        seed: of the weights, of the gaps in documents, and of their order.
    """
    folder = Path(work if work is not None else f"{out.rstrip('/')}.training")
    if make_checkpoint(Path(out), folder, minutes=minutes, steps=steps, seed=seed):
        print(f"The checkpoint is in {out}; {folder} can be removed.")
    else:
        print(f"Stopped; the same command continues the run in {folder}.")


COMMANDS = train


def main() -> None:
    run(COMMANDS, name="codellama train")
