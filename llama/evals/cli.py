"""The room's commands: `codellama evals run`, `score` and `table` for the published benchmarks, and `compression`,
`positions`, `functions`, `lines`, `retrieval` and `exercises`.

Each of the latter builds a Llama, measures it on a folder of Python files, and prints a table for people or, with
--json, one line of JSON for programs. Under torchrun every rank measures; rank 0 prints.
"""

from __future__ import annotations

import hashlib
import json as jsons
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Unpack

from llama.evals import comparison, running
from llama.evals.benchmarks import BENCHMARKS, Benchmark, Protocol
from llama.evals.compression import compression
from llama.evals.datasets import fetch
from llama.evals.functions import complete_functions
from llama.evals.judging import Judge
from llama.evals.languages import LANGUAGES, Foreign, MultiPLE
from llama.evals.lines import Order, infill_lines
from llama.evals.positions import loss_by_position
from llama.evals.record import drawable, origin, picture, tell
from llama.evals.retrieval import DEPTHS, retrieval
from llama.evals.sandbox import Limits
from llama.evals.sources import Source, choose_files, read_folder
from llama.evals.table import number, percent, render
from llama.front import load as build
from llama.generation import Llama
from llama.options import (
    Amount,
    Count,
    Counts,
    Lengths,
    Loading,
    MaybeCount,
    MaybeOut,
    MaybePath,
    MaybeSources,
    MaybeText,
    Positional,
    Seed,
    Share,
    Shares,
    existing,
    nearest,
    numbers,
    spec,
    unset,
)
from llama.train.collection import TOTALS, read_documents
from llama.train.corpus import read_corpus
from llama.train.exercises import measure as exercises
from llama.train.report import chapter as chapters
from llama.verbs import server_of

ALL = {**BENCHMARKS, **{bench.name: bench for bench in MultiPLE.values()}}


def benchmark_names(word: str) -> tuple[str, ...]:
    """One benchmark, or several of a family: infilling:single-line,light."""
    family, colon, rest = word.partition(":")
    names = tuple(f"{family}:{part}" for part in rest.split(",")) if colon else (word,)
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(
                f"{name!r} is unknown{nearest(name, list(BENCHMARKS))} (there are {', '.join(BENCHMARKS)})"
            )
    return names


Benchmarks = Annotated[tuple[str, ...], spec("BENCHMARK", benchmark_names, ",".join)]
Data = Annotated[str | None, spec("FOLDER", existing), unset("downloaded into ~/.cache/codellama/evals")]
Existing = Annotated[str, spec("PATH", existing)]
MaybeTemperature = Annotated[
    float | None, numbers("X", (float, "at least", 0, 100), none=True), unset("0 for one sample, 0.8 for several")
]
PAGE = """# Evaluation

<!-- evals: table -->
<!-- end -->

## What made these figures

<!-- evals: details -->
<!-- end -->
"""


def read_sources(sources: str | None) -> list[Source]:
    """The held-out files of a corpus made by `codellama train corpus`; every .py file of any other folder; by default
    what `codellama train` holds out of the standard library."""
    if sources is None:
        return [source for source in read_corpus() if source.is_held_out]
    if Path(sources, TOTALS).is_file():
        return list(read_documents(sources, "heldout"))
    return list(read_folder(sources))


