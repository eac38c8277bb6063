"""Arguments to try functions with, and what comes of them."""

from __future__ import annotations

import builtins
import io
import random
from collections.abc import Callable
from typing import Any

from llama.train.exercises.exercise import Exercise

NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 20, 21, 22, 25, 30, 33, 36, 44, 50, 64, 99, 100, 121)
NEGATIVE = (-1, -2, -3, -4, -5, -7, -8, -10, -12, -20)
WORDS = (
    "apple", "banana", "cherry", "sun", "moon", "star", "level", "noon", "anna", "tree", "house", "a", "to", "be",
    "sing", "running", "walked", "books", "cats", "dog", "Apple", "Berlin", "HELLO", "WORLD", "ok", "42", "7", "x1",
    "under", "undo", "egg", "idea", "ocean", "river", "stone", "radar", "bob", "the", "and", "blue", "area", "else",
)  # fmt: skip
SENTENCES = (
    "hello world", "the quick brown fox", "a sunny day in May", "Python is fun", "one two two three", "abc abc",
    "Level 42", "to be or not to be", "aAbBcC", "x1 y22 z333", "  spaces  here ", "UPPER lower", "banana bread",
    "Hello, World!", "room 101", "noon", "the end.", "see the sea", "eye of the tiger", "abacus",
)  # fmt: skip
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eve", "Finn", "Ada", "Otto", "Ivy", "Max")
_OF_FIELDS: dict[str, tuple[str, ...]] = {
    "city": ("Paris", "Rome", "Oslo", "Lima"), "course": ("math", "art", "history"),
    "author": ("Austen", "Orwell", "Woolf"), "department": ("sales", "research", "support"),
    "status": ("paid", "open", "shipped"), "genre": ("drama", "comedy", "action"), "team": ("red", "blue", "green"),
    "owner": ("Ana", "Ben", "Eve"), "species": ("cat", "dog", "horse"), "country": ("France", "Italy", "Norway"),
    "color": ("red", "blue", "black"), "name": NAMES, "title": ("Emma", "Up", "Alien", "Ice", "Stars"),
    "customer": NAMES, "model": ("Mini", "Golf", "Panda", "Civic"),
}  # fmt: skip


def draw_number(rng: random.Random) -> int:
    return rng.choice(NUMBERS[:20]) if rng.random() < 0.7 else rng.choice(NUMBERS + NEGATIVE + NEGATIVE)


def draw_value(what: str, rng: random.Random, attempt: int = 0) -> str:
    """A literal for an argument. The first are short; later ones are longer, or empty."""
    size = (3, 4, 5, 0, 1, 6, 7, 5, 6)[attempt % 9]
    if what in ("list[int]", "set[int]", "tuple[int, ...]"):
        numbers = [draw_number(rng) for _ in range(size)]
        if what == "list[int]":
            return repr(numbers)
        return repr(tuple(numbers)) if what.startswith("tuple") else repr(set(numbers))
    if what == "int":
        return str(draw_number(rng))
    if what == "natural":
        return str(rng.choice((5, 7, 10, 12, 15, 20, 123, 505, 2024, 1, 0, 98, 31)))
    if what == "list[str]":
        return repr([rng.choice(WORDS) for _ in range(size)])
    if what == "str":
        return repr(rng.choice(WORDS))
    if what == "sentence":
        return repr(rng.choice(SENTENCES) if size else "")
    if what == "numbers_text":
        return repr(",".join(str(draw_number(rng)) for _ in range(max(1, size))))
    if what == "spaced_numbers":
        return repr(" ".join(str(draw_number(rng)) for _ in range(size)))
    if what in ("lines", "path"):
        return repr("\n".join(rng.choice((rng.choice(WORDS), rng.choice(SENTENCES))) for _ in range(size)))
    if what == "list[list[int]]":
        width = rng.randint(1, 4)
        return repr([[draw_number(rng) for _ in range(width)] for _ in range(min(size, 4))])
    if what == "list[date]":
        made = (f"date({rng.choice((2022, 2023, 2024))}, {rng.choice((1, 2, 5, 12))}, {rng.choice((1, 3, 14, 20, 28))})"
                for _ in range(min(size, 4)))  # fmt: skip
        return f"[{', '.join(made)}]"
    return _draw_records(what, rng, min(size, 4))


def _draw_records(what: str, rng: random.Random, size: int) -> str:
    from llama.train.exercises.pipelines import SCHEMAS

    form, _, plural = what.partition(" ")
    schema = next(s for s in SCHEMAS if s.plural == plural)
    records = []
    for _ in range(size):
        records.append([rng.choice(_OF_FIELDS[f]) if k == "str" else draw_number(rng) for f, k, _ in schema.fields])
    if form == "mapping":
        return repr({r[0]: r[1] for r in records})
    if form == "pairs":
        return repr([(r[0], r[1]) for r in records])
    if form == "dicts":
        return repr([dict(zip((f for f, _, _ in schema.fields), r, strict=True)) for r in records])
    name = schema.singular.capitalize()
    return f"[{', '.join(name + repr(tuple(r)) for r in records)}]"


def run_function(exercise: Exercise) -> Callable[[str], str | None]:
    """A function of literal arguments to the literal result; None where it raises, or its result has no literal."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(exercise.code(), "<exercise>", "exec"), space)

    def call(arguments: str) -> str | None:
        arguments, _, setup = arguments.partition("\0")
        if setup:
            text = eval(setup.partition("file.write(")[2][:-1])
            space["open"] = lambda *_: io.StringIO(text)
        try:
            literal = repr(eval(f"{exercise.name}({arguments})", space)).replace("datetime.", "")
        except Exception:
            return None
        finally:
            space["open"] = builtins.open
        return literal if len(literal) < 300 and " object at " not in literal else None

    return call
