"""Prompt lookup's benchmark: the same text with guesses and without, and honest counts of what they brought."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timekeeping import Clock

from llama.bench.editing import Case, Watched, cases, editing, rename
from llama.bench.rounds import Timer
from llama.evals.sources import File
from llama.generation import Llama
from llama.model import Transformer
from llama.prompts import Prompt

ROOM = 128  # tokens that tiny_llama was built for


@pytest.fixture(scope="module")
def sources() -> list[File]:
    library = Path(os.__file__).parent
    return [File(name, (library / name).read_text(encoding="utf-8")) for name in ("textwrap.py", "heapq.py", "ast.py")]


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock on which each pass of any model takes a second, however many tokens it reads."""
    clock = Clock()
    original: Callable[..., Any] = Transformer.hidden

    def hidden(self: Transformer, *args: Any, **options: Any) -> torch.Tensor:
        clock.spend(1.0)
        found: torch.Tensor = original(self, *args, **options)
        return found

    monkeypatch.setattr(Transformer, "hidden", hidden)
    return clock


def test_a_script_is_what_is_written_with_guesses_and_without(tiny_llama: Llama) -> None:
    """Wrong guesses must not get into the text, and right ones must be found right."""
    tiny_llama.model.args.max_seq_len = ROOM
    period = [40, 41, 42, 43, 44, 45]
    script = period * 4 + [50, 51, 52] + period * 2
    for lookup in (0, 4):
        watched = Watched(tiny_llama.model)
        watched.text = [1, *period, *script]
        llama = Llama(watched, tiny_llama.tokenizer, lookup=lookup, prefill_chunk=3)  # type: ignore[arg-type]
        events = llama.stream([Prompt([1, *period], frozenset())], len(script), temperature=0.0)
        assert [token for event in events for token in event.tokens] == script
        assert (watched.passes - 3 < len(script) - 1) == (lookup > 0)


def test_without_a_script_the_model_writes_its_own(tiny_llama: Llama) -> None:
    prompt = Prompt([1, 40, 41, 42], frozenset())
    expected = [t for event in tiny_llama.stream([prompt], 20, 0.0) for t in event.tokens]
    watched = Llama(Watched(tiny_llama.model), tiny_llama.tokenizer)  # type: ignore[arg-type]
    assert [t for event in watched.stream([prompt], 20, 0.0) for t in event.tokens] == expected


def test_counts_and_ratios_are_those_of_the_passes(tiny_llama: Llama, ticking: Clock) -> None:
    """If every pass took as long, the ratio would be the tokens that a pass writes."""
    repeating = Case("edit", [1, *[60, 61, 62, 63, 64] * 3], 30, [60, 61, 62, 63, 64] * 6)
    fresh = Case("random", [1, 2], 30, list(range(100, 130)))
    found = {one.kind: one for one in editing(tiny_llama, [repeating, fresh], 4, 3, Timer(ticking))}
    edit, random = found["edit"], found["random"]
    assert edit.without.median == pytest.approx(1.0)
    assert edit.ratio.median == pytest.approx(edit.tokens_per_pass)
    assert edit.tokens_per_pass > 3
    assert edit.accepted is not None
    assert edit.accepted.rate > 0.9
    assert edit.tokens == 29
    assert random.accepted is None
    assert random.ratio.median == pytest.approx(1.0)


def test_wrong_guesses_are_counted(tiny_llama: Llama, ticking: Clock) -> None:
    """The three tokens come again and again, and each time something else follows."""
    script = [token for i in range(8) for token in (70, 71, 72, 100 + i)]
    (found,) = editing(tiny_llama, [Case("trap", [1, 70, 71, 72], len(script), script)], 4, 1, Timer(ticking))
    assert found.accepted is not None
    assert found.accepted.n > 0
    assert found.accepted.rate < 0.8


def test_cases_fit_and_are_what_they_say(tiny_llama: Llama, sources: list[File]) -> None:
    tokenizer = tiny_llama.tokenizer
    found = cases(tokenizer, 1024, sources, room=400, most=50, each=3, own=True)
    kinds = [case.kind for case in found]
    assert all(kinds.count(kind) == 3 for kind in ("edit", "continue", "random", "edit, own", "continue, own"))
    for case in found:
        assert len(case.prompt) + case.n <= 400
        assert case.n <= 100
        assert case.script is None or len(case.script) == case.n
        assert (case.script is None) == case.kind.endswith("own")
    edit = next(case for case in found if case.kind == "edit")
    assert edit.script is not None
    text = tokenizer.decode(edit.prompt + edit.script)
    assert text.startswith("# Before\n")
    assert "new_" in text.partition("# After")[2]
    assert "new_" not in text.partition("# After")[0]


def test_too_few_sources_are_told(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="fewer than 2 functions"):
        cases(tiny_llama.tokenizer, 1024, [File("a.py", "x = 1\n")], 400, 50, 2, False)


def test_the_most_frequent_name_is_changed_everywhere() -> None:
    code = "def f(ab, b):\n    cab = ab + b\n    return ab * cab\n"
    assert rename(code) == code.replace("ab,", "new_ab,").replace("= ab", "= new_ab").replace("n ab", "n new_ab")
    assert rename("def f(a):\n    return a\n") is None
