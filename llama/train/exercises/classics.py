"""Classics: exercises that every book has, written by hand in `classics/*.txt`, each with several bodies.

An entry begins with `= name | other names | domain`. Then come the signature, where a parameter may have other names;
lines of `-` that say in the imperative what it does; lines of `?` that say it to somebody who sees no parameters; lines
of `>` with arguments and result; lines of `~` with other names for a variable; lines of `+` with imports; `class` in
place of a signature, and then lines of `!` with statements that test it. A colon alone opens a body, and the next
colon another. Names are exchanged token by token, so a text in quotes stays what it is.
"""

from __future__ import annotations

import functools
import io
import random
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llama.train.exercises.exercise import Exercise, Parameter
from llama.train.exercises.wording import said_otherwise

FOLDER = Path(__file__).with_name("classics")
HELD_OUT = "held_out"
"""The file of the classics that are never learned from."""


@dataclass
class Classic:
    name: str
    names: tuple[str, ...] = ()
    domain: str = ""
    parameters: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    """Name, other names, annotation."""
    returns: str = ""
    says: list[str] = field(default_factory=list)
    asks: list[str] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    renames: dict[str, tuple[str, ...]] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    is_class: bool = False
    held_out: bool = False


@functools.cache
def classics() -> tuple[Classic, ...]:
    """All of them, those that are held out too. Raises ValueError for an entry that can't be read."""
    found: list[Classic] = []
    for path in sorted(FOLDER.glob("*.txt")):
        for entry in read_classics(path.read_text(encoding="utf-8")):
            entry.held_out = path.stem == HELD_OUT
            found.append(entry)
    names = [entry.name for entry in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"classics are there twice: {', '.join(sorted(twice))}")
    return tuple(found)


def read_classics(text: str) -> Iterator[Classic]:
    for part in re.split(r"^(?== )", text, flags=re.MULTILINE)[1:]:
        yield _read(part)


def _read(part: str) -> Classic:
    head, *bodies = re.split(r"^:\n", part, flags=re.MULTILINE)
    first, *lines = head.rstrip("\n").split("\n")
    name, *rest = (piece.strip() for piece in first[2:].split("|"))
    names = tuple(n.strip() for n in rest[0].split(",") if n.strip()) if rest else ()
    entry = Classic(name, names, rest[1] if len(rest) > 1 else "")
    for line in lines:
        mark, _, value = line.partition(" ")
        if mark == "class":
            entry.is_class = True
        elif mark.startswith("("):
            entry.parameters, entry.returns = _signature(line)
        elif mark == "-":
            entry.says.append(value)
        elif mark == "?":
            entry.asks.append(value)
        elif mark == "+":
            entry.imports.append(value)
        elif mark == "!":
            entry.checks.append(value)
        elif mark == ">":
            arguments, _, result = value.rpartition(" -> ")
            entry.examples.append((arguments, result))
        elif mark == "~":
            old, _, others = value.partition(":")
            entry.renames[old.strip()] = tuple(o.strip() for o in others.split(","))
        elif line.strip():
            raise ValueError(f"{name}: a line {line!r} begins with no known mark")
    entry.bodies = [body.strip("\n") for body in bodies]
    if not entry.bodies or not entry.says or not (entry.examples or entry.checks):
        raise ValueError(f"{name} lacks a body, a sentence or examples")
    return entry


def _signature(line: str) -> tuple[tuple[tuple[str, tuple[str, ...], str], ...], str]:
    inside, _, returns = line.rpartition(" -> ")
    parameters = []
    for piece in inside.strip()[1:-1].split(";"):
        if piece.strip():
            names, _, kind = piece.partition(":")
            name, *others = (n.strip() for n in names.split("="))
            parameters.append((name, tuple(o for n in others for o in n.split("/")), kind.strip()))
    return tuple(parameters), returns.strip()


def classic(rng: random.Random, held_out: bool = False) -> Exercise:
    """A classic drawn by chance, in one rendering."""
    return render(rng.choice([entry for entry in classics() if entry.held_out == held_out]), rng)


