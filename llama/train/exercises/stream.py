"""The world as a stream: exercises that passed their tests, documents made of them, and dialogs.

All comes from a seed, and nothing is stored. What the splits are made by is the composition: a combination of two
operations or more is held out by its hash, whatever its names, constants and renderings; classics are held out by
their file.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from llama.evals.sandbox import Limits, Sandbox, sandbox
from llama.train.exercises.classics import classic
from llama.train.exercises.exercise import IN_ANSWERS, IN_FILES, INDENT, Exercise, lower_first, styled, third_person
from llama.train.exercises.objects import collection, record
from llama.train.exercises.pipelines import GENERIC, pipeline
from llama.train.exercises.transforms import chain, decision, paired
from llama.train.exercises.wording import asked_by_people, said_otherwise

HELD_OUT_ONE_IN = 16
BATCH = 64
"""Exercises that are tested by one program; of a failing program each is tested alone."""
FAMILIES, WEIGHTS = (pipeline, chain, decision, paired, record, collection), (60, 14, 8, 5, 7, 6)
CLASSICS = 0.45
"""The part of the exercises that are classics."""


def is_held_out(key: str) -> bool:
    """Whether a composition is held out. One operation alone never is: everybody has to know it."""
    operations = [part for part in key.partition(":")[2].split("·") if part.strip()]
    if key.startswith("classic") or len(operations) < 2:
        return False
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw(
    rng: random.Random, held_out: bool = False, classics: float = CLASSICS, weights: tuple[int, ...] = IN_FILES
) -> Exercise:
    """An exercise in a style, not tested yet; with `held_out` of a composition that is."""
    while True:
        if rng.random() < classics:
            return styled(classic(rng, held_out), rng, weights)
        found = rng.choices(FAMILIES, WEIGHTS)[0](rng)
        if found is not None and is_held_out(found.key) == held_out:
            exercise = styled(found, rng, weights)
            if not (exercise.name in GENERIC and exercise.style.docstring == "none"):
                return exercise


def exercises(
    seed: str, held_out: bool = False, classics: float = CLASSICS, weights: tuple[int, ...] = IN_FILES
) -> Iterator[Exercise]:
    """Exercises that passed, without end, none with the code of another."""
    rng = random.Random(f"exercises {seed}")
    seen: set[bytes] = set()
    with sandbox(Limits(seconds=20)) as place:
        while True:
            batch: list[Exercise] = []
            while len(batch) < BATCH:
                exercise = draw(rng, held_out, classics, weights)
                mark = hashlib.blake2b(exercise.code().encode(), digest_size=8).digest()
                if mark not in seen or (exercise.key.startswith("classic") and rng.random() < 0.3):
                    seen.add(mark)
                    batch.append(exercise)
            yield from passing(batch, place)


def passing(batch: Sequence[Exercise], place: Sandbox) -> list[Exercise]:
    """Those whose code passes their tests."""
    programs = [exercise.code() + "\n" + exercise.tests() for exercise in batch]
    together = "\n".join(f"exec({program!r}, {{'__name__': '__main__'}})" for program in programs)
    if next(place.run([together])).passed:
        return list(batch)
    middle = len(batch) // 2
    return [*passing(batch[:middle], place), *passing(batch[middle:], place)] if middle else []


# Documents --------------------------------------------------------------------------------------------------------


def documents(seed: str, classics: float = CLASSICS) -> Iterator[str]:
    """Texts to learn from: a function, alone, with tests, with a call, or with others and a main."""
    rng = random.Random(f"documents {seed}")
    stream = exercises(seed, classics=classics)
    for exercise in stream:
        kind = rng.random()
        if kind < 0.82:  # most end with the function: so the model learns to stop there
            yield exercise.code()
        elif kind < 0.86:
            yield with_tests(exercise, rng)
        elif kind < 0.89:
            yield with_comment(exercise)
        elif kind < 0.91:
            yield with_print(exercise)
        else:
            others = list(islice(stream, rng.choice((1, 1, 2, 3))))
            yield module([exercise, *others], rng)


def with_tests(exercise: Exercise, rng: random.Random) -> str:
    calls = [line for line in exercise.tests().rstrip("\n").split("\n") if len(line) < 100]
    if not exercise.examples or exercise.setup or not calls:
        return exercise.code()
    if rng.random() < 0.5:
        return exercise.code() + "\n\n" + "\n".join(calls) + "\n"
    body = "\n".join(INDENT + call for call in calls[:3])
    return f"{exercise.code()}\n\ndef test_{exercise.name}():\n{body}\n"


def with_comment(exercise: Exercise) -> str:
    return f"# {exercise.question}.\n{exercise.code()}"


def with_print(exercise: Exercise) -> str:
    short = [arguments for arguments, result in exercise.examples if len(arguments + result) < 70]
    if exercise.setup or not short:
        return exercise.code()
    return f"{exercise.code()}\n\nprint({exercise.name}({short[0]}))\n"


def module(parts: Sequence[Exercise], rng: random.Random) -> str:
    """Some functions in one file, each name once, imports at the top, now and then with a main that calls them."""
    chosen: list[Exercise] = []
    names: set[str] = set()
    for part in parts:
        defined = {part.name} | {line.split()[1].partition("(")[0].rstrip(":") for line in part.before.split("\n")
                                 if line.startswith(("def ", "class "))}  # fmt: skip
        if not defined & names:
            names |= defined
            chosen.append(part)
    imports = sorted({line for part in chosen for line in part.imports})
    texts = []
    for part in chosen:
        code = part.code()
        for line in part.imports:
            code = code.replace(line + "\n", "", 1)
        texts.append(code.strip("\n"))
    called = [(p.name, p.examples[0][0]) for p in chosen if p.examples and not p.setup and len(p.examples[0][0]) < 60]
    if called and rng.random() < 0.5:
        lines = [f"{INDENT}print({name}({arguments}))" for name, arguments in called]
        texts.append("def main():\n" + "\n".join(lines))
        texts.append('if __name__ == "__main__":\n    main()')
    return "\n\n\n".join([*(["\n".join(imports)] if imports else []), *texts]) + "\n"


# Dialogs ----------------------------------------------------------------------------------------------------------

SYSTEMS = (
    "Provide answers in Python", "You are a helpful assistant who writes Python.", "Answer with code only.",
    "Answer with Python code alone.", "You are a Python programmer.", "You write short, correct Python functions.",
    "You are a coding assistant.", "Reply with Python code and nothing else.", "Be concise.",
    "You are an expert Python programmer. Write clean code.",
)  # fmt: skip
_BY_THIRD = (
    "Write a Python function that {does}.", "Write a function that {does}.",
    "Write a Python function `{name}` that {does}.",
    "Write a function `{name}({parameters})` that {does}.", "Can you write a function that {does}?",
    "Please write a Python function that {does}.", "I need a function that {does}.",
    "Create a Python function that {does}.",
    "Write a function called {name} that {does}.", "Give me a Python function that {does}.",
    "Implement a function {name}({parameters}) that {does}.", "Define a function `{name}` that {does}.",
    "Show me a function that {does}.", "Write a short function that {does}.",
    "Could you give me a function that {does}?",
    "Write a Python function named {name} which {does}.", "Help me write a function that {does}.",
    "Write python code for a function that {does}", "write a function that {does}", "a python function that {does}",
)  # fmt: skip
_BY_VERB = (
    "Write a Python function to {do}.", "Write a function to {do}.", "How do I {do} in Python?", "How can I {do}?",
    "Write code to {do}.", "I want to {do}. Write the function.", "{Do}.", "{Do} in Python.", "Python: {do}",
    "Implement `{name}({parameters})`: {do}.", "Write a function `{name}` to {do}.", "Can you {do} in Python?",
    "Need a function to {do}.", "How would you {do}?", "Write a function named {name} to {do}.",
    "python function to {do}",
    "Please implement {name}: {do}.", "Give me Python code to {do}.",
)  # fmt: skip
_OF_CLASS = (
    "{Do}.", "Please {do}.", "Can you {do}?", "{Do} in Python.", "I need you to {do}.", "{Do}. Use Python.",
    "Help me {do}.", "{Do}. Call it {name}.", "{Do}, named `{name}`.",
)  # fmt: skip
_COMPLETE = (
    "Complete this function:\n{head}", "Fill in this Python function:\n{head}", "Complete the code:\n{head}",
    "Finish this function:\n{head}", "Implement this function:\n{head}", "Write the body of this function:\n{head}",
    "{head}", "Complete the following Python code:\n\n{head}",
)  # fmt: skip
_DOCUMENT = (
    "Write a docstring for this function:\n{code}", "Document this function:\n{code}", "Add a docstring:\n{code}",
    "What does this function do?\n{code}", "Explain this code:\n{code}", "What does this code do?\n\n{code}",
)  # fmt: skip
_TEST = (
    "Write tests for this function:\n{code}", "Write unit tests for this function:\n{code}",
    "Test this function with some asserts:\n{code}",
)  # fmt: skip
_FIX = (
    "Fix this function:\n{code}", "This function is wrong. It should {do}. Fix it:\n{code}",
    "Find the bug:\n{code}", "What is wrong with this code? It should {do}.\n{code}",
    "There is a bug in this function, correct it:\n{code}",
)  # fmt: skip
_RENAME = ("Rename `{old}` to `{new}`:\n{code}", "Change the name of {old} to {new} in this code:\n{code}")


def dialogs(seed: str, classics: float = CLASSICS) -> Iterator[tuple[str, str, str]]:
    """System message (mostly empty), question and answer; the answer is code, or for "what does it do" a sentence."""
    rng = random.Random(f"dialogs {seed}")
    for exercise in exercises(f"dialogs {seed}", classics=classics, weights=IN_ANSWERS):
        found = dialog(exercise, rng)
        if found is not None:
            yield (rng.choice(SYSTEMS) if rng.random() < 0.25 else "", *found)


def dialog(exercise: Exercise, rng: random.Random) -> tuple[str, str] | None:
    """A question about an exercise, and its answer."""
    answer = exercise.code().rstrip("\n")
    kind = rng.random()
    if kind < 0.72 or exercise.whole:
        return ask(exercise, rng), answer
    if kind < 0.85:
        return (rng.choice(_COMPLETE).format(head=exercise.head().rstrip("\n")), answer) if exercise.body else None
    bare = undocumented(exercise)
    does = lower_first(exercise.says)
    if kind < 0.91:
        question = rng.choice(_DOCUMENT)
        if question.startswith(("What", "Explain")):
            return question.format(code=bare), f"It {third_person(does)}."
        first, _, rest = bare.partition("\n")
        if exercise.before or exercise.imports:
            return None
        return question.format(code=bare), f'{first}\n{INDENT}"""{exercise.says}."""\n{rest}'
    if kind < 0.94:
        if exercise.setup or not exercise.examples:
            return None
        return rng.choice(_TEST).format(code=bare), exercise.tests().rstrip("\n")
    if kind < 0.985:
        broken = broken_body(bare, rng)
        return None if broken is None else (rng.choice(_FIX).format(code=broken, do=does), bare)
    old = exercise.name
    new = rng.choice(GENERIC[1:])
    return rng.choice(_RENAME).format(old=old, new=new, code=bare), bare.replace(old, new)


_BY_NAME = (
    "{words} in Python", "Write a {words} function", "{words} function please", "Implement {words}", "python {words}",
    "Code for {words}", "I need {words} in Python.", "Can you write {words} for me?", "function for {words}",
    "How do I write {words} in Python?", "Show me {words}.", "{words}", "Please write {words}.",
)  # fmt: skip
_TAUGHT = 0.45
"""The part of the questions whose words are exchanged for others."""


def ask(exercise: Exercise, rng: random.Random) -> str:
    """The exercise asked for in words, by people."""
    is_classic = exercise.key.startswith("classic")
    if is_classic and rng.random() < 0.12:
        words = exercise.name.replace("_", " ")
        return asked_by_people(rng.choice(_BY_NAME).format(words=words), rng)
    if rng.random() < _TAUGHT:
        exercise = replace(exercise, asks=said_otherwise(exercise.question, rng))
    question = _ask(exercise, rng)
    return asked_by_people(question, rng) if rng.random() < _TAUGHT else question


def _ask(exercise: Exercise, rng: random.Random) -> str:
    do = lower_first(exercise.question)
    parameters = ", ".join(p.name for p in exercise.parameters)
    if exercise.whole:
        return rng.choice(_OF_CLASS).format(do=do, Do=exercise.question, name=exercise.name)
    form = rng.choice(_BY_THIRD + _BY_VERB)
    if "{parameters}" in form and rng.random() < 0.7:
        do = lower_first(exercise.says)
    says = do[:1].upper() + do[1:]
    return form.format(does=third_person(do), do=do, Do=says, name=exercise.name, parameters=parameters)


def undocumented(exercise: Exercise) -> str:
    style = replace(exercise.style, docstring="none")
    return replace(exercise, style=style).code().rstrip("\n")


_MISTAKES = (
    (" == 0", " == 1"), (" > ", " < "), (" < ", " > "), ("+ 1)", ")"), (" += ", " -= "), ("max(", "min("),
    ("min(", "max("), (" not in ", " in "), ("return True", "return False"), (".append(", ".remove("), (" * ", " + "),
    ("range(1, ", "range("), (" <= ", " < "), (".upper()", ".lower()"), ("[::-1]", ""), (" and ", " or "),
    (" != ", " == "), ("= 0\n", "= 1\n"),
)  # fmt: skip


def broken_body(code: str, rng: random.Random) -> str | None:
    """The code with one mistake in it, or None where none of the known ones can be made."""
    head, _, body = code.partition(":\n")
    fitting = [(old, new) for old, new in _MISTAKES if old in body]
    if not fitting:
        return None
    old, new = rng.choice(fitting)
    return head + ":\n" + body.replace(old, new, 1)
