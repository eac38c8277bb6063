"""Short runs of each candidate shape, to choose by: the same corpus, the same minutes, one table."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated

from llama.options import Above, MaybePath, Out, Positional, Seed, one_of, several, unset
from llama.system import replacing
from llama.train.collection import whole_corpus
from llama.train.loop import Workers
from llama.train.stages import SHAPES, STAGES, results, start_run, train_stage

COLUMNS = ("shape", "vocab_size", "parameters", "megabytes", "steps", "tokens", "minutes", "loss", "bits_per_byte")


def compare(
    out: Positional[Out],
    *,
    corpus: MaybePath = None,
    minutes: Above = 5,
    shapes: Annotated[tuple[str, ...], several("SHAPE", one_of(SHAPES)), unset("all")] = (),
    seed: Seed = 0,
) -> None:
    """Train each shape's base stage for a few minutes, on the CPU, and write OUT/shapes.csv.

    Compare bits per byte: a loss per token says nothing across vocabularies. Stopped with Ctrl-C, the same command
    continues; what is finished is not repeated.

    Args:
        out: a folder for the runs and the table.
        corpus: a folder made by `codellama train corpus` (none: the standard library alone).
        minutes: of training for each.
        shapes: their names.
        seed: of weights, gaps and order.
    """
    whole_corpus(corpus)
    lines = []
    for name in shapes or SHAPES:
        run = start_run(Path(out, name), name, seed, corpus)
        if not train_stage(STAGES["base"], run, minutes=minutes, workers=Workers()):
            print(f"Stopped; the same command continues the runs in {out}.", file=sys.stderr)
            return
        (result,) = results(run)
        size = round(2 * result.parameters / 1e6, 2)
        values = (name, run.params["vocab_size"], result.parameters, size, result.steps, result.tokens, result.minutes)
        lines.append((*values, round(result.loss, 4), round(result.bits_per_byte, 4)))
        with replacing(Path(out, "shapes.csv")) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *lines])
        print(*(f"{column} {value}" for column, value in zip(COLUMNS, lines[-1], strict=True)), sep="  ")
