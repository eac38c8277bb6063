"""`codellama longcontext reproduce`: trains the starts, fine-tunes and measures every condition, writes the page.

The work falls into parts: a start for each seed, and for each start the conditions. A part is done when its folder
holds its figures, so whatever was stopped goes on where it was. Parts run side by side in processes of one thread each,
since models this small gain nothing from a second one.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from json import dumps, loads
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import torch
from tqdm import tqdm

from llama.evals.cli import read_sources
from llama.evals.positions import loss_by_position
from llama.evals.record import Record, begin, commit, drawable, save_record, tell
from llama.evals.sources import File, choose_files
from llama.evals.table import render
from llama.generation import Llama
from llama.longcontext.reproduce import page as pages
from llama.longcontext.reproduce.conditions import (
    PAPER_BASE,
    PAPER_TUNED,
    PRESETS,
    Condition,
    Preset,
    conditions,
    matched_theta,
)
from llama.longcontext.reproduce.figures import Measured, findings_of, pooled, tidy
from llama.longcontext.reproduce.statements import AIMS, ORDERINGS, Verdict, judge
from llama.longcontext.retrieval import retrieval_grid
from llama.options import MaybeCount, MaybePath, Out, choice, folder
from llama.system import replacing
from llama.train.collection import TOTALS, whole_corpus
from llama.train.corpus import Source, read_corpus
from llama.train.loop import ALONE, TrainingConfig
from llama.train.report import tables
from llama.train.report.measurements import Figures, Measurement, measure
from llama.train.sequences import Mixture
from llama.train.stages import STAGES, Run, Stage, prepare, read_run, train_stage
from llama.train.tokenfile import digest
from llama.train.tokenizer import train_tokenizer

START = "base"
"""Of the folder that every condition starts from, which is the stage of that name in a run of `codellama train`."""
ROWS = "rows"
"""Of the folder of the rows that all conditions of a seed are trained on."""
_TOKEN_FILES = ("train.bin", "train.json", "held_out.bin", "held_out.json")
_FILES = 200
"""Held-out files that are measured on, chosen by a hash, where there are more."""
_AT_ONCE = 1024
"""Tokens in one forward pass of training: more do not fit a core's cache."""


@dataclass(frozen=True)
class ReadOnce(Run):
    """A run that reads its corpus once, or is given a few files of the standard library."""

    files: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """To train on, and those held out."""

    @cached_property
    def _read(self) -> dict[bool, list[Source]]:
        if self.files is not None:
            library = Path(os.__file__).parent
            texts = [[Source(n, (library / n).read_text(encoding="utf-8")) for n in names] for names in self.files]
            return {True: texts[0], False: texts[1]}
        if self.corpus is None:
            everything = read_corpus()
            return {training: [s for s in everything if s.is_held_out != training] for training in (True, False)}
        return {training: super(ReadOnce, self).sources(training) for training in (True, False)}

    def sources(self, training: bool) -> list[Source]:
        return self._read[training]


@dataclass(frozen=True)
class Work:
    """All that a process must know to do its part."""

    out: Path
    preset: Preset
    start: Path | None
    """A run of `codellama train` whose base stage is the start; None: one is trained for each seed."""
    corpus: str | None

    @property
    def base(self) -> tuple[int, float]:
        """The start's length and theta."""
        if self.start is None:
            return self.preset.base_length, matched_theta(self.preset.base_length, PAPER_BASE)
        result = loads((self.start / START / "result.json").read_text(encoding="utf-8"))
        return result["length"], result["rope_theta"]

    @property
    def tuned_length(self) -> int:
        return self.preset.factor * self.base[0]

    @property
    def raised(self) -> float:
        """The theta that is raised to: the paper's own where the start has the paper's."""
        matched = matched_theta(self.tuned_length, PAPER_TUNED)
        return PAPER_TUNED[1] if self.base[1] == PAPER_BASE[1] else matched

    @property
    def lengths(self) -> list[int]:
        """At which keys are looked for."""
        return [round(times * self.base[0]) for times in self.preset.lengths]

    @property
    def conditions(self) -> dict[str, Condition]:
        length, theta = self.base
        return {c.name: c for c in conditions(length, self.preset.factor, theta, self.raised)}

    def run(self, seed: int) -> ReadOnce:
        """The run in which a seed's start and conditions are stages."""
        preset, corpus = self.preset, self.corpus
        if self.start is not None:
            own = read_run(self.start)
            params, made_of, files, corpus = own.params, own.made_of, None, corpus or own.corpus
        else:
            params, files = dict(preset.params), None if corpus else preset.files
            made_of = f"the standard library of CPython {platform.python_version()}{' in part' if files else ''}"
        if self.corpus is not None:
            made_of = f"{TOTALS} {digest(Path(self.corpus, TOTALS))}"
        return ReadOnce(self.out / f"seed-{seed}", params, seed, corpus, made_of, files)


