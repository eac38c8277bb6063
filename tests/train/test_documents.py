"""Documents add up to their file, begin where a prompt would, and end where a writer would."""

from __future__ import annotations

import ast
import random
import re
from collections import deque

import pytest

from fixtures_text import training_texts
from llama.prompts import dialog as dialog_prompt
from llama.tokenizer import Tokenizer
from llama.train.documents import (
    Function,
    ask_for_function,
    commented,
    cut,
    functions,
    third_person,
    turns,
    with_keys,
)

FILE = '''\
"""A module."""

import os

# About first.
# In two lines.
@decorated
def first(x):
    return x

class Second:
    def method(self):
        if self:

            return """
left
"""
        return 0

    @property
    def other(self):
        return 1

value = 3
'''


def words(lines: list[str]) -> list[int]:
    """A cost for tests: a token a word, and one for the newline."""
    return [len(line.split()) + 1 for line in lines]


@pytest.mark.parametrize("room", [8, 12, 20, 40, 200])
def test_documents_fit_and_add_up_to_the_file(room: int) -> None:
    for text in (FILE, *training_texts()):
        found = [document.text for document in cut(text, room, words)]
        kept = [line for line in text.splitlines(keepends=True) if words([line])[0] <= room]
        assert "".join(found) == "".join(kept)
        assert all(sum(words(document.splitlines())) <= room for document in found)


def test_a_line_beyond_the_room_is_left_out() -> None:
    long = "x = [" + "1 , " * 50 + "]\n"
    assert [d.text for d in cut("a = 1\n" + long + "b = 2\n", 20, words)] == ["a = 1\n", "b = 2\n"]


def test_documents_begin_at_top_level_where_they_can() -> None:
    found = [document.text for document in cut(FILE, 20, words)]
    assert found[0].startswith('"""A module."""')
    # With its comments and its decorator.
    assert any(document.startswith("# About first.\n# In two lines.\n@decorated\ndef first") for document in found)
    assert any(document.startswith("class Second:") for document in found)


def test_a_class_too_long_is_cut_before_a_method() -> None:
    text = "class A:\n" + "".join(
        f"    @d\n    def m{i}(self):\n        x = {i}\n\n        return x\n" for i in range(9)
    )
    for document in list(cut(text, 30, words))[1:]:
        assert document.text.startswith("    @d\n    def m")


def test_only_a_document_that_ends_at_top_level_gets_an_eos() -> None:
    text = "def f():\n" + "    x = 1\n" * 30 + "\n\ndef g():\n    return 2\n"
    found = list(cut(text, 40, words))
    assert [document.ends for document in found] == [document.text.endswith(("\n\n\n", "2\n")) for document in found]
    assert found[-1].ends
    assert not found[0].ends


def test_a_form_feed_ends_no_line() -> None:
    """`str.splitlines` breaks at it and the parser doesn't, which would shift every later cut."""
    text = "a = 1\n\f\nb = '\f'\ndef f():\n    return 1\n"
    assert [document.text for document in cut(text, 10, words)] == ["a = 1\n\f\nb = '\f'\n", "def f():\n    return 1\n"]
    assert [function.code for function in functions(text)] == ["def f():\n    return 1\n"]


def test_documents_are_as_long_as_they_can_be() -> None:
    assert [document.text.count("\n") for document in cut("x = 1\n" * 35, 40, words)] == [10, 10, 10, 5]


def test_functions_stand_alone() -> None:
    found = {function.name: function.code for function in functions(FILE)}
    assert found["first"] == "def first(x):\n    return x\n"
    assert found["other"] == "def other(self):\n    return 1\n"
    assert "method" not in found  # its literal stands left of its indent, so dedenting would change what it says


def test_functions_of_real_files_parse_and_say_the_same() -> None:
    for text in training_texts():
        tree = ast.parse(text)
        expected = [
            node
            for owner in ast.walk(tree)
            if isinstance(owner, ast.Module | ast.ClassDef)
            for node in owner.body
            if isinstance(node, ast.FunctionDef)
        ]
        names = [function.name for function in functions(text)]
        assert len(names) > 0.95 * len(expected)
        assert set(names) <= {node.name for node in expected}
        for function in functions(text):
            (node,) = ast.parse(function.code).body
            assert isinstance(node, ast.FunctionDef)
            assert node.name == function.name


def test_summary_is_the_first_paragraph_on_one_line() -> None:
    text = 'def f():\n    """Return the\n    sum.\n\n    More.\n    """\n'
    assert [function.summary for function in functions(text)] == ["Return the sum."]


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("Return the sum.", "returns the sum"),
        ("Returns the sum. And more.", "returns the sum"),
        ("Copy a tree.", "copies a tree"),
        ("Display a line.", "displays a line"),
        ("Process all events", "processes all events"),
        ("Search for x:", "searches for x"),
        ("The sum.", None),
        ("Return", None),
        ("", None),
        ("Return " + "very " * 40 + "much.", None),
    ],
)
def test_a_docstring_becomes_a_request(summary: str, expected: str | None) -> None:
    assert third_person(summary) == expected


CODE = 'def f(self, x, n=2):\n    """Return x."""\n    y = x\n    return y\n'
ASKED = Function("f", "Return x.", CODE, 'def f(self, x, n=2):\n    """Return x."""\n', "x, n")


