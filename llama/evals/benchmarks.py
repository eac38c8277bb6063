"""Benchmarks as data: where the tasks are, how a prompt is made, what ends an answer, and which program judges it.

A benchmark of one's own is one more row: a `Dataset`, a function from a row of it to a `Task`, a function from a task
and a completion to a program, and a table of protocols. A protocol is how a model is asked; each names its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama.evals.datasets import Dataset, Rows, read

Kind = Literal["completion", "infilling", "chat"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    id: str
    prompt: str
    """What stands before the completion."""
    suffix: str = ""
    """What stands after it, for infilling."""
    solution: str = ""
    """One that is right, where the benchmark has one."""
    row: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """How a model is asked."""

    source: str
    kind: Kind = "completion"
    prompt: Callable[[Task, Sequence[Task]], str] = lambda task, shots: task.prompt
    stop: tuple[str, ...] = ()
    """What ends an answer, and is no part of it."""
    extract: Callable[[str], str] = str
    """From what the model wrote to the completion that is judged."""
    suffix_first: bool = False
    max_gen_len: int = 512


@dataclass(frozen=True)
class Benchmark:
    name: str
    dataset: Dataset
    task: Callable[[Row], Task]
    program: Callable[[Task, str], str]
    protocols: Mapping[str, Protocol]
    """The first is the paper's."""
    chosen: Callable[[Task], bool] = lambda task: True
    """Which tasks are measured; the others may be shots."""
    seconds: float = 3.0
    title: str = ""

    def read(self, data: str | Path | None = None) -> tuple[list[Task], list[Task], Rows]:
        """The tasks, all of the file (for shots), and the rows with their checksum."""
        rows = read(self.dataset, data)
        every = [self.task(row) for row in rows.rows]
        return [task for task in every if self.chosen(task)], every, rows


# HumanEval and infilling --------------------------------------------------------------------------------------------


def _humaneval_task(row: Row) -> Task:
    return Task(row["task_id"], row["prompt"], row.get("suffix", ""), row["canonical_solution"], row)


def _humaneval_program(task: Task, completion: str) -> str:
    return f"{task.prompt}{completion}{task.suffix}\n{task.row['test']}\ncheck({task.row['entry_point']})"


def _answered(text: str) -> str:
    """The code of a chat's answer: between [PYTHON] tags or fences, or else all of it."""
    for begin, end in (("[PYTHON]", "[/PYTHON]"), ("```python\n", "```"), ("```\n", "```")):
        if begin in text:
            return text.split(begin, 1)[1].split(end, 1)[0].strip("\n")
    return text.split("[/PYTHON]", 1)[0].split("```", 1)[0]