# The parts -----------------------------------------------------------------------------------------------------------


def begin_work(work: Work) -> None:
    """Settles in OUT what the parts share: the settings, the tokenizer, the files to measure on."""
    settings = loads(dumps({"start": str(work.start), "corpus": work.corpus, **asdict(work.preset)}))
    path = work.out / "settings.json"
    if path.is_file():
        found = loads(path.read_text(encoding="utf-8"))
        differing = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        if differing:
            said = "; ".join(f"{key} {found.get(key)}, not {settings.get(key)}" for key in differing)
            raise ValueError(f"{work.out} was begun with {said}: give another --out, or the same settings")
    run = work.run(0)
    if work.start is None and not (work.out / "tokenizer.model").exists():
        texts = (source.text for source in run.sources(training=True))
        train_tokenizer(texts, work.preset.params["vocab_size"], work.out / "tokenizer.model")
    if not (work.out / "held_out.json").exists():
        held_out = run.sources(training=False) if run.files or run.corpus is None else read_sources(run.corpus)
        chosen = [{"path": source.path, "text": source.text} for source in choose_files(held_out, _FILES)]
        _write(work.out / "held_out.json", dumps(chosen))
    _write(path, dumps(settings, indent=1))


def do_part(work: Work, seed: int, part: str) -> bool:
    """A seed's start, or what follows under a condition and its figures. False where it was stopped before its end."""
    if part == START:
        return make_start(work, seed)
    condition = work.conditions[part]
    if condition.tuned and not fine_tune(work, seed, condition):
        return False
    figures_of(work, seed, condition)
    return True


def make_start(work: Work, seed: int) -> bool:
    """Trains what a seed's conditions start from, or links it, and encodes the rows that they share."""
    run = work.run(seed)
    origin = work.out if work.start is None else work.start
    if not run.tokenizer_path.exists():
        with replacing(run.tokenizer_path) as temporary:
            shutil.copyfile(origin / "tokenizer.model", temporary)
    if work.start is not None:
        if not (run.folder / START).exists():
            (run.folder / START).symlink_to((work.start / START).resolve(), target_is_directory=True)
    elif not train_stage(_base_stage(work), run, steps=work.preset.base_steps):
        return False
    prepare(_tuned_stage(work, ROWS, 1.0), run, None, work.preset.tuned_steps, None, ALONE)
    return True


def fine_tune(work: Work, seed: int, condition: Condition) -> bool:
    """Goes on from the start under a condition. The scheme is one of the run's parameters here, as theta is the
    stage's."""
    run = work.run(seed)
    folder = run.folder / condition.name
    for name in _TOKEN_FILES:
        if not (folder / name).exists():
            with replacing(folder / name) as temporary:
                shutil.copyfile(run.folder / ROWS / name, temporary)
    scaled = replace(run, params={**run.params, "rope_scaling": condition.rope_scaling})
    stage = _tuned_stage(work, condition.name, condition.rope_theta)
    return train_stage(stage, scaled, steps=work.preset.tuned_steps)


