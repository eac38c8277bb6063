"""The stages of a Code Llama's making, at a size for two CPU cores: what each starts from, reads and learns.

The published models came to be in four steps (arXiv 2308.12950, section 2): a language model; training on code, with
gaps to fill in; a short one on long sequences, RoPE's theta raised from 1e4 to 1e6; and instructions. Here a stage is
an entry of one table, and one function trains them all. Each leaves a checkpoint in the published format, and the next
goes on from it. A stage's folder holds every step's result, so it can be stopped anywhere and started again. How
many steps a given time allows is measured once, at its first start: the schedule then is a number of steps, and does
not depend on what else the machine does.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llama import parallel
from llama.checkpoint import Checkpoint, load, save
from llama.config import ModelArgs
from llama.model import Transformer
from llama.system import replacing
from llama.tokenizer import Tokenizer
from llama.train.attention import causal_attention
from llama.train.collection import TOTALS, read_documents
from llama.train.corpus import Source, read_corpus, stable_hash
from llama.train.curves import draw
from llama.train.loop import ALONE, Data, Entry, TrainingConfig, Workers, evaluate, new_optimizer, train, train_step
from llama.train.sequences import Mixture, Rows, encode_corpus, encode_plain, pack
from llama.train.tokenfile import Facts, digest, has_tokens, read_tokens, write_tokens
from llama.train.tokenizer import train_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "4x256": {"dim": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 4096, "multiple_of": 64},
    "6x256": {"dim": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 4096, "multiple_of": 64},
    "8x256": {"dim": 256, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 4096, "multiple_of": 64},
    "10x224": {"dim": 224, "n_layers": 10, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 4096, "multiple_of": 32},
    "4x320": {"dim": 320, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 4096, "multiple_of": 64},
    "4x256-8k": {"dim": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 8192, "multiple_of": 64},
}
"""Candidates of at most 16 MB in bfloat16: layers x width, and the vocabulary where it is not 4,096 pieces."""
SHAPE = "6x256"

PASSES = 3
"""How often a corpus is read for one stage, each time with gaps elsewhere; training beyond these comes back to them."""
PART = 1_000_000
"""Tokens that are encoded, laid into rows and written at a time."""
HELD_OUT_TOKENS = 65_536
TOKENIZER_BYTES = 12_000_000
"""Of text that the tokenizer is learned from; more takes longer and changes little."""


@dataclass(frozen=True)
class Stage:
    """What sets a stage apart. `training.steps` is for when neither minutes nor steps are asked for otherwise."""

    name: str
    after: str | None
    """The stage whose weights it starts from."""
    alone: bool
    """Whether it may start from random weights where a run has not begun the stage before."""
    length: int
    """Tokens that the model reads at a time."""
    rope_theta: float
    mixture: Mixture
    training: TrainingConfig
    minutes: float
    """Of 100 for all stages; the rest is for the tokenizer, for rows, and for measuring."""


_LENGTH = 256
"""Of the rows of the first stages: short ones hold more documents, and each shows once where its gap's text goes on."""
_BASE = TrainingConfig(steps=6000, peak_lr=2e-3, rows_per_step=16, rows_at_once=4, steps_between_evaluations=200)
_CODE = Mixture(line_gaps=0.6, functions=0.6, longest_function=128, keys=0.1)
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("plain", None, True, _LENGTH, 1e4, replace(_CODE, infilling=0.0), _BASE, minutes=30),
        Stage("base", "plain", True, _LENGTH, 1e4, _CODE, _BASE, minutes=60),
        Stage(
            "long",
            "base",
            False,
            8 * _LENGTH,
            1e6,
            Mixture(line_gaps=0.8, functions=0.2, longest_function=256, keys=0.25),
            TrainingConfig(
                steps=500,
                rows_per_step=4,
                rows_at_once=1,
                peak_lr=4e-4,
                final_lr=1.0,
                warmup_steps=10,
                steps_between_evaluations=50,
            ),
            minutes=15,
        ),
        # Short answers and short functions: an end has to be the likeliest token somewhere for a greedy model to stop.
        Stage(
            "instruct",
            "long",
            False,
            2 * _LENGTH,
            1e6,
            Mixture(
                infilling=0.3,
                suffix_first=0.3,
                line_gaps=0.9,
                functions=0.9,
                dialogs=0.65,
                keys=0.05,
                longest_answer=40,
                longest_function=96,
            ),
            TrainingConfig(steps=1500, rows_per_step=8, rows_at_once=2, peak_lr=1e-3, warmup_steps=20),
            minutes=17,
        ),
        # The world of exercises beside real code. The rate is constant, so it can be stopped whenever that is enough;
        # it falls in the last stage, which has more dialogs.
        Stage(
            "exercises",
            "instruct",
            False,
            384,
            1e6,
            Mixture(
                infilling=0.7,
                line_gaps=0.6,
                functions=0.6,
                longest_function=128,
                keys=0.04,
                exercises=0.55,
                questions=0.2,
            ),
            TrainingConfig(
                steps=2000,
                rows_per_step=12,
                rows_at_once=3,
                peak_lr=8e-4,
                final_lr=1.0,
                warmup_steps=20,
                steps_between_evaluations=200,
            ),
            minutes=60,
        ),
        Stage(
            "answers",
            "exercises",
            False,
            384,
            1e6,
            Mixture(
                infilling=0.7,
                line_gaps=0.6,
                functions=0.6,
                longest_function=128,
                keys=0.03,
                exercises=0.45,
                questions=0.3,
            ),
            TrainingConfig(
                steps=1000,
                rows_per_step=12,
                rows_at_once=3,
                peak_lr=8e-4,
                warmup_steps=10,
                steps_between_evaluations=100,
            ),
            minutes=30,
        ),
    )
}
"""All the stages in order. `plain`, a first stage without gaps, and the two with exercises are there for who asks for
them."""
ALL = ("base", "long", "instruct")