PAPER = "arXiv 2308.12950"
CODEX = "arXiv 2107.03374, section 2.1"
CODEX_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint")
EVALPLUS_STOPS = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ", "\nif __name__", "\nprint(")

HUMANEVAL_PROTOCOLS = {
    "paper": Protocol(f"{PAPER}, table 2: zero-shot; stops of {CODEX}", stop=CODEX_STOPS),
    "bigcode": Protocol("bigcode-evaluation-harness, humaneval", stop=(*CODEX_STOPS, "\n@", "\n```")),
    "evalplus": Protocol("evalplus, stops of a base model", stop=EVALPLUS_STOPS),
    "stripped": Protocol(
        "prompts without the white space at their end, as some harnesses send them; worse for Code Llama",
        prompt=lambda task, shots: task.prompt.rstrip(), stop=CODEX_STOPS,
    ),
}  # fmt: skip
_HUMANEVAL = "https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/"
_INFILLING = (
    "https://raw.githubusercontent.com/openai/human-eval-infilling/88062ff9859c875d04db115b698ed4b0f0395170/data/"
)
INFILLING_PROTOCOLS = {
    "psm": Protocol(f"{PAPER}, table 6 and section 2.3: prefix, suffix, middle", kind="infilling"),
    "spm": Protocol(
        f"{PAPER}, appendix E: suffix first; without token healing, so for prefixes that end at a line's end",
        kind="infilling", suffix_first=True,
    ),
}  # fmt: skip


def _infilling(name: str, file: str, sha256: str) -> Benchmark:
    dataset = Dataset(f"infilling/{file}.jsonl.gz", f"{_INFILLING}{file}.jsonl.gz", sha256, "MIT")
    title = f"HumanEval-Infilling, {name.partition(':')[2]}"
    return Benchmark(name, dataset, _humaneval_task, _humaneval_program, INFILLING_PROTOCOLS, title=title)


# MBPP ---------------------------------------------------------------------------------------------------------------

MBPP_SHOTS = ("2", "3", "4")


def _mbpp_task(row: Row) -> Task:
    return Task(str(row["task_id"]), row["text"], "", row["code"], row)


def _mbpp_program(task: Task, completion: str) -> str:
    return "\n".join([completion, task.row.get("test_setup_code", ""), *task.row["test_list"]])


def _mbpp_question(task: Task) -> str:
    tests = "\n".join(task.row["test_list"])
    asked = "You are an expert Python programmer, and here is your task:"
    return f"{asked} {task.prompt} Your code should pass these tests:\n\n{tests}\n"


def mbpp_three_shot(task: Task, every: Sequence[Task]) -> str:
    shots = [shot for shot in every if shot.id in MBPP_SHOTS]
    code = [shot.solution.replace("\r\n", "\n") for shot in shots]
    told = [f"{_mbpp_question(shot)}[BEGIN]\n{own}\n[DONE]\n" for shot, own in zip(shots, code, strict=True)]
    return "".join(told) + f"{_mbpp_question(task)}[BEGIN]\n"


def mbpp_docstring(task: Task, every: Sequence[Task]) -> str:
    return f'"""\n{task.prompt}\n{task.row["test_list"][0]}\n"""\n'


def mbpp_instruct(task: Task, every: Sequence[Task]) -> str:
    tests = "\n".join(task.row["test_list"])
    return (
        f"{task.prompt} Your code should pass these tests:\n\n{tests}\n"
        "Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag."
    )


MBPP_PROTOCOLS = {
    "paper": Protocol(
        f"{PAPER}, table 2: 3-shot; format and shots (task ids 2, 3, 4) of arXiv 2108.07732",
        prompt=mbpp_three_shot, stop=("[DONE]",),
    ),
    "instruct": Protocol(
        f"{PAPER}, figure 13: zero-shot, as a dialog", kind="chat", prompt=mbpp_instruct, stop=("[/PYTHON]",),
        extract=_answered,
    ),
    "bigcode": Protocol(
        "bigcode-evaluation-harness, mbpp: zero-shot, a docstring with the first test",
        prompt=mbpp_docstring, stop=("\nclass", "\nassert", '\n"""', "\nprint", "\nif"),
    ),
}  # fmt: skip
_MBPP = (
    "https://raw.githubusercontent.com/deepseek-ai/DeepSeek-Coder/2f9fd85927c669dae3c0fbb2d607274023af243e/"
    "Evaluation/MBPP/data/mbpp.jsonl"
)

HumanEval = Benchmark(
    "humaneval",
    Dataset(
        "humaneval/HumanEval.jsonl.gz", f"{_HUMANEVAL}HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef", "MIT",
    ),
    _humaneval_task, _humaneval_program, HUMANEVAL_PROTOCOLS, title="HumanEval",
)  # fmt: skip
MBPP = Benchmark(
    "mbpp",
    Dataset(
        "mbpp/mbpp.jsonl.gz", _MBPP, "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f", "CC-BY-4.0"
    ),
    _mbpp_task, _mbpp_program, MBPP_PROTOCOLS, chosen=lambda task: 11 <= int(task.id) <= 510, seconds=10.0,
    title="MBPP",
)  # fmt: skip
_FILES = {
    "single-line": ("SingleLineInfilling", "1277073e7ddce163ef68598c2bca777f688a53df99422f097e37362090f88e1f"),
    "multi-line": ("MultiLineInfilling", "2f341612eee1d35da1357a4f365e0c0b3ba6e2b62eb491e88aaefa4855af0349"),
    "random-span": ("RandomSpanInfilling", "b4f330d8a8ff97bf85d9def497dffcae4d741e506449386a877236e422e33e8d"),
    "light": ("RandomSpanInfillingLight", "1432250ecac0cb56e6f97f8faf0970419ef892a98fda7e1f5aa4c4b87209b760"),
}
Infilling = {word: _infilling(f"infilling:{word}", f"HumanEval-{file}", sha) for word, (file, sha) in _FILES.items()}
BENCHMARKS = {bench.name: bench for bench in (HumanEval, MBPP, *Infilling.values())}
