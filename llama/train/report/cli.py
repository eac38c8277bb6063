"""`codellama train report` and `codellama train gaps`: the measures of the room `evals`, put to a run's checkpoints."""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from llama.evals.compression import Compression, compression, xz_bits
from llama.evals.functions import complete_functions
from llama.evals.instructions import answer_dialogs
from llama.evals.intervals import ratio, share
from llama.evals.lines import Order, infill_lines
from llama.evals.positions import loss_by_position
from llama.evals.record import begin, drawable
from llama.evals.retrieval import DEPTHS, Retrieval, retrieval
from llama.evals.sources import Source, choose, choose_files
from llama.front import load
from llama.generation import Llama
from llama.options import Count, MaybeOut, MaybePath, Out, Positional, Seed, choice, spec
from llama.prompts import Dialog, Message
from llama.train.card import write_card
from llama.train.collection import read_documents
from llama.train.documents import Turn, turns
from llama.train.loop import Workers
from llama.train.report import chapter as chapters
from llama.train.report import plots, tables
from llama.train.report.measurements import Figures, Measurement, measure
from llama.train.stages import SHAPES, STAGES, Result, Run, read_run, results, start_run, train_stage
from llama.train.tokenfile import digest

ROWS = 16
"""Prompts that are answered at once."""
SHOWN = 3
"""Of each kind of sample, how many the chapter shows."""


@dataclass(frozen=True)
class Amounts:
    """How much is measured; `files` are those of a sample that every stage is asked about."""

    files: int | None = 60
    all_files: int | None = None
    functions: int = 200
    lines: int = 500
    documents: int = 48
    keys: int = 32
    dialogs: int = 200


QUICK = Amounts(4, 4, 4, 4, 2, 1, 4)


def report(
    work: Positional[str],
    *,
    corpus: MaybePath = None,
    out: MaybeOut = None,
    chapter: MaybePath = None,
    gaps: MaybePath = None,
    quick: bool = False,
) -> None:
    """Measures every finished stage of a run on packages that were held out, and writes what came of it.

    Figures are kept in WORK/report, one file each, so a report that was stopped goes on where it was.

    Args:
        work: the run's folder, that is OUT.training.
        corpus: the corpus's folder (none: as the run has it).
        out: a folder with the last stage's checkpoint, whose MODEL_CARD.md is to be written anew.
        chapter: a Markdown file whose blocks `<!-- report: … -->` are to be filled; pictures go into a folder beside
            it, of its name without .md.
        gaps: what `codellama train gaps` left, for its table.
        quick: a handful of samples, to see whether it works.
    """
    if not Path(work, "run.json").is_file():
        raise ValueError(f"{work} holds no run: give the folder that `codellama train` calls --work, OUT.training")
    cost = _read_gaps(gaps)
    if chapter is not None:
        chapters.require(Path(chapter))
        begin(Path(chapter).with_suffix(""))
    run = read_run(Path(work))
    finished = results(run)
    source = corpus or run.corpus
    if source is None or not finished:
        raise ValueError(
            f"{work} has {len(finished)} finished stages, of the corpus {source}; give a run that has one, made with "
            "--corpus, or give its corpus"
        )
    held_out = list(read_documents(source, "heldout"))
    stages: tables.Stages = {}
    for measurement in measurements(run, finished, held_out, digest(Path(source, "corpus.json")), quick):
        print(f"{measurement.stage}: {measurement.name}", file=sys.stderr, flush=True)
        found = measure(measurement, run.folder / "report")
        stages.setdefault(measurement.stage, {})[measurement.name] = found
    blocks = describe(run, finished, stages, cost)
    if chapter is not None:
        if drawable():
            draw(run, stages, Path(chapter).with_suffix(""))
        chapters.fill(Path(chapter), blocks)
    if out is not None:
        write_card(Path(out, "MODEL_CARD.md"), run, finished, _MEASURED.format(**blocks))
    print(blocks["targets"])


_MEASURED = """\
On {files}, by the checkpoint as it lies here, in float32. `xz -9e` is given the same files. A share has its 95 %
interval. Written by `codellama train report`.

{targets}

{packages}
"""


def measurements(
    run: Run, finished: Sequence[Result], held_out: Sequence[Source], corpus: str, quick: bool
) -> list[Measurement]:
    """All that is measured, the stages in order. Every stage is asked the same."""
    amounts = QUICK if quick else Amounts()
    base, longest = finished[0].length, max(result.length for result in finished)
    asked: list[Measurement] = []
    for result in finished:
        folder = run.folder / result.stage / "checkpoint"
        trained = max(r.length for r in finished[: finished.index(result) + 1])
        makes = _makes(folder, held_out, base, longest, trained, amounts)
        if result is not finished[-1]:
            makes.pop("compression")
        if not STAGES[result.stage].mixture.dialogs:
            makes.pop("instructions")
        facts = {
            "checkpoint": digest(folder / "consolidated.00.pth"),
            "corpus": corpus,
            "amounts": asdict(amounts),
            "lengths": [base, longest, trained],
        }
        asked += [Measurement(result.stage, name, facts, make) for name, make in makes.items()]
    return asked


