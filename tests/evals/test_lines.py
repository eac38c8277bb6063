"""Single-line infilling: which lines, what is shown around them, and what counts as a match."""

from __future__ import annotations

import pytest

from evals.scripted import script
from fixtures_text import training_texts
from llama.evals.lines import LONGEST, SHORTEST, Order, candidates, hole, infill_lines
from llama.evals.sources import File
from llama.generation import Llama
from llama.prompts import infilling
from llama.tokenizer import Tokenizer

SOURCE = '''\
"""Prose of a module, no code."""
# a comment line of some length
import collections

def f(x):
    """Prose over
    several lines.
    """
    text = f"""a
    {x} and so on
    """
    if x:
        return collections.Counter(x)
    else:
        return "# no comment but code"
    return "{long}"
'''.replace("{long}", "x" * LONGEST)


def test_lines_of_code_are_asked_for_and_no_prose() -> None:
    lines = SOURCE.split("\n")
    assert [lines[number].strip() for number in candidates(SOURCE)] == [
        "import collections",
        "def f(x):",
        "return collections.Counter(x)",
        'return "# no comment but code"',
    ]


def test_file_that_does_not_parse_has_no_lines() -> None:
    assert list(candidates("import collections\ndef f(:\n")) == []


def test_lines_are_counted_as_the_parser_counts_them() -> None:
    text = 'a = 1\n\x0c\ntext = """prose over\nseveral lines of it"""\nvalue = 12345\n'
    assert [text.split("\n")[number] for number in candidates(text)] == ["value = 12345"]


def test_hole_is_the_file_where_there_is_room(tokenizer: Tokenizer) -> None:
    lines = SOURCE.split("\n")
    for number in candidates(SOURCE):
        found = hole(tokenizer, "a.py", lines, number, room=100_000)
        assert found.prefix + found.line + found.suffix == SOURCE
        assert found.line == lines[number]


@pytest.mark.parametrize("room", [0, 1, 5, 20, 100, 300])
def test_hole_shows_the_nearest_lines_that_fit(tokenizer: Tokenizer, room: int) -> None:
    text = training_texts()[2]
    lines = text.split("\n")
    for number in list(candidates(text))[::40]:
        found = hole(tokenizer, "a.py", lines, number, room)
        shown = found.prefix + found.line + found.suffix
        assert shown in text
        assert not found.prefix or found.prefix.endswith("\n")
        assert not found.suffix or found.suffix.startswith("\n")
        prompt = infilling(tokenizer, found.prefix, found.suffix)
        assert len(prompt.tokens) <= room + 5
        if room == 300 and len(lines) - 20 > number > 20:
            assert len(prompt.tokens) > room - 100, "room is left unused"
            sides = len(tokenizer.encode_infilling(found.prefix)), len(tokenizer.encode_infilling(found.suffix))
            assert min(sides) > room / 5, "one side has taken all"


def test_match_is_of_all_that_was_written_but_for_white_space(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "import collections": "import collections",
        "def f(x):": "\ndef f(x):\n",
        "return collections.Counter(x)": "  return collections.Counter(x)\n    pass",
        'return "# no comment but code"': 'return "# no comment, but code"',
    }
    lines = SOURCE.split("\n")

    def say(prefix: str, suffix: str) -> str:
        return next(a for line, a in answers.items() if line in lines[prefix.count("\n") + shown_from(prefix)])

    def shown_from(prefix: str) -> int:
        return SOURCE[: SOURCE.index(prefix)].count("\n")

    calls = script(tiny_llama, monkeypatch, "text_infilling", say)
    found = infill_lines(tiny_llama, [File("a.py", SOURCE)])
    assert (found.exact.hits, found.first_line.hits, found.exact.n) == (2, 3, 4)
    assert {s.hole.line.strip(): s.exact for s in found.samples} == dict(
        zip(answers, (True, True, False, False), strict=True)
    )
    assert calls == [{"max_gen_len": LONGEST, "suffix_first": False}]


def test_without_a_suffix_a_line_is_a_completion_up_to_its_end(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def complete(prompts: list[str], *args: object, **kwargs: object) -> list[dict[str, str]]:
        assert kwargs["stop"] == "\n"
        asked.extend(prompts)
        return [{"generation": "    return collections.Counter(x)"} for _ in prompts]

    monkeypatch.setattr(tiny_llama, "text_completion", complete)
    found = infill_lines(tiny_llama, [File("a.py", SOURCE)], order="none")
    assert found.exact.hits == sum("Counter" in s.hole.line for s in found.samples) == 1
    assert asked == [s.hole.prefix for s in found.samples]
    with pytest.raises(ValueError, match="there are psm, spm, none"):
        infill_lines(tiny_llama, [File("a.py", SOURCE)], order="mps")  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_model_is_asked_in_either_order_within_its_context(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch, order: Order
) -> None:
    asked: list[tuple[list[int], int]] = []
    stream = tiny_llama.stream

    def spy(prompts, max_gen_len, *args, **kwargs):  # type: ignore[no-untyped-def]
        asked.extend((prompt.tokens, max_gen_len) for prompt in prompts)
        return stream(prompts, 1, *args, **kwargs)

    monkeypatch.setattr(tiny_llama, "stream", spy)
    sources = [File("bisect.py", training_texts()[4])]
    found = infill_lines(tiny_llama, sources, n=6, context=110, order=order)
    assert found.exact.n == 6
    tokenizer = tiny_llama.tokenizer
    for tokens, max_gen_len in asked:
        assert len(tokens) + max_gen_len <= 110
        assert (tokens[2] == tokenizer.suffix_id) is (order == "spm")
    again = infill_lines(tiny_llama, sources, n=4, context=110, order=order)
    assert [s.hole for s in again.samples] == [s.hole for s in found.samples[:4]]
    assert all(SHORTEST <= len(s.hole.line.strip()) <= LONGEST for s in found.samples)


def test_what_cannot_be_asked_is_refused(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="no line of code"):
        infill_lines(tiny_llama, [File("a.py", "x = 1\n")])
    for context in (85, 129):
        with pytest.raises(ValueError, match=f"a context of {context} tokens; give 86 to 128"):
            infill_lines(tiny_llama, [File("a.py", SOURCE)], context=context)
