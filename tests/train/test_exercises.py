"""The world of exercises: what it makes passes its tests, its splits hold, and nobody else's exercises are in it."""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path

import pytest

from llama.evals.sandbox import Limits, Sandbox, sandbox
from llama.tokenizer import Tokenizer
from llama.train.exercises.classics import Classic, classics, exchange, read_classics, render
from llama.train.exercises.exercise import Exercise, Parameter, Style, styled, third_person
from llama.train.exercises.measure import loops, one_line, several_lines, span, wordings
from llama.train.exercises.pipelines import compositions
from llama.train.exercises.stream import (
    FAMILIES,
    broken_body,
    dialogs,
    documents,
    draw,
    exercises,
    is_held_out,
    module,
    passing,
)
from llama.train.exercises.values import run_function
from llama.train.exercises.wording import asked_by_people, said_otherwise
from llama.train.sequences import Mixture, encode_corpus

EVALDATA = Path(__file__).parents[3] / "shared" / "evaldata"


@pytest.fixture(scope="module")
def place() -> Iterator[Sandbox]:
    with sandbox(Limits(seconds=60)) as running:
        yield running


def program(exercise: Exercise) -> str:
    return exercise.code() + "\n" + exercise.tests()


# What is made passes ----------------------------------------------------------------------------------------------


def test_every_body_of_every_classic_passes(place: Sandbox) -> None:
    rng = random.Random(0)
    made = [render(entry, rng, body) for entry in classics() for body in entry.bodies]
    missing = {e.key for e in made} - {e.key for e in passing(made, place)}
    assert not missing


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_makes_exercises_that_pass(family: object, place: Sandbox) -> None:
    rng = random.Random(1)
    made = [styled(e, rng) for e in (family(rng) for _ in range(80)) if e is not None]  # type: ignore[operator]
    assert len(made) > 30
    assert len(passing(made, place)) >= 0.97 * len(made)
    for exercise in made:
        ast.parse(exercise.code())
        assert exercise.code().startswith(exercise.head().rstrip("\n"))


@pytest.mark.slow
def test_two_hundred_thousand_renderings(place: Sandbox) -> None:
    rng = random.Random(2)
    made = passed = 0
    keys: set[str] = set()
    while made < 200_000:
        batch = [draw(rng, classics=0.2) for _ in range(64)]
        good = passing(batch, place)
        keys |= {e.key for e in good}
        made, passed = made + len(batch), passed + len(good)
    print(f"{passed:,} of {made:,} pass; {len(keys):,} tasks")
    assert passed >= 0.99 * made


def test_a_wrong_body_is_thrown_away(place: Sandbox) -> None:
    good = render(next(e for e in classics() if e.name == "is_even"), random.Random(0), plain=True)
    wrong = Exercise(**{**vars(good), "body": ("return n % 2 == 1",)})
    assert passing([good, wrong, good], place) == [good, good]


def test_there_are_more_tasks_than_a_run_can_read() -> None:
    assert compositions() > 60_000
    domains = Counter(draw(rng, classics=0.3).domain for rng in [random.Random(3)] for _ in range(600))
    assert len(domains) >= 12


def test_the_stream_is_its_seed_and_repeats_nothing() -> None:
    first, again, other = ([e.code() for e in islice(exercises(seed, classics=0.0), 150)] for seed in ("a", "a", "b"))
    assert first == again
    assert first != other
    assert len(set(first)) == len(first)


# Splits -----------------------------------------------------------------------------------------------------------


def test_held_out_compositions_never_come_in_training() -> None:
    rng = random.Random(4)
    assert not any(is_held_out(draw(rng).key) for _ in range(500))
    assert all(is_held_out(draw(rng, held_out=True, classics=0.0).key) for _ in range(40))


def test_single_operations_are_never_held_out() -> None:
    assert not any(is_held_out(key) for key in ("numbers: even ·  · ", "numbers:  ·  · sum", "classic: is_prime"))
    share = sum(is_held_out(f"numbers: even · square · {n}") for n in range(4000)) / 4000
    assert 0.04 < share < 0.09


def test_sixty_classics_are_held_out_with_their_relatives() -> None:
    out = [entry for entry in classics() if entry.held_out]
    kept = [entry for entry in classics() if not entry.held_out]
    assert len(out) == 60
    assert len(kept) > 250
    names = {name for entry in kept for name in (entry.name, *entry.names)}
    assert not names & {name for entry in out for name in (entry.name, *entry.names)}
    bodies = {squeeze(body) for entry in kept for body in entry.bodies}
    assert not bodies & {squeeze(body) for entry in out for body in entry.bodies}
    rng = random.Random(5)
    assert not any(draw(rng, classics=1.0).key.removeprefix("classic: ") in {e.name for e in out} for _ in range(300))