def test_a_dialog_is_what_a_prompt_shows_of_a_finished_turn(tokenizer: Tokenizer) -> None:
    """Trained and asked must be the same ids: those of prompts.dialog when the conversation goes on."""
    questions, systems = set(), set()
    for seed in range(300):
        turn = ask_for_function(ASKED, random.Random(seed))
        assert turn is not None
        head = [{"role": "system", "content": turn.system}] if turn.system else []
        turns = [("user", turn.request), ("assistant", turn.answer), ("user", "Thanks")]
        messages = head + [{"role": role, "content": content} for role, content in turns]
        ids = tokenizer.encode(turn.text, bos=True, eos=True)
        assert dialog_prompt(tokenizer, messages).tokens[: len(ids)] == ids  # type: ignore[arg-type]
        ids = tokenizer.encode(turn.question, bos=True, eos=False)
        assert dialog_prompt(tokenizer, messages[: len(head) + 1]).tokens == ids  # type: ignore[arg-type]
        assert turn.answer == CODE.strip()
        questions.add(turn.request)
        systems.add(turn.system)
    assert {
        "Write a Python function `f` that returns x.",
        "Write a function `f(x, n)` that returns x.",
        'Complete this function:\ndef f(self, x, n=2):\n    """Return x."""',
        "Implement `f(x, n)` in Python.",
    } <= questions
    assert len(questions) == 7
    assert len(systems) == 4  # one of them is none


def test_functions_know_their_head_and_parameters() -> None:
    (found,) = functions("class A:\n    @staticmethod\n    " + CODE.replace("\n", "\n    ").rstrip() + "\n")
    assert (found.code, found.head, found.parameters) == (CODE, ASKED.head, "x, n")
    (short,) = functions("def f(x): return x\n")
    assert short.head == ""
    for function in functions("\n".join(training_texts())):
        assert function.code.startswith(function.head)
        if function.head.strip():
            ast.parse(function.head + "    pass\n")


@pytest.mark.parametrize(
    "function",
    [
        Function("__init__", "Create it.", "def __init__(self): ...\n"),
        Function("f", "About x.", "def f(): ...\n"),
        Function("f", "Return a tag.", "def f():\n    return '[INST]'\n"),
    ],
)
def test_no_dialog_about_what_nobody_asks_for(function: Function) -> None:
    assert ask_for_function(function, random.Random(0)) is None


def test_a_comment_asks_for_the_lines_below_it() -> None:
    text = """
def f(x):
    # Find out who
    # is the first.
    first = x[0]
    if first:
        return first

    # Then the rest of them.
    only = 1
    # TODO: do this some other day
    a = 1
    b = 2
    # It ends within a bracket below
    c = (
    d
# The block is left by a dedent.
    e = 1
    g = 2
h = 3
"""
    expected = "first = x[0]\nif first:\n    return first\n"
    assert list(commented(text)) == [("Find out who is the first.", expected)]


def test_every_turn_of_real_files_has_an_answer_that_parses() -> None:
    found = [turn for text in training_texts() for turn in turns(text, random.Random(0))]
    assert len(found) > 20
    assert any("comment" in turn.request for turn in found)
    for turn in found:
        ast.parse(turn.answer)


POOL = [f"def other_{n}(x):\n    return x + {n}\n" for n in range(300)]


def test_a_text_with_keys_takes_its_functions_off_the_pool() -> None:
    """So no function stands in two texts; one that is too long for any text is dropped, not met again for ever."""
    pool = deque([*POOL[:30], "def long(x):\n    return " + "x + " * 300 + "x\n", *POOL[30:]])
    texts = []
    while len(pool) > 100:
        document = with_keys(pool, 300, lambda text: len(text.split()), random.Random(len(pool)))
        assert document is not None
        texts.append(document.text)
    used = [code for code in POOL if any(code in text for text in texts)]
    assert all(sum(code in text for text in texts) == 1 for code in used)
    assert len(used) > 150
    assert not any("def long" in code for code in [*pool, *texts])


@pytest.mark.parametrize("room", [80, 200, 1000])
def test_a_text_with_keys_can_be_run(room: int) -> None:
    """Its assertions are true, they are as many as the keys, and it fills its room."""
    many = set()
    for seed in range(40):
        document = with_keys(deque(POOL), room, lambda text: len(text.split()), random.Random(seed))
        assert document is not None
        assert document.ends
        assert room - 8 < len(document.text.split()) <= room
        exec(document.text, {})
        asked = re.findall(r"^assert (\w+)\(\) == (\d\d)$", document.text, re.MULTILINE)
        assert document.text.count("is used at the end") == len(asked) == len(dict(asked))
        assert "my_function" in dict(asked)
        many.add(len(asked))
    assert many == {1, 2, 3, 4}


def test_a_key_stands_anywhere_in_its_text() -> None:
    depths = []
    for seed in range(60):
        document = with_keys(deque(POOL), 300, lambda text: len(text.split()), random.Random(seed))
        assert document is not None
        depths.append(document.text.index("def my_function") / len(document.text))
    assert min(depths) < 0.1
    assert max(depths) > 0.8
    assert 0.35 < sum(depths) / len(depths) < 0.6


def test_no_text_where_no_key_fits() -> None:
    assert with_keys(deque(["def f(): ...\n"]), 10, lambda text: len(text.split()), random.Random(0)) is None
