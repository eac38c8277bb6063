"""Results side by side with what others have published: a table, a picture, a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.evals.published import PUBLISHED, Published

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KS = ("pass@1", "pass@10", "pass@100")


def read_results(folders: Sequence[str]) -> list[dict[str, Any]]:
    """The results in some folders and those below them, by benchmark. ValueError for a folder that has none."""
    found = []
    for folder in folders:
        paths = sorted(Path(folder).rglob("results.json"))
        if not paths:
            raise ValueError(f"{folder} has no results.json: give a folder that `codellama evals run` or `score` wrote")
        found += [{**json.loads(path.read_text(encoding="utf-8")), "folder": str(path.parent)} for path in paths]
    return sorted(found, key=lambda result: str(result["benchmark"]))


def others(benchmark: str, protocol: str) -> list[Published]:
    """What is published of a benchmark: for infilling of the same order."""
    return [
        p for p in PUBLISHED if p.benchmark == benchmark and (":" not in benchmark or p.protocol in (protocol, "blog"))
    ]


def rows(results: Sequence[dict[str, Any]], published: bool = True) -> Iterator[tuple[str, ...]]:
    """Benchmark, model, a figure for each k, and what stands behind it."""
    for bench in dict.fromkeys(str(result["benchmark"]) for result in results):
        own = [result for result in results if result["benchmark"] == bench]
        for result in own:
            cells = [interval(result.get(k)) for k in KS]
            how = f"{result['protocol']}, {result['tasks']} tasks, {result['samples']} samples"
            yield bench, f"**{name_of(result)}**", *cells, how
        if published:
            for protocol in dict.fromkeys(str(result["protocol"]) for result in own):
                for other in others(bench, protocol):
                    cells = [f"{other.figures[k]:.1f}" if k in other.figures else "" for k in KS]
                    yield bench, other.model, *cells, other.source


def name_of(result: dict[str, Any]) -> str:
    return str(result.get("name") or Path(str(result["folder"])).name)


def interval(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['value']:.1%} ({found['low']:.1%}–{found['high']:.1%})"


HEADER = ("benchmark", "model", *KS, "how, or source")


def markdown(results: Sequence[dict[str, Any]]) -> str:
    table = [HEADER, ("---",) * len(HEADER), *dict.fromkeys(rows(results))]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def details(results: Sequence[dict[str, Any]]) -> str:
    """A line for each run: what made it."""
    told = []
    for result in results:
        made = {
            "protocol": f"{result['protocol']} ({result.get('source', '')})",
            "errors": ", ".join(f"{n} {error}" for error, n in result["errors"].items()) or "none",
            "dtype": result.get("dtype"), "device": result.get("device"), "rows": result.get("max_batch_size"),
            "seed": result.get("seed"), "commit": result.get("commit"), "at": result.get("at"),
            "weights": (result.get("model_asked") or {}).get("weights"),
            "dataset SHA-256": result.get("dataset"), "sandbox": ", ".join(result.get("sandbox", ())),
            "seconds": result.get("seconds"), "exact match": interval(result.get("exact match")) or None,
        }  # fmt: skip
        facts = "; ".join(f"{name} {value}" for name, value in made.items() if value is not None)
        told.append(f"- **{result['benchmark']}**, {name_of(result)}: {facts}")
    return "\n".join(told)


def draw(figure: Figure, results: Sequence[dict[str, Any]]) -> None:
    """A bar for each model, a panel for each benchmark: pass@1; ours with their intervals."""
    benches = list(dict.fromkeys(str(result["benchmark"]) for result in results))
    panels = figure.subplots(1, len(benches), squeeze=False)[0]
    for panel, bench in zip(panels, benches, strict=True):
        own = [result for result in results if result["benchmark"] == bench and "pass@1" in result]
        known = [other for other in others(bench, str(own[0]["protocol"])) if other.protocol != "blog"] if own else []
        names = [other.model for other in known] + [name_of(result) for result in own]
        values = [other.figures["pass@1"] for other in known] + [100 * result["pass@1"]["value"] for result in own]
        low = [0.0] * len(known) + [100 * (r["pass@1"]["value"] - r["pass@1"]["low"]) for r in own]
        high = [0.0] * len(known) + [100 * (r["pass@1"]["high"] - r["pass@1"]["value"]) for r in own]
        colours = ["#9db4c8"] * len(known) + ["#c8553d"] * len(own)
        panel.barh(range(len(names)), values, color=colours, xerr=[low, high], error_kw={"capsize": 2})
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.set_xlabel("pass@1, percent")
        panel.set_title(bench)