def compression_command(
    *,
    sources: MaybeSources = None,
    files: MaybeCount = None,
    stride: MaybeCount = None,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Bits per byte of whole files, beside `xz -9e`, in windows of --max_seq_len tokens.

    Args:
        sources: a folder of .py files, or a corpus.
        files: how many of them, chosen by a hash of their paths (none: all).
        stride: how many tokens apart the windows begin (none: half a window).
        json: print JSON instead of the table.
    """
    texts = choose_files(read_sources(sources), files)
    llama = build(**loading)
    found = compression(llama, texts, stride=stride, progress=True)
    rows = [
        ("model, bits per byte", number(found.bits_per_byte)),
        ("model, nats per token", number(found.nats_per_token)),
        ("xz -9e, bits per byte, each file", number(found.xz_bits_per_byte)),
        ("xz -9e, bits per byte, one archive", f"{found.solid_xz_bits_per_byte:.3f}"),
        ("model / xz, each file", number(found.of_xz)),
        ("model / xz, one archive", number(found.of_solid_xz)),
    ]
    values = asdict(found)
    sizes = values.pop("sizes")
    asked = {"sources": sources, **loading, **{name: sum(sizes[name]) for name in ("bytes", "tokens")}}
    _report(llama, "compression", render(("", f"{len(found.sizes.paths)} files"), rows), {**asked, **values}, json)


def positions_command(
    *,
    sources: MaybeSources = None,
    documents: MaybeCount = None,
    bins: Count = 16,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """The loss by position, up to --max_seq_len, of documents that have as many tokens.

    Args:
        sources: a folder of .py files, or a corpus.
        documents: how many of the documents that are long enough (none: all).
        bins: into how many parts the positions are divided.
        json: print JSON instead of the table.
    """
    texts = read_sources(sources)
    llama = build(**loading)
    found = loss_by_position(llama, texts, bins=bins, documents=documents, progress=True)
    rows = [(f"{b.start}–{b.end - 1}", number(b.nats_per_token), number(b.bits_per_byte)) for b in found.bins]
    header = (f"{len(found.documents)} documents", "nats per token", "bits per byte")
    values = {"sources": sources, **loading, **asdict(found)}
    _report(llama, "positions", render(header, rows), values, json)


def functions_command(
    *,
    sources: MaybeSources = None,
    samples: Count = 200,
    max_gen_len: Count = 256,
    seed: Seed = 0,
    show: Amount = 0,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """The share of held-out function heads that the model completes to something that parses.

    Args:
        sources: a folder of .py files, or a corpus.
        samples: how many functions, chosen by a hash.
        max_gen_len: tokens that a completion may take.
        seed: of the choice.
        show: how many of the completions to print above the table.
        json: print JSON instead of the table.
    """
    texts = read_sources(sources)
    limits: Loading = {"max_seq_len": 2 * max_gen_len, **loading}
    llama = build(**limits)
    found = complete_functions(llama, texts, samples, max_gen_len, seed, progress=True)
    shown = ""
    for sample in found.samples[:show]:
        verdict = "parses" if sample.parses else "does not parse"
        shown += f"# {sample.head.path}: {verdict}\n{sample.head.prompt}{sample.text}\n\n"
    rows = [("parses", percent(found.parsed)), ("comes to its end", percent(found.ended))]
    table = render(("", f"{found.parsed.n} functions"), rows)
    values = {"max_gen_len": max_gen_len, "seed": seed, "parsed": asdict(found.parsed), "ended": asdict(found.ended)}
    _report(llama, "functions", shown + table, {"sources": sources, **loading, **values}, json)


def lines_command(
    *,
    sources: MaybeSources = None,
    samples: Count = 500,
    order: Order = "psm",
    seed: Seed = 0,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """The share of held-out lines that the model fills in exactly, given the file around them.

    Args:
        sources: a folder of .py files, or a corpus.
        samples: how many lines, chosen by a hash.
        order: psm (prefix first), spm (suffix first), or none (a completion that doesn't know of the suffix).
        seed: of the choice.
        json: print JSON instead of the table.
    """
    texts = read_sources(sources)
    llama = build(**loading)
    found = infill_lines(llama, texts, samples, order=order, seed=seed, progress=True)
    rows = [("exact match", percent(found.exact)), ("first line matches", percent(found.first_line))]
    values = {"order": order, "seed": seed, "exact": asdict(found.exact), "first_line": asdict(found.first_line)}
    table = render((order, f"{found.exact.n} lines"), rows)
    _report(llama, "lines", table, {"sources": sources, **loading, **values}, json)


def retrieval_command(
    *,
    sources: MaybeSources = None,
    lengths: Lengths = (512,),
    depths: Shares = DEPTHS,
    samples: Count = 64,
    seed: Seed = 0,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Key retrieval: the share of two-digit numbers found again, by the prompt's length and the number's depth.

    Args:
        sources: a folder of .py files, or a corpus.
        lengths: tokens of prompt and answer: 512,1024,2048.
        depths: where the number stands, from 0 (first) to 1 (last): 0,0.25,0.5.
        samples: prompts for each length and depth.
        seed: of prompts and numbers.
        json: print JSON instead of the table.
    """
    texts = read_sources(sources)
    limits: Loading = {"max_seq_len": max(lengths, default=512), **loading}
    llama = build(**limits)
    found = retrieval(llama, texts, lengths, depths, samples, seed, progress=True)
    cells = {(cell.length, cell.depth): percent(cell.found) for cell in found.cells}
    rows = [(length, *(cells[length, depth] for depth in found.depths)) for length in found.lengths]
    header = ("length \\ depth", *(f"{depth:g}" for depth in found.depths))
    values = {"sources": sources, **loading, "samples": samples, "seed": seed, **asdict(found)}
    _report(llama, "retrieval", render(header, rows), values, json)


def exercises_command(
    *,
    samples: Count = 200,
    seed: Seed = 0,
    show: Amount = 0,
    chapter: MaybePath = None,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """What a checkpoint makes of the world of exercises: code that it writes is run against tests, in a sandbox.

    Args:
        samples: held-out compositions for each measure; of classics all are asked for.
        seed: of the choice.
        show: how many of the failures of each measure to print above the table.
        chapter: a Markdown file whose block `<!-- exercises: table -->` is to be filled.
        json: print JSON instead of the table.
    """
    if chapter is not None:
        chapters.require(Path(chapter))
    limits: Loading = {"max_batch_size": 16, **loading}
    llama = build(**limits)
    found = exercises.measure(llama, samples, f"measure {seed}", progress=True)
    shown = "".join(
        f"# {name}: {sample['name']}: {sample['error']}\n{sample['prompt']}\n>>> {sample['text']}\n\n"
        for name, figures in found.items()
        for sample in [s for s in figures["samples"] if not s["passed"]][:show]
    )
    table = exercises.table(found)
    if chapter is not None and llama.ranks.leads:
        chapters.fill(Path(chapter), {"table": table}, "exercises")
    _report(llama, "exercises", shown + table, {"seed": seed, **loading, "found": found}, json)


# Published benchmarks -----------------------------------------------------------------------------------------------


def score_command(
    benchmark: Positional[Benchmarks],
    samples: Positional[Existing],
    *,
    data: Data = None,
    out: MaybeOut = None,
    ks: Counts = (1, 10, 100),
    workers: MaybeCount = None,
    unsafe_without_sandbox: bool = False,
    json: bool = False,
) -> None:
    """Runs samples made elsewhere against a benchmark's tests, in a sandbox: pass@k, and what went wrong.

    Args:
        benchmark: humaneval, mbpp, infilling:single-line (multi-line, random-span, light), or multiple:cpp (java, php,
            ts, js, cs, sh).
        samples: a JSONL file; each line has a task_id and a completion, which is what follows the prompt (of MBPP: the
            code).
        data: a folder with the benchmark's file.
        out: where verdicts.jsonl and results.json go (none: a folder beside SAMPLES, of its name and -scored).
        ks: k of pass@k.
        workers: programs that are judged at once (none: one for each processor).
        unsafe_without_sandbox: run the programs even where the system can't lock them in. They can then do what you
            can.
        json: print JSON instead of the table.
    """
    began, path = time.monotonic(), Path(samples)
    if len(benchmark) != 1:
        raise ValueError(f"{','.join(benchmark)} are several benchmarks: samples belong to one")
    bench = ALL[benchmark[0]]
    chosen, _, rows = bench.read(data)
    tasks = {task.id: task for task in chosen}
    given = list(running.read_samples(path, tasks))
    if not given:
        raise ValueError(f"{samples} has no samples: give a JSON object with task_id and completion a line")
    place = Path(out) if out is not None else path.with_name(f"{path.name.partition('.')[0]}-scored")
    (place / "verdicts.jsonl").unlink(missing_ok=True)
    with judge_of(bench, data, workers, unsafe_without_sandbox) as judge:
        verdicts = running.judge_samples(place, bench, tasks, given, judge)
    made = {
        "benchmark": bench.name, "protocol": "given samples", "name": path.name, "samples_file": str(path),
        "dataset": rows.sha256, "dataset_is_known": rows.is_known, "sandbox": judge.layers, "of_tasks": len(tasks),
        **origin(), **running.figures(verdicts, ks, tasks), "seconds": running.stamp(began),
    }  # fmt: skip
    running.save(place, made)
    if missing := len(tasks) - made["tasks"]:
        made["missing"] = missing
    _tell_results([{**made, "folder": str(place)}], json)


def run_command(
    benchmark: Positional[Benchmarks],
    *,
    protocol: MaybeText = None,
    samples: Count = 1,
    temperature: MaybeTemperature = None,
    top_p: Share = 0.95,
    ks: Counts = (1, 10, 100),
    limit: MaybeCount = None,
    max_gen_len: MaybeCount = None,
    seed: Seed = 1,
    data: Data = None,
    out: MaybeOut = None,
    server: MaybeText = None,
    workers: MaybeCount = None,
    unsafe_without_sandbox: bool = False,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Asks a checkpoint for a benchmark's tasks and runs what it writes against their tests, in a sandbox: pass@k.

    A run that was ended goes on where it stopped when the same command is given again.

    Args:
        benchmark: humaneval, mbpp, infilling:single-line,multi-line,random-span,light, or
            multiple:cpp,java,php,ts,js,cs,sh.
        protocol: how the model is asked (none: as in the paper). There are paper, bigcode, evalplus and stripped of
            humaneval; paper, instruct and bigcode of mbpp; psm and spm of infilling.
        samples: of each task.
        temperature: how much chance there is in each choice.
        top_p: draw from the likeliest tokens that have this share of the probability.
        ks: k of pass@k; those above --samples are left out.
        limit: only so many tasks, the first.
        max_gen_len: tokens of an answer at most (none: the protocol's, 512).
        seed: every sample gets a seed of its own from it, its task and its number.
        data: a folder with the benchmark's file.
        out: a folder for results; each benchmark gets one in it (none: codellama-evals).
        server: the address of a running `codellama serve`, or of another server of OpenAI's API, to write the samples.
        workers: programs that are judged at once (none: one for each processor).
        unsafe_without_sandbox: run the programs even where the system can't lock them in. They can then do what you
            can.
        json: print JSON instead of the table.
    """
    rows = loading.get("max_batch_size", 16)
    protocols = {name: protocol_of(ALL[name], protocol) for name in benchmark}
    read = {name: ALL[name].read(data) for name in benchmark}
    llama, model, name = None, dict[str, Any](), ""
    if server is not None:
        found = server_of(server, loading, None, None)
        write, name = running.by_server(found, 16), found.model
        model = {"server": found.url, "model": found.model}
    else:
        from llama.longcontext.saved_cache import digest

        limits: Loading = {"max_seq_len": 2048, "max_batch_size": rows, **loading}
        llama = build(**limits)
        weights = digest({**dict(llama.model.named_parameters()), **dict(llama.model.named_buffers())})
        weights = llama.ranks.broadcast_object(weights)
        write, name = running.by_llama(llama), Path(loading.get("ckpt_dir", "embedded checkpoint")).name
        model = {"weights": weights, "dtype": str(llama.model.norm.weight.dtype).removeprefix("torch.")}
    warm = (0.0 if samples == 1 else 0.8) if temperature is None else temperature
    results = []
    for bench in map(ALL.__getitem__, benchmark):
        began, (word, how), (tasks, every, file) = time.monotonic(), protocols[bench.name], read[bench.name]
        tasks = tasks[:limit]
        asked = running.Asked(
            bench.name, word, how.source, samples, warm, top_p, seed, max_gen_len or how.max_gen_len, len(tasks),
            file.sha256, model,
        )  # fmt: skip
        place = _place(out, asked)
        leads, share = (
            (True, lambda value: value) if llama is None else (llama.ranks.leads, llama.ranks.broadcast_object)
        )
        if leads:
            running.begin(place, asked)
        with judge_of(bench, data, workers, unsafe_without_sandbox) as judge:  # or it refuses
            running.generate(place, running.questions(tasks, every, how, asked), how, asked, write, leads, share)
            if not leads:
                continue
            written, by_id = running.stamp(began), {task.id: task for task in tasks}
            lines = running.lines(place / "samples.jsonl")
            verdicts = running.judge_samples(place, bench, by_id, lines, judge)
        made = {
            **origin(llama), **asdict(asked), "model_asked": model, "name": name, "max_batch_size": rows,
            "loading": dict(loading), "dataset_is_known": file.is_known, "sandbox": judge.layers,
            "seconds_of_generation": written, "tokens": sum(line["tokens"] or 0 for line in lines),
            **running.figures(verdicts, ks, by_id), "seconds": running.stamp(began),
        }  # fmt: skip
        running.save(place, made)
        results.append({**made, "folder": str(place)})
    if results:
        _tell_results(results, json)


def judge_of(bench: Benchmark, data: str | None, workers: int | None, unsafe: bool) -> Judge | Foreign:
    """What judges a benchmark's programs. ValueError, before anything is generated, where nothing here can."""
    family, _, word = bench.name.partition(":")
    if family == "multiple":
        return Foreign(word, [fetch(needed, data) for needed in LANGUAGES[word].needs], workers)
    return Judge(Limits(seconds=bench.seconds), workers, unsafe=unsafe)


def protocol_of(bench: Benchmark, word: str | None) -> tuple[str, Protocol]:
    known = list(bench.protocols)
    word = known[0] if word is None else word
    if word not in known:
        raise ValueError(
            f"--protocol {word!r} is unknown{nearest(word, known)} (of {bench.name} there are {', '.join(known)})"
        )
    return word, bench.protocols[word]


def _place(out: str | None, asked: running.Asked) -> Path:
    """OUT/BENCHMARK; by default in a folder that is named after what is asked, so that no two runs meet."""
    name = asked.benchmark.replace(":", "-")
    if out is not None:
        return Path(out) / name
    digest = hashlib.sha256(jsons.dumps(asdict(asked), sort_keys=True).encode()).hexdigest()
    return Path("codellama-evals") / f"{name}-{digest[:10]}"


def _tell_results(results: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    lines = []
    for result in results:
        header = [f"{result['benchmark']}, {result['protocol']}", "of", "95 % interval", "value"]
        names = [name for name in result if name.startswith("pass@") or name == "exact match"]
        cells = [
            (
                name,
                result[name]["n"],
                f"{result[name]['low']:.1%}–{result[name]['high']:.1%}",
                f"{result[name]['value']:.1%}",
            )
            for name in names
        ]
        lines.append(render(header, cells))
        wrong = ", ".join(f"{n} {error}" for error, n in result["errors"].items())
        lines.append(f"{result['samples']} samples of {result['tasks']} tasks" + (f"; wrong: {wrong}" if wrong else ""))
        if result.get("missing"):
            lines.append(f"{result['missing']} tasks have no sample, and are not counted")
        lines.append(f"sandbox: {', '.join(result['sandbox'])}; in {result['folder']}\n")
    tell("\n".join(lines).rstrip(), {"results": list(results)}, as_json)


def table_command(
    folders: Positional[tuple[Existing, ...]],
    *,
    published: bool = True,
    page: MaybePath = None,
    json: bool = False,
) -> None:
    """Lays results side by side with the paper's figures, and those of the blog's leaderboard.

    Args:
        folders: what `codellama evals run` or `score` wrote.
        published: show the figures of others.
        page: a Markdown file whose blocks `<!-- evals: table -->` and `<!-- evals: details -->` are filled (it is made
            if it isn't there), with a picture beside it.
        json: print JSON instead of the table.
    """
    if not folders:
        raise ValueError("no folder is given: give one that `codellama evals run` or `score` wrote")
    results = comparison.read_results(folders)
    if page is not None:
        path = Path(page)
        if not path.is_file():
            path.write_text(PAGE, encoding="utf-8")
        table = comparison.markdown(results)
        if drawable():
            drawn = path.with_suffix(".png")
            with picture(drawn, 10, 6) as figure:
                comparison.draw(figure, results)
            table += f"\n\n![pass@1 beside published figures]({drawn.name})"
        chapters.fill(path, {"table": table, "details": comparison.details(results)}, "evals")
    tell(render(comparison.HEADER, list(comparison.rows(results, published))), {"results": results}, json)


def _report(llama: Llama, measure: str, table: str, values: Mapping[str, Any], as_json: bool) -> None:
    if llama.ranks.leads:
        limits = {"max_seq_len": llama.model.args.max_seq_len, "dtype": str(llama.model.norm.weight.dtype)}
        tell(table, {"measure": measure, **limits, **values}, as_json)


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run_command,
    "score": score_command,
    "table": table_command,
    "compression": compression_command,
    "positions": positions_command,
    "functions": functions_command,
    "lines": lines_command,
    "retrieval": retrieval_command,
    "exercises": exercises_command,
}