@dataclass(frozen=True)
class Run:
    """What the stages in one folder share."""

    folder: Path
    params: dict[str, Any]
    """The model's, but for rope_theta."""
    seed: int
    corpus: str | None
    """A folder made by `codellama train corpus`; None: the standard library."""
    made_of: str
    """Which corpus it was at the first start, however it is called."""

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.model"

    def args(self, stage: Stage) -> ModelArgs:
        return ModelArgs(**self.params, rope_theta=stage.rope_theta, max_seq_len=stage.length)

    def sources(self, training: bool) -> list[Source]:
        """The files to train on, or those to measure on during training."""
        if self.corpus is None:
            return [source for source in read_corpus() if source.is_held_out != training]
        return list(read_documents(self.corpus, "train" if training else "validation"))


@dataclass(frozen=True)
class Plan:
    """What a stage settles at its first start."""

    steps: int
    rows_per_step: int
    starts_from: str | None


@dataclass(frozen=True)
class Result:
    """What a finished stage measured. `loss` and `bits_per_byte` are those of held-out text in rows of `length`
    tokens, by the checkpoint as it was written, in float32."""

    stage: str
    steps: int
    tokens: int
    minutes: float
    length: int
    rope_theta: float
    parameters: int
    loss: float
    bits_per_byte: float


def start_run(folder: Path, shape: str | None = None, seed: int | None = None, corpus: str | None = None) -> Run:
    """The run in `folder`, begun if there is none: settles what all stages share, and makes the tokenizer.

    What is None is as the run has it, or the default. Raises ValueError where a run has it otherwise.
    """
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    path = folder / "run.json"
    if path.is_file():
        run = read_run(folder)
        asked = {
            "params": None if shape is None else SHAPES[shape],
            "seed": seed,
            "made_of": None if corpus is None else _name_corpus(corpus),
        }
        for name, value in asked.items():
            if value is not None and value != getattr(run, name):
                raise ValueError(
                    f"the run in {folder} has {name} {getattr(run, name)}, not {value}: use another folder"
                )
        run = replace(run, corpus=corpus or run.corpus)
    else:
        run = Run(folder, SHAPES[shape or SHAPE], seed or 0, corpus, _name_corpus(corpus))
    _write_json(path, {name: value for name, value in asdict(run).items() if name != "folder"})
    if not run.tokenizer_path.exists():
        train_tokenizer(_sample(run.sources(training=True)), run.params["vocab_size"], run.tokenizer_path)
    return run


def read_run(folder: Path) -> Run:
    return Run(folder, **json.loads((folder / "run.json").read_text(encoding="utf-8")))


