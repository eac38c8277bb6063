"""The length x depth grid: models that know everything, nothing, or what is near; and a cache that changes nothing."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fixtures_text import Spy, training_texts
from llama.evals.intervals import share
from llama.evals.retrieval import DEPTHS, DIGITS, Cell, Retrieval, retrieval
from llama.evals.sources import File
from llama.generation import Llama
from llama.longcontext.retrieval import command, effective_length, retrieval_grid, retrieval_in_order
from llama.lookup import agreeing
from llama.tokenizer import Tokenizer

SOURCES = [File(f"{i}.py", text) for i, text in enumerate(training_texts())]


def key_of(text: str) -> str | None:
    found = re.search(r"def my_function\(\) -> int:\n(?:.*\n)*?    return (\d\d)\n", text)
    return found[1] if found else None


def hits(found: Retrieval) -> dict[tuple[int, float], int]:
    return {(cell.length, cell.depth): cell.found.hits for cell in found.cells}


def grid_of(rates: dict[tuple[int, float], int], n: int = 100) -> Retrieval:
    lengths, depths = sorted({length for length, _ in rates}), sorted({depth for _, depth in rates})
    cells = tuple(Cell(length, depth, share(found, n), length) for (length, depth), found in rates.items())
    return Retrieval(tuple(lengths), tuple(depths), cells)


# --- scripted models: answers must find their way back to their cells, in whatever order they were asked ------------


def test_model_that_knows_finds_every_key(tokenizer: Tokenizer) -> None:
    def complete(prompts: Sequence[str]) -> list[str]:
        return [f" {key_of(prompt)}\n" for prompt in prompts]

    found = retrieval_in_order(complete, tokenizer, SOURCES, (512, 1024), samples=4)
    assert hits(found) == {(length, depth): 4 for length in (512, 1024) for depth in DEPTHS}
    assert effective_length(found) == 1024


def test_model_that_guesses_finds_what_chance_gives(tokenizer: Tokenizer) -> None:
    """One number of ninety: of 4 x 40 keys, more than 8 would be one time in a thousand."""
    found = retrieval_in_order(lambda prompts: ["42"] * len(prompts), tokenizer, SOURCES, [512], samples=40)
    assert sum(hits(found).values()) <= 8
    assert effective_length(found) is None


def test_model_that_sees_a_window_finds_the_keys_inside_it(tokenizer: Tokenizer) -> None:
    """An answer that went to another depth of its sample, or to another sample, would show here."""

    def complete(prompts: Sequence[str]) -> list[str]:
        seen = [tokenizer.decode(tokenizer.encode(prompt, bos=False, eos=False)[-400:]) for prompt in prompts]
        return [key_of(text) or "00" for text in seen]

    found = retrieval_in_order(complete, tokenizer, SOURCES, (384, 1024), (0.0, 0.5, 1.0), samples=5)
    within, beyond = {(384, 0.0): 5, (384, 0.5): 5, (384, 1.0): 5}, {(1024, 0.0): 0, (1024, 0.5): 0, (1024, 1.0): 5}
    assert hits(found) == {**within, **beyond}
    assert effective_length(found) == 384


def test_prompts_that_begin_alike_follow_each_other_and_none_is_asked_twice(tokenizer: Tokenizer) -> None:
    """Else the cache would hold another sample's text: sharing is with the neighbour alone."""
    asked: list[str] = []

    def complete(prompts: Sequence[str]) -> list[str]:
        asked.extend(prompts)
        return ["42"] * len(prompts)

    retrieval_in_order(complete, tokenizer, SOURCES, [512], (0.0, 0.5, 0.75, 0.751), samples=3)
    assert len(set(asked)) == len(asked) < 12  # 0.75 and 0.751 are the same place
    ids = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in asked]
    neighbours = sum(agreeing(a, b) for a, b in pairwise(ids))
    best = sum(max(agreeing(a, b) for b in ids if b is not a) for a in ids)
    assert neighbours >= best / 2  # of each pair, the second finds the first's
    assert neighbours > 3 * 200  # of each sample, half a prompt


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tiny_checkpoint: Path) -> Llama:
    return Llama.build(tiny_checkpoint, max_seq_len=512, max_batch_size=2, device="cpu", prefill_chunk=100)


