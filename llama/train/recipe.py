"""The recipe of the embedded checkpoint: from the standard library's source to a folder in the published format.

Each step leaves a file in the run's folder and is not repeated where that file is there, so the recipe can be stopped
anywhere and started again. How many steps a given time allows is measured once, at the first start: the schedule
then is a number of steps, and does not depend on what else the machine does.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from llama.checkpoint import Checkpoint, load, save
from llama.config import ModelArgs
from llama.model import Transformer
from llama.parallel import start
from llama.tokenizer import Tokenizer
from llama.train.atomic import replacing
from llama.train.attention import causal_attention
from llama.train.card import Figures, write_card
from llama.train.corpus import Source, read_corpus
from llama.train.loop import Data, TrainingConfig, decay_matrices, evaluate, take_rows, train, train_step
from llama.train.sequences import PADDING, Mixture, encode_corpus, encode_plain, pack, read_rows, write_rows
from llama.train.tokenizer import train_tokenizer

CONTEXT = 512
TINY = ModelArgs(
    dim=256,
    n_layers=4,
    n_heads=8,
    n_kv_heads=4,
    vocab_size=4096,
    multiple_of=64,
    rope_theta=10000.0,
    max_seq_len=CONTEXT,
)
PASSES = 3
"""How many times the corpus is encoded, each time with gaps elsewhere; training beyond these comes back to them."""


@dataclass(frozen=True)
class Plan:
    """What a run settles at its first start; beside it in the folder lie tokenizer.model, rows.npy and held_out.npy."""

    steps: int
    seed: int
    python: str
    files: int
    text_bytes: int
    held_out_files: int
    held_out_bytes: int


def make_checkpoint(out: Path, work: Path, *, minutes: float = 30, steps: int | None = None, seed: int = 0) -> bool:
    """Makes or continues the run in `work`, and writes the checkpoint to `out` when the last step is done.

    Trains for `steps`, or for as many as are expected to take `minutes`. Returns whether the run is complete.
    """
    if not (work / "plan.json").exists():
        prepare(work, minutes=minutes, steps=steps, seed=seed)
    plan = Plan(**json.loads((work / "plan.json").read_text(encoding="utf-8")))
    data = Data(read_rows(work / "rows.npy"), read_rows(work / "held_out.npy"), plan.held_out_bytes)
    model = new_model(plan.seed)
    log = train(model, data, TrainingConfig(steps=plan.steps, seed=plan.seed), work)
    if len(log) < plan.steps:
        return False
    weights = {name: weight.detach().bfloat16() for name, weight in model.state_dict().items()}
    save(out, TINY, weights, tokenizer_path=work / "tokenizer.model")
    loss, bits_per_byte = evaluate(_read_back(out), data, rows_at_once=2, dtype=torch.float32)
    figures = Figures(
        **{name: value for name, value in asdict(plan).items() if name != "seed"},
        parameters=sum(weight.numel() for weight in weights.values()),
        tokens=log[-1].tokens,
        tokens_a_pass=int((data.rows != PADDING).sum()) // PASSES,
        minutes=log[-1].seconds / 60,
        loss=loss,
        bits_per_byte=bits_per_byte,
    )
    write_card(out / "MODEL_CARD.md", TINY, figures)
    return True


def prepare(work: Path, *, minutes: float, steps: int | None, seed: int) -> None:
    """Writes the tokenizer, the rows and, last, the plan."""
    sources = read_corpus()
    training = [source for source in sources if not source.is_held_out]
    held_out = [source for source in sources if source.is_held_out]
    train_tokenizer((source.text for source in training), TINY.vocab_size, work / "tokenizer.model")
    tokenizer = Tokenizer(work / "tokenizer.model")
    length = CONTEXT + 1  # each row's tokens but the last are read, each but the first is predicted
    passes = [
        pack(encode_corpus(tokenizer, training, length, Mixture(), f"{seed} {number}"), length, f"{seed} {number}")
        for number in range(PASSES)
    ]
    write_rows(work / "rows.npy", np.concatenate(passes))
    write_rows(work / "held_out.npy", pack(encode_plain(tokenizer, held_out, length), length, str(seed)))
    plan = Plan(
        steps=steps or max(1, round(60 * minutes / seconds_a_step(work))),
        seed=seed,
        python=platform.python_version(),
        files=len(training),
        text_bytes=_bytes(training),
        held_out_files=len(held_out),
        held_out_bytes=_bytes(held_out),
    )
    with replacing(work / "plan.json") as temporary:
        temporary.write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")


def seconds_a_step(work: Path, timed: int = 4) -> float:
    """How long a step takes on this machine as it is now: the first one aside, which is slower."""
    rows, config, model = read_rows(work / "rows.npy"), TrainingConfig(steps=1), new_model(seed=0)
    optimizer = torch.optim.AdamW(decay_matrices(model, config.weight_decay))
    started = 0.0
    for step in range(timed + 1):
        train_step(model, optimizer, take_rows(rows, step, config), config.lr(step), config)
        started = started or time.monotonic()
    return (time.monotonic() - started) / timed


def new_model(seed: int) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(TINY)
    for layer in model.layers:
        layer.attention.attend = causal_attention  # type: ignore[union-attr]
    return model


def _read_back(folder: Path) -> Transformer:
    """The checkpoint as users will have it: rounded to bfloat16, and with the core's own attention."""
    ranks, checkpoint = start(device="cpu"), Checkpoint(folder)
    with torch.device("meta"):
        model = Transformer(checkpoint.args())
    load(model, checkpoint, ranks, torch.float32)
    return model


def _bytes(sources: list[Source]) -> int:
    return sum(len(source.text.encode()) for source in sources)