def test_other_wordings_ask_for_classics_that_are_learned() -> None:
    known = {entry.name: entry for entry in classics() if not entry.held_out}
    asked = wordings()
    assert len(asked) >= 40
    for question in asked:
        entry = known[question.name]
        assert question.asks not in entry.asks
        assert not any(f"def {name}(" in question.head for name in (entry.name, *entry.names))
        ast.parse(question.head + ("        pass" if question.head.rstrip().endswith(":") else ""))


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def other_peoples() -> list[str]:
    """Prompts and solutions of HumanEval and MBPP, or skips."""
    files = [EVALDATA / "humaneval" / "HumanEval.jsonl.gz", EVALDATA / "mbpp" / "mbpp.jsonl.gz"]
    if not all(file.is_file() for file in files):
        pytest.skip(f"{EVALDATA} does not hold HumanEval and MBPP")
    found = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if "prompt" in row:
                    found += [row["prompt"], row["canonical_solution"], row["prompt"] + row["canonical_solution"]]
                else:
                    found += [row["text"], row["code"]]
    return [squeeze(text) for text in found]


def our_texts() -> Iterator[str]:
    for entry in classics():
        yield from entry.bodies
        yield from (*entry.says, *entry.asks)
        yield from (render(entry, random.Random(0), body, plain=True).code() for body in entry.bodies)
    yield from (text for question in wordings() for text in (question.head, question.asks))


SHORTEST = 60
"""Characters of a text that can be called somebody's."""


def test_no_text_of_the_benchmarks_is_ours() -> None:
    theirs = {text for text in other_peoples() if len(text) >= 30}
    rng = random.Random(6)
    ours = {squeeze(text) for text in our_texts()} | {squeeze(draw(rng).code()) for _ in range(500)}
    assert not theirs & ours


@pytest.mark.slow
def test_no_text_of_the_benchmarks_is_near_ours() -> None:
    """Nowhere are nine tenths of the characters alike."""
    rng = random.Random(7)
    ours = {squeeze(text) for text in our_texts()} | {squeeze(draw(rng).code()) for _ in range(2000)}
    theirs = [text for text in other_peoples() if len(text) >= SHORTEST]
    for one in ours:
        for other in theirs:
            if len(one) < SHORTEST or abs(len(one) - len(other)) > 0.2 * max(len(one), len(other)):
                continue
            matcher = SequenceMatcher(None, one, other, autojunk=False)
            if matcher.real_quick_ratio() > 0.9 and matcher.quick_ratio() > 0.9:
                assert matcher.ratio() <= 0.9, (one, other)


# Renderings -------------------------------------------------------------------------------------------------------

DOUBLE = Exercise(
    "k", "numbers", "double", (Parameter("n", "int"),), "int", "Return twice n", ("return 2 * n",),
    (("2", "4"), ("0", "0")),
)  # fmt: skip


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (Style(), 'def double(n):\n    """Return twice n."""\n    return 2 * n\n'),
        (Style("none", annotated=True), "def double(n: int) -> int:\n    return 2 * n\n"),
        (Style("comment"), "def double(n):\n    # Return twice n\n    return 2 * n\n"),
        (
            Style("doctest", imperative=False, shown=1),
            'def double(n):\n    """Returns twice n.\n\n    >>> double(2)\n    4\n    """\n    return 2 * n\n',
        ),
        (
            Style("google"),
            'def double(n):\n    """Return twice n.\n\n    Args:\n        n: An integer.\n\n    Returns:\n'
            '        Twice n.\n    """\n    return 2 * n\n',
        ),
        (
            Style("numpy", open_line=True),
            'def double(n):\n    """\n    Return twice n.\n\n    Parameters\n    ----------\n    n : int\n'
            '        An integer.\n\n    Returns\n    -------\n    int\n    """\n    return 2 * n\n',
        ),
    ],
)
def test_docstrings_in_their_styles(style: Style, expected: str) -> None:
    assert Exercise(**{**vars(DOUBLE), "style": style}).code() == expected


def test_what_a_docstring_shows_is_true() -> None:
    """Doctests are made of the same examples that the tests check."""
    rng = random.Random(8)
    shown = [e for e in (draw(rng) for _ in range(300)) if e.style.docstring == "doctest" and e.body][:10]
    for exercise in shown:
        call = run_function(exercise)
        for arguments, result in exercise.examples:
            value = call(arguments)
            assert value is None or value == result or eval(f"{value} == {result}")


