"""What a checkpoint makes of the world: completions, answers and filled gaps, run against their tests.

Asked for are held-out compositions, held-out classics, and classics that the world contains in wordings that it never
renders (`wordings.txt`, written by hand). All is greedy. A completion or an answer counts as stopped where the model
ended it itself; what is judged is the code up to the first line that isn't indented.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llama.evals.batches import batches
from llama.evals.functions import cut
from llama.evals.instructions import code_of
from llama.evals.intervals import share
from llama.evals.sandbox import run_programs
from llama.evals.syntax import parse
from llama.generation import Llama
from llama.prompts import Dialog, Message
from llama.train.exercises.classics import classics, render
from llama.train.exercises.exercise import lower_first, third_person
from llama.train.exercises.stream import ask, exercises
from llama.train.infilling import Split

WORDINGS = Path(__file__).with_name("wordings.txt")
MAX_GEN_LEN = 220


@dataclass(frozen=True)
class Question:
    """A head to complete and a question to answer, with tests in which `{f}` is the name of what was written."""

    name: str
    head: str
    asks: str
    tests: str
    top: str = ""
    """What an answer may take for granted: imports of its annotations."""


@dataclass(frozen=True)
class Written:
    name: str
    prompt: str
    text: str
    passed: bool
    stopped: bool
    looped: bool
    error: str


def measure(
    llama: Llama, n: int = 200, seed: str = "measure", progress: bool = False, only: Sequence[str] = ()
) -> dict[str, Any]:
    """All measures by name: counts with their intervals, and what was written. `only` names some of them."""
    jobs: dict[str, Callable[[], list[Written]]] = {
        "compositions, completion": lambda: completed(llama, held_out(n, seed), progress),
        "compositions, chat": lambda: answered(llama, held_out(n, seed), progress),
        "held-out classics, completion": lambda: completed(llama, held_out_classics(), progress),
        "held-out classics, chat": lambda: answered(llama, held_out_classics(), progress),
        "other wordings, completion": lambda: completed(llama, wordings(), progress),
        "other wordings, chat": lambda: answered(llama, wordings(), progress),
        "one line, PSM": lambda: filled(llama, n, seed, one_line, False, progress),
        "one line, SPM": lambda: filled(llama, n, seed, one_line, True, progress),
        "several lines, PSM": lambda: filled(llama, n, seed, several_lines, False, progress),
        "random span, PSM": lambda: filled(llama, n, seed, span, False, progress),
    }
    unknown = [name for name in only if name not in jobs]
    if unknown:
        raise ValueError(f"there is no measure {unknown[0]!r}; there are {', '.join(jobs)}")
    return {name: counted(job()) for name, job in jobs.items() if not only or name in only}


def counted(samples: Sequence[Written]) -> dict[str, Any]:
    """Shares of what passed, stopped and looped, and the samples."""
    size = len(samples)
    return {
        "passed": asdict(share(sum(s.passed for s in samples), size)),
        "stopped": asdict(share(sum(s.stopped for s in samples), size)),
        "looped": asdict(share(sum(s.looped for s in samples), size)),
        "samples": [asdict(sample) for sample in samples],
    }


def table(figures: dict[str, Any]) -> str:
    lines = ["| measure | tests pass | stops by itself | loops |", "| --- | --- | --- | --- |"]
    for name, found in figures.items():
        cells = [
            f"{found[key]['rate']:.1%} ({found[key]['low']:.0%} to {found[key]['high']:.0%} of {found[key]['n']})"
            for key in ("passed", "stopped", "looped")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Questions --------------------------------------------------------------------------------------------------------


def held_out(n: int, seed: str) -> list[Question]:
    """Exercises of held-out compositions, with a docstring."""
    rng = random.Random(seed)
    found = (e for e in exercises(seed, held_out=True, classics=0.0) if e.body and e.style.docstring not in ("none",))
    return [
        Question(e.key, e.head(), ask(e, rng), e.tests().replace(f"{e.name}(", "{f}("),
                 "\n".join(e.imports) + "\n" + e.before)
        for e in islice(found, n)
    ]  # fmt: skip


def held_out_classics() -> list[Question]:
    rng = random.Random(0)
    found = []
    for entry in classics():
        if entry.held_out:
            e = render(entry, rng, entry.bodies[0], plain=True)
            head = e.head()
            asks = f"Write a Python function that {_third(e.question)}." if not e.whole else f"{e.question}."
            tests = e.tests().replace(f"{e.name}(", "{f}(")
            found.append(Question(entry.name, head, asks, tests, "\n".join(e.imports)))
    return found


def _third(sentence: str) -> str:
    return third_person(lower_first(sentence))


def wordings() -> list[Question]:
    """Those of `wordings.txt`: a name of a classic, a head, a question, and examples or statements."""
    found = []
    for part in re.split(r"^= ", WORDINGS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name, *lines = part.rstrip("\n").split("\n")
        head = [line for line in lines if line[:2] not in ("? ", "> ", "! ")]
        while head and not head[-1]:
            head.pop()
        asks = next(line[2:] for line in lines if line.startswith("? "))
        tests = [line[2:] for line in lines if line.startswith("! ")]
        for line in lines:
            if line.startswith("> "):
                arguments, _, result = line[2:].rpartition(" -> ")
                tests.append(f"assert {{f}}({arguments}) == {result}")
        tests = [test.replace(" f(", " {f}(") for test in tests]
        found.append(Question(name, "\n".join(head) + "\n", asks, "\n".join(tests) + "\n"))
    return found


# Answers ----------------------------------------------------------------------------------------------------------


def completed(llama: Llama, questions: Sequence[Question], progress: bool = False) -> list[Written]:
    texts: list[tuple[str, bool]] = []
    for batch in batches(llama, questions, "completions", progress):
        for result in llama.text_completion([q.head for q in batch], 0.0, max_gen_len=MAX_GEN_LEN):
            texts.append((result["generation"], result["finish_reason"] == "stop"))
    programs = []
    for question, (text, _) in zip(questions, texts, strict=True):
        code = question.head + _block(text, question.head)
        programs.append(f"{code}\n{question.tests.replace('{f}', _defined(code) or 'f')}")
    return _judged([q.head for q in questions], questions, texts, programs)


def answered(llama: Llama, questions: Sequence[Question], progress: bool = False) -> list[Written]:
    texts: list[tuple[str, bool]] = []
    for batch in batches(llama, questions, "answers", progress):
        dialogs: list[Dialog] = [[Message(role="user", content=q.asks)] for q in batch]
        for result in llama.chat_completion(dialogs, temperature=0.0, max_gen_len=MAX_GEN_LEN):
            texts.append((result["generation"]["content"], result["finish_reason"] == "stop"))
    programs = []
    for question, (text, _) in zip(questions, texts, strict=True):
        code = code_of(text)
        programs.append(f"{question.top}\n{code}\n{question.tests.replace('{f}', _defined(code) or 'f')}")
    return _judged([q.asks for q in questions], questions, texts, programs)


def _block(text: str, head: str) -> str:
    """What belongs to the function or class that the head opens."""
    if not text.startswith((" ", "\n")) and head.endswith("\n"):
        return ""
    return cut(text)


def _defined(code: str) -> str:
    """The name of the last function or class at the top level: those before it are there for it."""
    tree = parse(code)
    names = re.findall(r"^(?:def|class) (\w+)", code, flags=re.MULTILINE)
    return names[-1] if tree is not None and names else ""


def _judged(
    prompts: Sequence[str],
    questions: Sequence[Question],
    texts: Sequence[tuple[str, bool]],
    programs: Sequence[str],
) -> list[Written]:
    verdicts = run_programs(programs)
    return [
        Written(q.name, prompt, text, v.passed, stopped, loops(text), v.error)
        for q, prompt, (text, stopped), v in zip(questions, prompts, texts, verdicts, strict=True)
    ]


def loops(text: str) -> bool:
    """Whether a line of some length comes three times in a row."""
    lines = [line for line in text.split("\n") if line.strip()]
    return any(len(a.strip()) > 3 and a == b == c for a, b, c in zip(lines, lines[1:], lines[2:], strict=False))


# Gaps -------------------------------------------------------------------------------------------------------------


def one_line(text: str, head: str, rng: random.Random) -> Split:
    lines = text.split("\n")
    numbers = [n for n in range(head.count("\n"), len(lines)) if lines[n].strip()]
    return _lines(lines, rng.choice(numbers), 1)


def several_lines(text: str, head: str, rng: random.Random) -> Split:
    lines = text.rstrip("\n").split("\n")
    first = head.count("\n")
    number = rng.randrange(first, len(lines))
    return _lines([*lines, ""], number, min(rng.choice((2, 3)), len(lines) - number))


def span(text: str, head: str, rng: random.Random) -> Split:
    at, to = sorted(rng.randint(len(head), len(text) - 1) for _ in range(2))
    return Split(text[:at], text[at:to], text[to:])


def _lines(lines: Sequence[str], number: int, count: int) -> Split:
    prefix = "".join(line + "\n" for line in lines[:number])
    middle = "\n".join(lines[number : number + count])
    return Split(prefix, middle, "\n" + "\n".join(lines[number + count :]))


def filled(
    llama: Llama,
    n: int,
    seed: str,
    gap: Callable[[str, str, random.Random], Split],
    suffix_first: bool,
    progress: bool = False,
) -> list[Written]:
    """Gaps in exercises of held-out compositions."""
    rng = random.Random(seed)
    chosen = list(islice((e for e in exercises(seed, held_out=True, classics=0.0) if e.body), n))
    parts = [gap(e.code(), e.head(), rng) for e in chosen]
    texts: list[tuple[str, bool]] = []
    for batch in batches(llama, parts, "gaps", progress):
        results = llama.text_infilling(
            [p.prefix for p in batch], [p.suffix for p in batch], 0.0, max_gen_len=128, suffix_first=suffix_first
        )
        texts += [(r["generation"], r["finish_reason"] == "stop") for r in results]
    programs = [
        p.prefix + text + p.suffix + "\n" + e.tests() for p, (text, _), e in zip(parts, texts, chosen, strict=True)
    ]
    questions = [Question(e.key, "", "", "") for e in chosen]
    return _judged([f"{p.prefix}<FILL>{p.suffix}" for p in parts], questions, texts, programs)