def train_stage(
    stage: Stage,
    run: Run,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    rows_per_step: int | None = None,
    workers: Workers = ALONE,
) -> bool:
    """Trains a stage of a run, or goes on with it, and writes its checkpoint when the last step is done.

    At the first start, it is settled for `steps`, or for as many as are expected to take `minutes`, else for the
    table's. Returns whether the stage is complete. Raises ValueError where the stage before is not.
    """
    folder = run.folder / stage.name
    if (folder / "result.json").exists():
        return True
    if workers.lead:
        prepare(stage, run, minutes, steps, rows_per_step, workers)
    workers.wait()
    plan = Plan(**json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    config = _config(stage, run, plan, workers)
    rows, _ = read_tokens(folder / "train", _training_facts(stage, run, plan))
    held_out, held_out_bytes = read_tokens(folder / "held_out", _facts(stage, run, "validation"))
    data = Data(rows, held_out, held_out_bytes)
    model = new_model(stage, run, workers.device)
    if plan.starts_from is not None:
        state = torch.load(run.folder / plan.starts_from / "state.pt", weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
    log = train(model, data, config, folder, workers)
    if workers.lead and log:
        with suppress(ImportError):  # the command has told before
            draw(folder / "log.csv", folder / "curves.png", stage.name)
        if len(log) == plan.steps:
            _finish(stage, run, data, log, workers.device)
    workers.wait()
    return len(log) == plan.steps


def prepare(
    stage: Stage, run: Run, minutes: float | None, steps: int | None, rows_per_step: int | None, workers: Workers
) -> None:
    """Writes the plan and the rows of a stage, where they aren't there yet."""
    folder = run.folder / stage.name
    if not (folder / "plan.json").exists():
        before = predecessor(stage, run)
        plan = Plan(steps or stage.training.steps, rows_per_step or stage.training.rows_per_step, before)
        if steps is None and minutes is not None:
            config = _config(stage, run, plan, workers)
            seconds = seconds_a_step(new_model(stage, run, workers.device), config, stage.length, workers)
            plan = replace(plan, steps=max(1, round(60 * minutes / seconds)))
        _write_json(folder / "plan.json", asdict(plan))
    plan = Plan(**json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    for name, asked in (("steps", steps), ("rows_per_step", rows_per_step)):
        if asked not in (None, getattr(plan, name)):
            raise ValueError(
                f"{folder} has {name} {getattr(plan, name)}, not {asked}: leave that out, or use another folder"
            )
    tokenizer = Tokenizer(run.tokenizer_path)
    if not has_tokens(folder / "train"):
        facts = _training_facts(stage, run, plan)
        parts = training_rows(tokenizer, run.sources(training=True), stage, run.seed, facts["rows"])
        write_tokens(folder / "train", facts, ((part, 0) for part in parts))
    if not has_tokens(folder / "held_out"):
        held_out = held_out_rows(tokenizer, run.sources(training=False), stage.length)
        write_tokens(folder / "held_out", _facts(stage, run, "validation"), [held_out])


def predecessor(stage: Stage, run: Run) -> str | None:
    """The stage that `stage` goes on from in this run, or None. Raises ValueError where that isn't finished."""
    if stage.after is None or (stage.alone and not (run.folder / stage.after).exists()):
        return None
    if not (run.folder / stage.after / "result.json").exists():
        raise ValueError(
            f"stage {stage.name} goes on from {stage.after}, which is not finished in {run.folder}: "
            f"run `codellama train {stage.after}` first, or `codellama train all`"
        )
    return stage.after


def training_rows(tokenizer: Tokenizer, sources: list[Source], stage: Stage, seed: int, wanted: int) -> Iterator[Rows]:
    """Rows for a stage, a part at a time: `wanted`, or as many as `PASSES` passes give."""
    length = stage.length + 1  # each row's tokens but the last are read, each but the first is predicted
    made = 0
    with tqdm(total=wanted, desc=f"{stage.name}: encoding", unit="row", mininterval=5) as progress:
        for number in range(PASSES):
            name = f"{seed} {number}"
            order = random.Random(name).sample(sources, len(sources))
            waiting: list[list[int]] = []
            size = 0
            for sequence in encode_corpus(tokenizer, order, length, stage.mixture, name):
                waiting.append(sequence)
                size += len(sequence)
                if size >= min(PART, (wanted - made) * length):
                    rows = pack(waiting, length, f"{name} {made}")[: wanted - made]
                    yield rows
                    made += len(rows)
                    progress.update(len(rows))
                    if made == wanted:
                        return
                    waiting, size = [], 0
            if waiting:
                rows = pack(waiting, length, f"{name} {made}")
                yield rows
                made += len(rows)
                progress.update(len(rows))


def held_out_rows(tokenizer: Tokenizer, sources: Iterable[Source], length: int) -> tuple[Rows, int]:
    """About `HELD_OUT_TOKENS` of plain documents, from files chosen by a hash, and the bytes of their text."""
    chosen: list[list[int]] = []
    tokens = text_bytes = 0
    in_order = sorted(sources, key=lambda source: stable_hash(source.path))
    for sequence, size in encode_plain(tokenizer, in_order, length + 1):
        chosen.append(sequence)
        tokens, text_bytes = tokens + len(sequence), text_bytes + size
        if tokens >= HELD_OUT_TOKENS:
            break
    return pack(chosen, length + 1, ""), text_bytes


def new_model(stage: Stage, run: Run, device: torch.device) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = Transformer(run.args(stage))
    if device.type == "cpu":
        for layer in model.layers:
            layer.attention.attend = causal_attention  # type: ignore[union-attr]
    return model.to(device)


def seconds_a_step(
    model: Transformer, config: TrainingConfig, length: int, workers: Workers = ALONE, timed: int = 4
) -> float:
    """How long a step takes on this machine as it is now, on a worker's part of the rows: the first one aside, which
    is slower."""
    alone = Workers(device=workers.device)
    rows = math.ceil(config.rows_per_step / workers.count)
    batch = torch.from_numpy(np.random.default_rng(0).integers(1, model.args.vocab_size, (rows, length + 1)))
    optimizer = new_optimizer(model, config)
    started = 0.0
    for _ in range(timed + 1):
        train_step(model, optimizer, batch, config.peak_lr, config, alone)
        started = started or time.monotonic()
    return (time.monotonic() - started) / timed


def results(run: Run) -> list[Result]:
    """Of the stages that are finished, in order."""
    paths = [run.folder / name / "result.json" for name in STAGES]
    return [Result(**json.loads(path.read_text(encoding="utf-8"))) for path in paths if path.exists()]


def _finish(stage: Stage, run: Run, data: Data, log: list[Entry], device: torch.device) -> None:
    folder = run.folder / stage.name
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    weights = {name: weight.bfloat16() for name, weight in state["model"].items()}
    save(folder / "checkpoint", run.args(stage), weights, tokenizer_path=run.tokenizer_path)
    alone = Workers(device=device)
    loss, bits_per_byte = evaluate(_read_back(folder / "checkpoint", device), data, 1, torch.float32, alone)
    result = Result(
        stage=stage.name,
        steps=len(log),
        tokens=log[-1].tokens,
        minutes=round(log[-1].seconds / 60, 1),
        length=stage.length,
        rope_theta=stage.rope_theta,
        parameters=sum(weight.numel() for weight in weights.values()),
        loss=loss,
        bits_per_byte=bits_per_byte,
    )
    _write_json(folder / "result.json", asdict(result))


def _read_back(folder: Path, device: torch.device) -> Transformer:
    """The checkpoint as users will have it: rounded to bfloat16, and with the core's own attention."""
    ranks, checkpoint = parallel.start(1, device=device), Checkpoint(folder)
    with torch.device("meta"):
        model = Transformer(checkpoint.args())
    load(model, checkpoint, ranks, torch.float32)
    return model


def _config(stage: Stage, run: Run, plan: Plan, workers: Workers) -> TrainingConfig:
    at_once = stage.training.rows_at_once if workers.device.type == "cpu" else plan.rows_per_step
    return replace(
        stage.training, steps=plan.steps, rows_per_step=plan.rows_per_step, rows_at_once=at_once, seed=run.seed
    )


def _facts(stage: Stage, run: Run, split: str) -> Facts:
    return {
        "corpus": run.made_of,
        "split": split,
        "tokenizer": digest(run.tokenizer_path),
        "length": stage.length + 1,
        "seed": run.seed,
    }


def _training_facts(stage: Stage, run: Run, plan: Plan) -> Facts:
    rows = plan.steps * plan.rows_per_step
    return {**_facts(stage, run, "train"), "mixture": asdict(stage.mixture), "rows": rows}


def _name_corpus(corpus: str | None) -> str:
    if corpus is None:
        return f"the standard library of CPython {platform.python_version()}"
    if not Path(corpus, TOTALS).is_file():
        raise ValueError(f"{corpus} holds no whole corpus; make one with `codellama train corpus {corpus}`")
    return f"{TOTALS} {digest(Path(corpus, TOTALS))}"


def _sample(sources: list[Source]) -> Iterator[str]:
    """Files of `TOKENIZER_BYTES`, chosen by a hash of their path, in the corpus's order."""
    chosen: set[str] = set()
    size = 0
    for source in sorted(sources, key=lambda source: stable_hash(source.path)):
        if size >= TOKENIZER_BYTES:
            break
        chosen.add(source.path)
        size += len(source.text)
    return (source.text for source in sources if source.path in chosen)


def _write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