@pytest.mark.parametrize(
    ("imperative", "third"),
    [
        ("Return the sum", "Returns the sum"),
        ("Check whether x", "Checks whether x"),
        ("Multiply x by y", "Multiplies x by y"),
        ("Split x and return it", "Splits x and returns it"),
        ("Display x", "Displays x"),
    ],
)
def test_third_person(imperative: str, third: str) -> None:
    assert third_person(imperative) == third


def test_names_are_exchanged_and_texts_are_not() -> None:
    code = 's = "s"\nx.s = s\nprint(f"s {s} {s:>3}", s=1)'
    assert exchange(code, {"s": "text"}) == 'text = "s"\nx.s = text\nprint(f"s {text} {text:>3}", text=1)'


def test_a_module_has_its_imports_at_the_top_and_each_name_once() -> None:
    rng = random.Random(9)
    for _ in range(20):
        text = module([draw(rng) for _ in range(4)], rng)
        tree = ast.parse(text)
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(set(names)) == len(names)
        imports = [i for i, node in enumerate(tree.body) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports == list(range(len(imports)))


def test_documents_parse_and_dialogs_ask() -> None:
    for text in islice(documents("0"), 60):
        ast.parse(text)
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
    for system, question, answer in islice(dialogs("0"), 60):
        assert question
        assert answer
        assert "{" not in re.sub(r"```.*|\n.*", "", question) or "`" in question or "{" in answer or "=" in question
        assert isinstance(system, str)


def test_a_mistake_changes_the_body_alone() -> None:
    code = "def f(n):\n    return n % 2 == 0\n"
    assert broken_body(code, random.Random(0)) == "def f(n):\n    return n % 2 == 1\n"
    assert broken_body("def f(n):\n    return n\n", random.Random(0)) is None


def test_a_classic_that_lacks_something_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks"):
        list(read_classics("= f | | numbers\n(n: int) -> int\n- Return n\n:\nreturn n\n"))
    with pytest.raises(ValueError, match="no known mark"):
        list(read_classics("= f\nwhat\n:\npass\n"))
    (entry,) = read_classics("= f | g | numbers\n(n=m: int) -> int\n- Return n\n> 1 -> 1\n:\nreturn n\n")
    assert isinstance(entry, Classic)
    assert entry.parameters == (("n", ("m",), "int"),)


# Training and measuring -------------------------------------------------------------------------------------------


def test_exercises_and_questions_get_their_shares() -> None:
    from llama.generation import EMBEDDED

    tokenizer = Tokenizer(EMBEDDED / "tokenizer.model")
    mixture = Mixture(exercises=0.6, questions=0.4, exercise_infilling=0.5)
    sequences = list(islice(encode_corpus(tokenizer, [], 256, mixture, "0"), 300))
    asked = [s for s in sequences if s[0] < 0]
    assert 0.3 < sum(map(len, asked)) / sum(map(len, sequences)) < 0.5
    gaps = [s for s in sequences if tokenizer.middle_id in s]
    assert 0.3 < len(gaps) / (len(sequences) - len(asked)) < 0.7
    assert all(len(s) <= 256 for s in sequences)


def test_shares_beyond_one_are_refused() -> None:
    with pytest.raises(ValueError, match="together"):
        Mixture(exercises=0.7, questions=0.4)


def test_gaps_add_up_to_the_text() -> None:
    rng = random.Random(10)
    for exercise in islice(exercises("g", held_out=True, classics=0.0), 30):
        if not exercise.body:
            continue
        for gap in (one_line, several_lines, span):
            parts = gap(exercise.code(), exercise.head(), rng)
            assert parts.prefix + parts.middle + parts.suffix == exercise.code()
            assert parts.prefix.startswith(exercise.head())


def test_loops_are_seen() -> None:
    assert loops("a = 1\nb = b\nb = b\nb = b\n")
    assert not loops("a = 1\nb = b\nb = b\n\n)\n)\n)\n")


# Words ------------------------------------------------------------------------------------------------------------


def test_said_otherwise_keeps_what_is_asked_for() -> None:
    rng = random.Random(11)
    said = {said_otherwise("Check whether a number is prime", rng) for _ in range(60)}
    assert len(said) > 5
    assert all("prime" in text for text in said)
    assert {said_otherwise("Convert x to y", rng, nouns=False) for _ in range(40)} >= {"Turn x into y"}
    assert said_otherwise("Frobnicate it", rng, nouns=False) == "Frobnicate it"


def test_people_type_as_they_like() -> None:
    rng = random.Random(12)
    typed = {asked_by_people("Sort a list.", rng) for _ in range(200)}
    assert {"Sort a list.", "sort a list"} <= typed
    assert all("sort a list" in text.lower() for text in typed)
