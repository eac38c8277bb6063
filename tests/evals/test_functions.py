"""Completions of function heads: which heads, where they are cut, and what counts as parsing."""

from __future__ import annotations

import ast

import pytest

from evals.scripted import script
from fixtures_text import training_texts
from llama.evals.functions import STOP, complete_functions, cut, heads, is_written
from llama.evals.sources import File
from llama.generation import Llama

SOURCE = File(
    "shapes.py",
    '''\
class Square:
    """A shape."""

    @property
    def area(self):
        """The area.

        In units.
        """
        # squared

        return self.side**2

    def no_docstring(self):
        return 1

    def no_body(self):
        """Nothing follows."""


async def top(x):
    "One line."
    def inner(y):
        """Part of top."""
        return y
    return inner(x)

def joined(): "A docstring"; return 1
''',
)


def test_heads_are_functions_by_themselves_up_to_their_docstring() -> None:
    assert [(head.name, head.prompt) for head in heads(SOURCE)] == [
        ("area", 'def area(self):\n    """The area.\n\n    In units.\n    """'),
        ("top", 'async def top(x):\n    "One line."'),
    ]


def test_functions_are_found_behind_a_form_feed_and_left_out_where_they_cannot_be_dedented() -> None:
    text = '''\
import os
\x0c
class A:
    def left(self):
        """Doc."""
        return """
left of the code
"""

    def dedented(self):
        """Doc."""
        return 1
'''
    assert [head.prompt for head in heads(File("a.py", text))] == ['def dedented(self):\n    """Doc."""']


def test_head_and_body_are_the_function() -> None:
    for text in training_texts():
        for head in heads(File("f.py", text)):
            whole = ast.parse(head.prompt + head.body).body
            assert len(whole) == 1
            assert isinstance(whole[0], ast.FunctionDef)
            assert (whole[0].name, len(whole[0].body) > 1, ast.get_docstring(whole[0])) == (
                head.name,
                True,
                ast.get_docstring(ast.parse(head.prompt).body[0]),  # type: ignore[arg-type]
            )
            assert cut(head.body + "\n\n\ndef other():\n    pass\n").rstrip() == head.body.rstrip()


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        ("\n    return 1\n\n\ndef g():\n    pass", True, "\n    return 1\n\n"),
        ("\n    return 1\n# over", True, "\n    return 1"),
        ("\n    return 1\nähm = 1", True, "\n    return 1"),
        ("\n\n    a\n\n\t\n    b\n", True, "\n\n    a\n\n\t\n    b\n"),
        ("\n    a = 1\n    b = (1 +", False, "\n    a = 1"),
        ("\n    a = 1\nb = (1 +", False, "\n    a = 1"),
        (" # no line", False, ""),
        (
            "\n    if a:\n        return 1\n\n    if b:\n        # why\n        ret",
            False,
            "\n    if a:\n        return 1",
        ),
        ("\n    if a:\n        # why", True, "\n    if a:\n        # why"),
    ],
)
def test_completion_is_cut_where_the_function_ends(text: str, ended: bool, expected: str) -> None:
    assert cut(text, ended) == expected


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        ("\n    return 1", True),
        ("\n    pass\n\n", True),
        ("", False),
        ("\n    # later", False),
        ("\n    return (1", False),
        ("\n  return 1", False),
        ("\n    " + "(" * 5000, False),
        ("\n    " + "-" * 100_000 + "1", False),
        ("\n    x = 'a\0b'", False),
    ],
)
def test_function_counts_if_it_parses_and_does_something(body: str, counts: bool) -> None:
    assert is_written('def f():\n    """Doc."""' + body) is counts


def test_share_is_of_what_a_model_writes(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it right, half of it not; and asked greedily, to be stopped where a function ends."""

    def say(prompt: str) -> str:
        return "\n    return 1\n" if "area" in prompt else "\n    return (\n"

    calls = script(tiny_llama, monkeypatch, "text_completion", say)
    found = complete_functions(tiny_llama, [SOURCE], max_gen_len=20)
    assert (found.parsed.hits, found.parsed.n, found.ended.hits) == (1, 2, 2)
    assert {(sample.head.name, sample.parses) for sample in found.samples} == {("area", True), ("top", False)}
    assert calls == [{"temperature": 0.0, "max_gen_len": 20, "stop": STOP}]


def test_function_that_was_broken_off_parses_or_not_but_has_not_ended(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tiny_llama, monkeypatch, "text_completion", lambda _: "\n    x = 1\n    y = (", "length")
    found = complete_functions(tiny_llama, [SOURCE], max_gen_len=20)
    assert (found.parsed.rate, found.ended.rate) == (1.0, 0.0)
    assert found.samples[0].text == "\n    x = 1"


def test_sample_is_stable_and_heads_without_room_are_left_out(tiny_llama: Llama) -> None:
    sources = [File("ast.py", training_texts()[1])]
    first = complete_functions(tiny_llama, sources, n=3, max_gen_len=8)
    more = complete_functions(tiny_llama, sources, n=5, max_gen_len=8)
    assert [s.head for s in first.samples] == [s.head for s in more.samples[:3]]
    limit = tiny_llama.model.args.max_seq_len - 8
    assert all(len(tiny_llama.tokenizer.encode(s.head.prompt, True, False)) <= limit for s in more.samples)
    assert any(len(tiny_llama.tokenizer.encode(h.prompt, True, False)) > limit for h in heads(sources[0]))
    assert len(more.samples) == more.parsed.n == 5


def test_head_that_stands_twice_is_asked_once(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tiny_llama, monkeypatch, "text_completion", lambda _: "\n    return 1\n")
    copies = [SOURCE, File("copy.py", SOURCE.text + "\nx = 1\n")]
    assert complete_functions(tiny_llama, copies, max_gen_len=20).parsed.n == 2


def test_sources_without_a_head_that_fits_are_refused(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="none of 0 functions"):
        complete_functions(tiny_llama, [File("a.py", "x = 1\n")], max_gen_len=8)
    with pytest.raises(ValueError, match="none of 2 functions with a docstring fits into 3 tokens"):
        complete_functions(tiny_llama, [SOURCE], max_gen_len=125)
    with pytest.raises(ValueError, match="n is 0"):
        complete_functions(tiny_llama, [SOURCE], n=0)