def test_reading_only_what_differs_gives_the_same_answers(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a random model nearly all answers are wrong, so the texts are compared, not the hits."""
    answers: dict[str, str] = {}
    stream = llama.stream

    def noting(prompts: Any, *args: Any, **settings: Any) -> Any:
        events = list(stream(prompts, *args, **settings))
        answers[llama.tokenizer.decode(prompts[0].tokens)] = "".join(event.text for event in events)
        return iter(events)

    asked: dict[str, Any] = {"lengths": (256, 512), "depths": (0.0, 0.4, 0.8), "samples": 3}
    with monkeypatch.context() as watched:
        watched.setattr(llama, "stream", noting)
        grid = retrieval_grid(llama, SOURCES, **asked)
    assert len(answers) == grid.prompts >= 15
    whole = llama.text_completion([*answers], temperature=0.0, max_gen_len=DIGITS, reuse=False)
    assert list(answers.values()) == [one["generation"] for one in whole]
    assert grid.found == retrieval(llama, SOURCES, **asked)
    assert grid.tokens_read < grid.prompt_tokens


def test_tokens_that_are_said_to_be_read_are_those_that_were(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(llama, monkeypatch)
    grid = retrieval_grid(llama, SOURCES, [512], depths=(0.0, 0.4, 0.8), samples=3)
    read = sum(rows * tokens for rows, tokens in spy.read)
    # Beside the prompts' tokens, the first of the two that answer each was read.
    assert grid.tokens_read <= read <= grid.tokens_read + (DIGITS - 1) * grid.prompts
    assert 0.7 * grid.prompt_tokens < grid.tokens_read < 0.95 * grid.prompt_tokens


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_effective_length_is_the_largest_whose_depths_together_reach_the_bar() -> None:
    lucky = {(128, 0.0): 100, (128, 0.5): 100, (256, 0.0): 50, (256, 0.5): 100, (512, 0.0): 72, (512, 0.5): 100}
    assert effective_length(grid_of(lucky)) == 512  # 86 %
    assert effective_length(grid_of({**lucky, (512, 0.0): 71})) == 128  # 85.5 %
    assert effective_length(grid_of({(128, 0.0): 85})) is None


def test_command_leaves_a_table_its_making_and_a_picture(
    tiny_checkpoint: Path, tmp_path: Path, told: list[Any]
) -> None:
    sources = tmp_path / "code"
    sources.mkdir()
    for file in SOURCES:
        (sources / file.path).write_text(file.text, encoding="utf-8")
    scaling = {"rope_type": "linear", "factor": 2.0}
    command(
        out=f"{tmp_path}/out", sources=str(sources), lengths=(256, 384), depths=(0.0, 0.5), samples=2,
        ckpt_dir=str(tiny_checkpoint), rope_scaling=scaling, device="cpu",
    )  # fmt: skip
    with open(tmp_path / "out" / "retrieval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["length"], row["depth"]) for row in rows] == [
        ("256", "0.0"), ("256", "0.5"), ("384", "0.0"), ("384", "0.5"),
    ]  # fmt: skip
    assert {(row["scheme"], row["factor"], row["metric"], row["n"]) for row in rows} == {
        ("linear", "2.0", "found", "2")
    }
    made_of = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert made_of["model"]["rope_scaling"] == scaling
    assert made_of["tokens_read"] < made_of["prompt_tokens"]
    assert "85.6%" in made_of["rule"]
    assert (tmp_path / "out" / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    [(table, last)] = told
    assert f"effective length {made_of['effective_length']}: " in table[-2]
    assert last["effective_length"] == made_of["effective_length"]
    assert len(last["rows"]) == 4


def test_length_beyond_the_model_is_refused_and_beyond_its_training_warned_of(llama: Llama) -> None:
    with pytest.raises(ValueError, match="a length of 513; this model was built for 512"):
        retrieval_grid(llama, SOURCES, [513])
    with pytest.warns(UserWarning, match="beyond the 256 that the model was trained on"):
        retrieval_grid(llama, SOURCES, [384], depths=[0.0], samples=1, trained=256)


def test_grid_of_nothing_is_refused(llama: Llama) -> None:
    with pytest.raises(ValueError, match="give at least one of each"):
        retrieval_grid(llama, SOURCES, [])
