"""One rendering of a task: a function or class, what it is to do in English, and examples that it has to agree with.

The same rendering is shown in many ways: with a docstring of one line or in the style of Google, NumPy or doctest,
with annotations or without, with a comment above it, with tests below it, or as a question and its answer.
"""

from __future__ import annotations

import random
import textwrap
from dataclasses import dataclass, field, replace

INDENT = "    "


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    """The annotation."""
    about: str = ""
    """For the docstring's list of arguments."""


@dataclass(frozen=True)
class Exercise:
    key: str
    """The composition: which operations it is made of. What is held out, is held out by it."""
    domain: str
    name: str
    parameters: tuple[Parameter, ...]
    returns: str
    says: str
    """What it does, in the imperative and without a full stop: "Return the sum of the even numbers in numbers"."""
    body: tuple[str, ...]
    """Lines, without the function's own indent."""
    examples: tuple[tuple[str, str], ...]
    """Arguments and what comes of them, as Python writes both."""
    asks: str = ""
    """The same for people who don't see the parameters: "Return the sum of the even numbers in a list"."""
    imports: tuple[str, ...] = ()
    before: str = ""
    """Definitions that the function needs."""
    setup: str = ""
    """Statements that the tests need."""
    whole: str = ""
    """The code of a class, which has no head and body of its own."""
    checks: tuple[str, ...] = ()
    """Statements that test it, where calls and results don't: of a class."""
    summary: str = ""
    """A class's docstring."""
    style: Style = field(default_factory=lambda: Style())

    @property
    def question(self) -> str:
        return self.asks or self.says

    def head(self) -> str:
        """The text up to the end of the docstring: what a completion starts from."""
        if self.whole:
            lines = self.whole.split("\n")
            methods = [n for n, line in enumerate(lines) if line.startswith("    def ")]
            end = methods[1] if len(methods) > 1 else methods[0] + 1 if methods else 2
            return self._top() + "\n".join(lines[:end]).rstrip() + "\n"
        return self._top() + self._signature() + self._docstring()

    def code(self) -> str:
        """All of it, with a newline at its end."""
        if self.whole:
            return self._top() + self.whole.rstrip("\n") + "\n"
        lines = [INDENT + line if line else "" for line in self.body]
        return self.head() + "\n".join(lines) + "\n"

    def tests(self) -> str:
        """Statements that pass if the code is right."""
        calls = [f"assert {self.name}({arguments}) == {result}" for arguments, result in self.examples]
        return "\n".join([*([self.setup] if self.setup else []), *calls, *self.checks]) + "\n"

    def _top(self) -> str:
        top = "\n".join(self.imports)
        parts = [part for part in (top, self.before.strip("\n")) if part]
        return "\n\n\n".join(parts) + "\n\n\n" if parts else ""

    def _signature(self) -> str:
        if self.style.annotated:
            inside = ", ".join(f"{p.name}: {p.kind}" for p in self.parameters)
            return f"def {self.name}({inside}) -> {self.returns}:\n"
        return f"def {self.name}({', '.join(p.name for p in self.parameters)}):\n"

    def _docstring(self) -> str:
        style = self.style
        if style.docstring == "none":
            return ""
        if style.docstring == "comment":
            return f"{INDENT}# {self.says}\n"
        sentence = self.says if style.imperative else third_person(self.says)
        sentence += "." * (style.full_stop or sentence.endswith('"'))
        lines = ["", *self._details()]
        if not any(lines):
            if style.open_line:
                return textwrap.indent(f'"""\n{sentence}\n"""\n', INDENT)
            return f'{INDENT}"""{sentence}"""\n'
        first = '"""\n' + sentence if style.open_line else '"""' + sentence
        return textwrap.indent("\n".join([first, *lines, '"""']) + "\n", INDENT)

    def _details(self) -> list[str]:
        style = self.style
        if style.docstring == "google":
            lines = ["Args:"] if self.parameters else []
            lines += [f"{INDENT}{p.name}: {_about(p)}." for p in self.parameters]
            return [*lines, *([""] if lines else []), "Returns:", f"{INDENT}{_what(self.says)}."]
        if style.docstring == "numpy":
            lines = ["Parameters", "----------"] if self.parameters else []
            for p in self.parameters:
                lines += [f"{p.name} : {p.kind}", f"{INDENT}{_about(p)}."]
            return [*lines, *([""] if lines else []), "Returns", "-------", self.returns]
        if style.docstring == "sphinx":
            lines = [f":param {p.name}: {_about(p)}" for p in self.parameters]
            return [*lines, f":return: {_what(self.says)}"]
        if style.docstring == "doctest":
            lines = []
            for arguments, result in self.examples[: style.shown]:
                lines.append(f">>> {self.name}({arguments})")
                lines += [] if result == "None" else [result]
            return lines
        return []


