"""From the figures of every model to what they say together: rows of a table, grids of all seeds, findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama.evals.intervals import share
from llama.evals.retrieval import Cell, Retrieval
from llama.longcontext.reproduce.conditions import Condition
from llama.longcontext.reproduce.statements import Findings

Measured = Mapping[str, Sequence[Mapping[str, dict[str, Any]]]]
"""By condition, for each seed: `keys`, a `llama.longcontext.retrieval.Grid`, and `losses`, the `Positions` of
`llama.evals.positions`, as JSON has them."""


def findings_of(measured: Measured, base_length: int, tuned_length: int) -> Findings:
    """What statements are checked against."""
    keys: dict[str, dict[tuple[int, float], list[float]]] = {}
    nats: dict[str, list[list[float]]] = {}
    bins: list[tuple[int, int]] = []
    for name, of_seeds in measured.items():
        keys[name] = {}
        for figures in of_seeds:
            for cell in figures["keys"]["found"]["cells"]:
                keys[name].setdefault((cell["length"], cell["depth"]), []).append(cell["found"]["rate"])
        nats[name] = [[each["nats_per_token"]["value"] for each in f["losses"]["bins"]] for f in of_seeds]
        bins = [(each["start"], each["end"]) for each in of_seeds[0]["losses"]["bins"]]
    return Findings(base_length, tuned_length, keys, nats, bins)


def tidy(measured: Measured, conditions: Sequence[Condition]) -> Iterator[dict[str, Any]]:
    """One figure a row, each seed by itself. A loss is that up to position `length` since the one before, and its n
    counts documents."""
    for condition in conditions:
        scaling = condition.rope_scaling or {"rope_type": "default"}
        rope = {
            "scheme": scaling["rope_type"],
            "theta": condition.rope_theta,
            "factor": scaling.get("factor", ""),
        }
        for seed, figures in enumerate(measured[condition.name]):
            base = {"condition": condition.name, "seed": seed, "tuned": condition.tuned, **rope}
            for cell in figures["keys"]["found"]["cells"]:
                place = {"length": cell["length"], "depth": cell["depth"], "metric": "found"}
                yield {**base, **place, **_figure(cell["found"], "rate")}
            for each in figures["losses"]["bins"]:
                place = {"length": each["end"], "depth": "", "metric": "nats_per_token"}
                yield {**base, **place, **_figure(each["nats_per_token"], "value")}


def _figure(found: Mapping[str, Any], value: str) -> dict[str, Any]:
    return {"n": found["n"], "value": found[value], "low": found["low"], "high": found["high"]}


def pooled(of_seeds: Sequence[Mapping[str, dict[str, Any]]]) -> Retrieval:
    """The grids of all seeds as one."""
    grids = [figures["keys"]["found"] for figures in of_seeds]
    cells = []
    for same in zip(*(grid["cells"] for grid in grids), strict=True):
        hits, n = (sum(cell["found"][key] for cell in same) for key in ("hits", "n"))
        tokens = sum(cell["tokens"] for cell in same) / len(same)
        cells.append(Cell(same[0]["length"], same[0]["depth"], share(hits, n), tokens))
    return Retrieval(tuple(grids[0]["lengths"]), tuple(grids[0]["depths"]), tuple(cells))