def _makes(
    folder: Path, held_out: Sequence[Source], base: int, longest: int, trained: int, amounts: Amounts
) -> dict[str, Callable[[], Figures]]:
    def build(length: int, rows: int = ROWS) -> Llama:
        return load(folder, max_seq_len=length, max_batch_size=rows, device="cpu", fast=True)

    # Long rows one at a time: a row of 4,096 fills two cores, and more of them only take memory.
    few = max(1, ROWS * base // longest)
    around = min(trained, 2 * base)
    return {
        "sample": lambda: _sizes(build(trained, few), choose_files(held_out, amounts.files)),
        "functions": lambda: _functions(build(2 * base), held_out, amounts.functions),
        "lines-psm": lambda: _lines(build(around), held_out, amounts.lines, "psm"),
        "lines-spm": lambda: _lines(build(around), held_out, amounts.lines, "spm"),
        "lines-none": lambda: _lines(build(around), held_out, amounts.lines, "none"),
        "positions": lambda: asdict(
            loss_by_position(build(longest, few), held_out, documents=amounts.documents, progress=True)
        ),
        "retrieval": lambda: _keys(build(longest, few), held_out, base, longest, amounts.keys),
        "instructions": lambda: _instructions(build(2 * base), held_out, amounts.dialogs),
        # Of all files, so windows follow each other without overlap: half as many as a sample's.
        "compression": lambda: _sizes(build(trained, few), choose_files(held_out, amounts.all_files), trained - 1),
    }


def _sizes(llama: Llama, files: Sequence[Source], stride: int | None = None) -> Figures:
    found = compression(llama, files, stride=stride, progress=True)
    figures = asdict(found)
    del figures["sizes"]
    by_package: defaultdict[str, list[int]] = defaultdict(list)
    for at, path in enumerate(found.sizes.paths):
        by_package[path.partition("/")[0]].append(at)
    texts = {source.path: source.text.encode() for source in files}
    packages = [_part(name, found, places, texts) for name, places in sorted(by_package.items())]
    everything = _part("all", found, range(len(found.sizes.paths)), texts)
    return {**figures, "packages": packages, "total": everything}


def _part(name: str, found: Compression, places: Sequence[int], texts: dict[str, bytes]) -> Figures:
    sizes = found.sizes
    return {
        "name": name,
        "files": len(places),
        "bytes": sum(sizes.bytes[at] for at in places),
        "model_bits": sum(sizes.model_bits[at] for at in places),
        "xz_bits": sum(sizes.xz_bits[at] for at in places),
        "solid_xz_bits": xz_bits(b"".join(texts[sizes.paths[at]] for at in places)),
    }


def _functions(llama: Llama, held_out: Sequence[Source], n: int) -> Figures:
    found = complete_functions(llama, held_out, n, max_gen_len=llama.model.args.max_seq_len // 2, progress=True)
    samples = [{"prompt": s.head.prompt, "text": s.text, "parses": s.parses} for s in found.samples[:SHOWN]]
    return {"parsed": asdict(found.parsed), "ended": asdict(found.ended), "samples": samples}


def _lines(llama: Llama, held_out: Sequence[Source], n: int, order: Order) -> Figures:
    found = infill_lines(llama, held_out, n, order=order, progress=True)
    return {
        "exact": asdict(found.exact),
        "first_line": asdict(found.first_line),
        "samples": [{"line": s.hole.line, "text": s.text} for s in found.samples[: 4 * SHOWN]],
    }


def _keys(llama: Llama, held_out: Sequence[Source], base: int, longest: int, n: int) -> Figures:
    middle = [2048] if base < 2048 < longest else []
    found = retrieval(llama, held_out, [base, *middle, longest], DEPTHS, n, progress=True)
    return {**asdict(found), "base": _of_length(found, base), "long": _of_length(found, longest)}


def _of_length(found: Retrieval, length: int) -> Figures:
    cells = [cell.found for cell in found.cells if cell.length == length]
    return asdict(share(sum(cell.hits for cell in cells), sum(cell.n for cell in cells)))


def _instructions(llama: Llama, held_out: Sequence[Source], n: int) -> Figures:
    asked = [turn for source in held_out for turn in turns(source.text, random.Random(source.path))]
    room = llama.model.args.max_seq_len // 2
    # A question that leaves no room for an answer is not put.
    asked = [turn for turn in asked if len(llama.tokenizer.encode(turn.question, bos=True, eos=False)) <= room]
    chosen = choose({turn.question: turn for turn in asked}.values(), n, lambda turn: turn.question)
    found = answer_dialogs(llama, [_dialog(turn) for turn in chosen], max_gen_len=room, progress=True)
    samples = [{"request": turn.request, "text": s.text} for turn, s in zip(chosen, found.samples, strict=True)]
    shares = {name: asdict(getattr(found, name)) for name in ("stopped", "parsed", "defined")}
    return {**shares, "samples": samples[:SHOWN]}


def _dialog(turn: Turn) -> Dialog:
    system: list[Message] = [Message(role="system", content=turn.system)] if turn.system else []
    return [*system, Message(role="user", content=turn.request)]


def describe(run: Run, finished: Sequence[Result], stages: tables.Stages, cost: Figures | None) -> dict[str, str]:
    """Every block that a chapter may have."""
    last = stages[finished[-1].stage]
    total = last["compression"]["total"]
    with_keys = {name: figures["retrieval"] for name, figures in stages.items()}
    return {
        "files": f"{len(last['compression']['packages'])} packages, {total['files']:,} files, {total['bytes']:,} bytes",
        "run": tables.run(finished),
        "targets": tables.targets(last),
        "stages": tables.by_stage(stages),
        "packages": tables.packages(last["compression"]),
        "keys": "\n\n".join(f"After {name}:\n\n{tables.keys(found)}" for name, found in with_keys.items()),
        "gaps": "Not measured." if cost is None else tables.gaps(cost),
        "functions": "\n\n".join(_code(s["prompt"] + s["text"]) for s in last["functions"]["samples"]),
        "lines": tables.table(
            ["the line", "what was filled in"],
            [[_cell(s["line"]), _cell(s["text"])] for s in last["lines-psm"]["samples"]],
        ),
        "answers": "\n\n".join(
            f"> {_quote(s['request'])}\n\n{_code(s['text'])}" for s in last.get("instructions", {}).get("samples", ())
        ),
    }


def _code(text: str) -> str:
    return f"````python\n{text.strip()}\n````"


def _cell(text: str) -> str:
    # A pipe would end the cell, and a backtick the code.
    return "`` " + text.strip().replace("\n", "⏎").replace("|", "\\|") + " ``" if text.strip() else ""


def _quote(text: str) -> str:
    return text.replace("\n", "\n> ")


def draw(run: Run, stages: tables.Stages, folder: Path) -> None:
    """Writes losses.png, positions.png, retrieval.png and packages.png."""
    last = list(stages)[-1]
    plots.losses({name: run.folder / name / "log.csv" for name in stages}, folder / "losses.png")
    base = STAGES[next(iter(stages))].length
    plots.positions({name: figures["positions"] for name, figures in stages.items()}, base, folder / "positions.png")
    plots.retrieval({name: figures["retrieval"] for name, figures in stages.items()}, folder / "retrieval.png")
    plots.packages(stages[last]["compression"], folder / "packages.png")


def gaps(
    out: Positional[Out],
    corpus: Positional[Annotated[str, spec("PATH", str)]],
    *,
    steps: Count = 500,
    files: Count = 100,
    shape: Annotated[str | None, choice(SHAPES)] = None,
    seed: Seed = 0,
) -> None:
    """What it costs to learn to fill gaps: stage base twice, without and with them, on as many tokens; on the CPU.

    Bits per byte are of whole held-out files, plain, in windows as long as the rows; the interval of the ratio is over
    files. Stopped with Ctrl-C, the same command continues. OUT/gaps.json has the figures.

    Args:
        out: a folder for the two runs.
        corpus: a folder made by `codellama train corpus`.
        steps: of each.
        files: how many held-out files to measure on.
        shape: the model's size (none: that of `codellama train all`).
        seed: of weights, gaps and order.
    """
    held_out = choose_files(list(read_documents(corpus, "heldout")), files)
    found: dict[str, Compression] = {}
    runs: dict[str, Any] = {}
    for name, stage in (("without gaps", "plain"), ("with gaps", "base")):
        run = start_run(Path(out, stage), shape, seed, corpus)
        if not train_stage(STAGES[stage], run, steps=steps, workers=Workers()):
            print(f"Stopped; the same command continues the runs in {out}.", file=sys.stderr)
            return
        (result,) = results(run)
        llama = Llama.build(
            run.folder / stage / "checkpoint", max_seq_len=result.length, max_batch_size=ROWS, device="cpu"
        )
        found[name] = compression(llama, held_out, progress=True)
        runs[name] = {
            "steps": result.steps,
            "tokens": result.tokens,
            "bits_per_byte": asdict(found[name].bits_per_byte),
        }
    plain, filled = (compressed.sizes.model_bits for compressed in found.values())
    figures = {"runs": runs, "ratio": asdict(ratio(filled, plain))}
    Path(out, "gaps.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(tables.gaps(figures))


def _read_gaps(folder: str | None) -> Figures | None:
    if folder is None:
        return None
    path = Path(folder, "gaps.json")
    if not path.is_file():
        raise ValueError(f"there is no {path}; make it with `codellama train gaps {folder} --corpus CORPUS`")
    figures: Figures = json.loads(path.read_text(encoding="utf-8"))
    return figures