@dataclass(frozen=True)
class Style:
    docstring: str = "line"
    """none, comment, line, google, numpy, sphinx or doctest."""
    annotated: bool = False
    imperative: bool = True
    full_stop: bool = True
    open_line: bool = False
    """Whether the docstring's text begins on the line after its quotes."""
    shown: int = 2
    """Examples in a doctest."""


_DOCSTRINGS = ("none", "comment", "line", "google", "numpy", "sphinx", "doctest")
IN_FILES, IN_ANSWERS = (7, 3, 56, 9, 4, 4, 17), (30, 2, 60, 3, 0, 0, 5)
"""How often each style of docstring, in 100: answers in a dialog are short."""


def draw_style(rng: random.Random, weights: tuple[int, ...] = IN_FILES) -> Style:
    return Style(
        docstring=rng.choices(_DOCSTRINGS, weights)[0],
        annotated=rng.random() < 0.45,
        imperative=rng.random() < 0.75,
        full_stop=rng.random() < 0.85,
        open_line=rng.random() < 0.2,
        shown=rng.choice((1, 2, 2, 3)),
    )


def styled(exercise: Exercise, rng: random.Random, weights: tuple[int, ...] = IN_FILES) -> Exercise:
    """The exercise in a style drawn by chance. What a doctest shows must be short, and nothing that is made first."""
    style = draw_style(rng, weights)
    shown = exercise.examples[: style.shown]
    if style.docstring == "doctest" and (
        exercise.setup or not shown or any(len(a) + len(r) > 90 or "\\n" in a + r for a, r in shown)
    ):
        style = replace(style, docstring="line")
    if style.docstring in ("google", "numpy", "sphinx") and not exercise.parameters:
        style = replace(style, docstring="line")
    return replace(exercise, style=style)


def third_person(sentence: str) -> str:
    """ "Return the sum" as "Returns the sum"; of "Sort … and return …" the second verb too."""
    verb, space, rest = sentence.partition(" ")
    for second in ("return", "count", "sort", "join", "add", "remove", "reverse", "keep"):
        rest = rest.replace(f" and {second} ", f" and {third(second)} ")
    return third(verb) + space + rest


def third(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return f"{verb}es"
    if verb.endswith("y") and verb[-2:-1] not in "aeiou":
        return f"{verb[:-1]}ies"
    return f"{verb}s"


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _about(parameter: Parameter) -> str:
    about = parameter.about or _ABOUT.get(parameter.kind, f"the {parameter.name}")
    return about[:1].upper() + about[1:]


def _what(says: str) -> str:
    """What is returned, where the sentence says so; else the sentence's doing."""
    verb, _, rest = says.partition(" ")
    if verb in ("Return", "Compute", "Calculate", "Get", "Find"):
        return rest[:1].upper() + rest[1:]
    return "The result"


_ABOUT = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a flag",
    "list[int]": "a list of numbers",
    "list[str]": "a list of strings",
    "list": "a list",
    "dict[str, int]": "a dictionary of numbers",
    "list[list[int]]": "a matrix as a list of rows",
}
