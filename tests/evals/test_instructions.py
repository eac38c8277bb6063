"""Answers to dialogs: whether they stop, and whether what they hold is code."""

from __future__ import annotations

import pytest

from evals.scripted import script
from llama.evals.instructions import answer_dialogs, code_of
from llama.generation import Llama
from llama.prompts import Dialog, Message

CODE = "def double(x):\n    return 2 * x"


def ask(text: str) -> Dialog:
    return [Message(role="user", content=text)]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (CODE, CODE),
        (f" {CODE}\n", CODE),
        (f"Sure:\n```python\n{CODE}\n```\nThat's it.", CODE + "\n"),
        (f"[PYTHON]\n{CODE}\n[/PYTHON] as asked", f"\n{CODE}\n"),
        ("```\na = 1\n```\nand\n```\nb = 2\n```", "\na = 1\n\n\nb = 2\n"),
        (f"```python\n{CODE}", f"```python\n{CODE}"),
    ],
)
def test_code_of_an_answer_is_what_is_marked_or_all(answer: str, code: str) -> None:
    assert code_of(answer) == code


@pytest.mark.parametrize(
    ("answer", "stopped", "parses", "defines"),
    [
        (CODE, True, True, True),
        ("double", True, True, False),
        ("Here you are.", True, False, False),
        ("", True, False, False),
        ("# to do", True, False, False),
        (f"{CODE}\n[INST] And now", False, False, False),
    ],
)
def test_answer_is_judged(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch, answer: str, stopped: bool, parses: bool, defines: bool
) -> None:
    calls = script(tiny_llama, monkeypatch, "chat_completion", lambda _: answer)
    sample = answer_dialogs(tiny_llama, [ask("Write a function.")], max_gen_len=9).samples[0]
    assert (sample.stopped, sample.parses, sample.defines) == (stopped, parses, defines)
    assert calls == [{"temperature": 0.0, "max_gen_len": 9}]


def test_shares_are_over_all_dialogs_in_whatever_batches(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tiny_llama, monkeypatch, "chat_completion", lambda d: CODE if d[0]["content"] < "5" else "No, sorry.")
    found = answer_dialogs(tiny_llama, [ask(str(i)) for i in range(9)])
    assert (found.stopped.hits, found.parsed.hits, found.defined.hits, found.parsed.n) == (9, 5, 5, 9)


def test_answer_that_reached_its_limit_has_not_stopped(tiny_llama: Llama) -> None:
    found = answer_dialogs(tiny_llama, [ask("Write a function."), ask("Another.")], max_gen_len=2)
    assert (found.stopped.hits, found.stopped.n) == (0, 2)


def test_no_dialogs_are_refused(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="no dialogs"):
        answer_dialogs(tiny_llama, [])