def render(entry: Classic, rng: random.Random, body: str | None = None, plain: bool = False) -> Exercise:
    """One rendering: names drawn by chance, or with `plain` those that stand first."""
    body = rng.choice(entry.bodies) if body is None else body
    taken = set(re.findall(r"\w+", body)) | {name for name, _, _ in entry.parameters}
    renames: dict[str, str] = {}

    def rename(name: str, others: tuple[str, ...], rate: float) -> None:
        free = [other for other in others if other not in taken]
        if free and not plain and rng.random() < rate:
            renames[name] = rng.choice(free)
            taken.add(renames[name])

    for name, others, _ in entry.parameters:
        rename(name, others, 0.55)
    for name, others in entry.renames.items():
        if name in taken:
            rename(name, others, 0.5)
    own = entry.name if plain or not entry.names or rng.random() < 0.5 else rng.choice(entry.names)
    if own in taken and own != entry.name:
        own = entry.name
    renames[entry.name] = own
    code = exchange(body, renames)
    words = {name: renames.get(name, name) for name, _, _ in entry.parameters}
    says = _exchange_words(rng.choice(entry.says) if not plain else entry.says[0], words)
    if not plain and not entry.is_class and rng.random() < 0.3:
        says = said_otherwise(says, rng, nouns=not set(words.values()) & set(says.split()))
    asks = rng.choice(entry.asks) if entry.asks else ""
    kinds = " ".join([*(kind for _, _, kind in entry.parameters), entry.returns])
    imports = tuple(i for i in entry.imports if i.split()[-1] in body or i.split()[-1] in kinds)
    key = f"classic: {entry.name}"
    checks = tuple(exchange(check, {entry.name: own}) for check in entry.checks)
    if entry.is_class:
        whole = _with_summary(code, says, rng)
        return Exercise(key, entry.domain, own, (), "", says, (), (), asks, imports, whole=whole, checks=checks)
    parameters = tuple(Parameter(words[name], kind or "object") for name, _, kind in entry.parameters)
    examples = entry.examples if plain else rng.sample(entry.examples, len(entry.examples))
    # Where there are calls and results, the other statements make what the calls need.
    setup, checks = ("\n".join(checks), ()) if examples else ("", checks)
    return Exercise(
        key, entry.domain, own, parameters, entry.returns, says, tuple(code.split("\n")), tuple(examples), asks,
        imports,
        setup=setup, checks=checks,
    )  # fmt: skip


def _with_summary(code: str, says: str, rng: random.Random) -> str:
    """A class's code, mostly with a docstring."""
    decorator, at, rest = code.partition("class ")
    first, _, rest = rest.partition("\n")
    first = decorator + at + first
    if rng.random() < 0.2:
        return code
    stop = "." if rng.random() < 0.9 else ""
    blank = "\n" if rng.random() < 0.7 else ""
    return f'{first}\n    """{says}{stop}"""\n{blank}{rest}'


def exchange(code: str, renames: Mapping[str, str]) -> str:
    """Code with names exchanged, but not attributes and keyword arguments' values' texts; those in f-strings too."""
    renames = {old: new for old, new in renames.items() if old != new}
    if not renames:
        return code
    lines = code.split("\n")
    edits: list[tuple[int, int, int, str]] = []
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(code + "\n").readline):
        if token.type == tokenize.NAME and token.string in renames and before != ".":
            edits.append((token.start[0] - 1, token.start[1], token.end[1], renames[token.string]))
        elif token.type == tokenize.STRING and token.string[:1] in "fF" and token.start[0] == token.end[0]:
            new = re.sub(r"\{[^{}]*\}", lambda m: _exchange_words(m.group(), renames), token.string)
            edits.append((token.start[0] - 1, token.start[1], token.end[1], new))
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = token.string
    for line, start, end, new in reversed(edits):
        lines[line] = lines[line][:start] + new + lines[line][end:]
    return "\n".join(lines)


def _exchange_words(text: str, renames: Mapping[str, str]) -> str:
    names = [name for name in renames if name]
    if not names:
        return text
    pattern = r"(?<![\w'.])(" + "|".join(map(re.escape, names)) + r")(?![\w'])"
    return re.sub(pattern, lambda match: renames[match.group()], text)