def _base_stage(work: Work) -> Stage:
    """Half plain code, half texts with keys; nothing else to learn for a model this small."""
    preset, (length, theta) = work.preset, work.base
    training = TrainingConfig(
        steps=preset.base_steps,
        rows_per_step=preset.tokens_a_step // length,
        rows_at_once=max(1, _AT_ONCE // length),
        peak_lr=preset.base_lr,
        warmup_steps=min(100, preset.base_steps // 2),
        steps_between_evaluations=max(1, preset.base_steps // 4),
    )
    return Stage(START, None, True, length, theta, Mixture(infilling=0.0, keys=preset.keys), training, minutes=0)


def _tuned_stage(work: Work, name: str, theta: float) -> Stage:
    """Rows of the fine-tuned length, of what the start has read before."""
    preset, length = work.preset, work.tuned_length
    mixture = Mixture(infilling=0.0) if work.start is None else STAGES[START].mixture
    training = TrainingConfig(
        steps=preset.tuned_steps,
        rows_per_step=max(1, preset.tokens_a_step // length),
        rows_at_once=max(1, _AT_ONCE // length),
        peak_lr=preset.tuned_lr,
        final_lr=1.0,
        warmup_steps=min(10, preset.tuned_steps // 2),
        steps_between_evaluations=preset.tuned_steps,
    )
    return Stage(name, START, False, length, theta, replace(mixture, keys=preset.keys), training, minutes=0)


def figures_of(work: Work, seed: int, condition: Condition) -> dict[str, Figures]:
    """What a seed's model of a condition comes to: keys by length and depth, and the loss by position. Made once."""
    preset, run = work.preset, work.run(seed)
    folder = run.folder / (condition.name if condition.tuned else START) / "checkpoint"
    lengths = work.lengths
    held_out = work.out / "held_out.json"
    facts = {
        "checkpoint": digest(folder / "consolidated.00.pth"),
        "rope": [condition.rope_theta, condition.rope_scaling],
        "held_out": digest(held_out),
        "lengths": lengths,
        "seed": seed,
    }
    sources = [File(**file) for file in loads(held_out.read_text(encoding="utf-8"))]

    def build() -> Llama:
        rope: dict[str, Any] = {"rope_theta": condition.rope_theta, "rope_scaling": condition.rope_scaling}
        return Llama.build(folder, max_seq_len=max(lengths), max_batch_size=4, device="cpu", **rope)

    def keys() -> Figures:
        return asdict(retrieval_grid(build(), sources, lengths, preset.depths, preset.samples, seed, progress=True))

    def losses() -> Figures:
        bins, documents = preset.bins, preset.documents
        return asdict(loss_by_position(build(), sources, max(lengths), bins, documents, progress=True))

    how_many = {"keys": [preset.depths, preset.samples], "losses": [preset.bins, preset.documents]}
    return {
        name: measure(Measurement(condition.name, name, {**facts, name: how_many[name]}, make), run.folder / "figures")
        for name, make in (("keys", keys), ("losses", losses))
    }


# All of them ---------------------------------------------------------------------------------------------------------


def do_all(work: Work, processes: int) -> bool:
    """Every part, the starts first. Returns whether all are done; False where training was told to stop."""
    parts = list(work.conditions)
    with tqdm(total=work.preset.seeds * (1 + len(parts)), desc="parts", unit="part", mininterval=0) as bar:
        if processes > 1:
            with ProcessPoolExecutor(processes, get_context("spawn"), _settle_process, (work.out,)) as pool:
                return _side_by_side(work, pool, processes, bar)
        for seed in range(work.preset.seeds):
            for part in (START, *parts):
                bar.set_postfix_str(f"seed {seed}: {part}")
                if not do_part(work, seed, part):
                    return False
                bar.update()
    return True


def _side_by_side(work: Work, pool: ProcessPoolExecutor, processes: int, bar: tqdm[Any]) -> bool:
    """A seed's conditions wait for its start, and come after the other starts. No more is handed out than there are
    processes, so that what is told to stop has nothing left to take up."""
    todo = deque((seed, START) for seed in range(work.preset.seeds))
    running: dict[Future[bool], tuple[int, str]] = {}
    whole = True
    while todo or running:
        while todo and len(running) < processes:
            seed, part = todo.popleft()
            running[pool.submit(do_part, work, seed, part)] = seed, part
        bar.set_postfix_str(", ".join(f"seed {seed}: {part}" for seed, part in running.values()))
        for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
            seed, part = running.pop(future)
            if not future.result():
                whole = False
            elif part == START:
                todo.extend((seed, name) for name in work.conditions)
            bar.update(whole)
        if not whole:
            todo.clear()
    return whole


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _settle_process(out: Path) -> None:
    """One thread, and progress into a file: the bars of several processes would overwrite each other. It ends with the
    process that started it, however that does: two that write into one folder would spoil it."""
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    sys.stderr = open(out / "progress.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115  as long as the process


# What is written -----------------------------------------------------------------------------------------------------


def report(work: Work, name: str, page: Path, started: float) -> list[Verdict]:
    """Writes the page with its pictures, and OUT/reproduce.csv and .json; returns what became of the statements."""
    listed, table = list(work.conditions.values()), tables.table
    measured = {c.name: [figures_of(work, seed, c) for seed in range(work.preset.seeds)] for c in listed}
    findings = findings_of(measured, work.base[0], work.tuned_length)
    aims, orderings = judge(findings, AIMS), judge(findings, ORDERINGS)
    pictures = page.with_suffix("")
    if drawable():
        pages.draw_keys({c.title: pooled(measured[c.name]) for c in listed}, pictures / "retrieval.png")
        pages.draw_losses(findings, listed, pictures / "perplexity.png")
        pages.draw_expectation(findings, listed, pictures / "expectation.png")
    minutes = _minutes(work, measured)
    pages.write(
        page,
        {
            "preset": name,
            "commit": commit(),
            "folder": pictures.name,
            "origin": _origin(work),
            "parameters": _parameters(work),
            "base_length": findings.base_length,
            "tuned_length": findings.tuned_length,
            "conditions": len(listed),
            "tuned_steps": work.preset.tuned_steps,
            "tokens": work.preset.tokens_a_step,
            "seeds": work.preset.seeds,
            "of_start": ", each with a start of its own" if work.start is None else " that share one start",
            "training": minutes["training"],
            "measuring": minutes["measuring"],
            "samples": work.preset.samples,
            "sizes": pages.sizes(findings, work.base[1], work.raised, table),
            "aims": pages.verdicts("what this was made to reach", aims, table),
            "orderings": pages.verdicts("what the paper found", orderings, table),
            **pages.summary(findings, listed, table),
        },
    )
    made_of = {
        "preset": name,
        **{key: str(value) for key, value in asdict(work).items() if key in ("start", "corpus")},
        "settings": asdict(work.preset),
        "rope": {c.name: [c.rope_theta, c.rope_scaling] for c in listed},
        "minutes": minutes,
        "statements": [asdict(verdict) for verdict in (*aims, *orderings)],
    }
    save_record(Record("reproduce", list(tidy(measured, listed)), made_of), work.out, started)
    return [*aims, *orderings]


def _origin(work: Work) -> str:
    if work.start is not None:
        length, theta = work.base
        return f"The start is the base stage of a training run, {length:,} tokens long at θ {theta:,.4g}."
    preset = work.preset
    trained = (
        f"{preset.base_steps:,} steps of {preset.tokens_a_step:,} tokens, {preset.keys:.0%} of them texts with keys"
    )
    return f"The start is a model trained from nothing: {trained}."


def _parameters(work: Work) -> int:
    state = torch.load(work.run(0).folder / START / "state.pt", weights_only=True, map_location="cpu", mmap=True)
    return sum(weight.numel() for weight in state["model"].values())


def _minutes(work: Work, measured: Measured) -> dict[str, float]:
    """Of all processes together. A start that was there already is not counted."""
    trained = [name for name, condition in work.conditions.items() if condition.tuned]
    if work.start is None:
        trained.append(START)
    results = [work.run(seed).folder / name / "result.json" for seed in range(work.preset.seeds) for name in trained]
    seconds = sum(f["seconds"] for of_seeds in measured.values() for figures in of_seeds for f in figures.values())
    training = sum(loads(path.read_text(encoding="utf-8"))["minutes"] for path in results)
    return {"training": training, "measuring": seconds / 60}


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def command(
    *,
    out: Out,
    preset: Annotated[str, choice(PRESETS)] = "full",
    run: MaybePath = None,
    corpus: MaybePath = None,
    processes: MaybeCount = None,
    page: MaybePath = None,
    json: bool = False,
) -> None:
    """The paper's long-context ablation in miniature: trains, fine-tunes, measures, and writes a page about it.

    Stop it with Ctrl-C and give the same command again: it goes on where it was.

    Args:
        out: a folder for all it makes; OUT/reproduce.csv and .json have the figures.
        preset: full (within an hour on two free cores), or smoke (a minute, to see whether it works).
        run: a folder of `codellama train` whose base stage is to be the start (none: a start is trained).
        corpus: a folder made by `codellama train corpus` (none: the run's, or the standard library).
        processes: parts done side by side, each on one thread (none: as many as cores and seeds).
        page: the Markdown file to write; pictures go beside it (none: OUT/page.md).
        json: print JSON instead of the table.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this command starts processes of its own: give it without torchrun, with --processes N")
    start = None if run is None else Path(run)
    if start is not None and not (start / START / "result.json").is_file():
        raise ValueError(f"{start} has no finished stage {START}: give the folder that `codellama train` calls --work")
    whole_corpus(corpus)
    place = Path(out, "page.md") if page is None else Path(page)
    folder(str(place.parent))
    started, chosen = begin(out), PRESETS[preset]
    work = Work(Path(out), chosen, start, corpus)
    begin_work(work)
    if not do_all(work, processes or min(os.cpu_count() or 1, chosen.seeds)):
        print(f"Stopped; the same command continues in {out}.", file=sys.stderr)
        return
    found = report(work, preset, place, started)
    table = render(("statement", "here", "holds"), [(v.text, v.here, v.word.strip("*")) for v in found])
    values = {"measure": "reproduce", "out": out, "page": str(place), "statements": [asdict(v) for v in found]}
    tell(table, values, json)
