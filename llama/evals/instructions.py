"""Answers: asked in a dialog for code, does the model answer with code, and stop?

The format is half of what instruction tuning teaches: an answer ends by itself, leaves the user's part of the dialog
to the user, and is the code asked for, not talk about it. The other half, whether the code is right, is for tests
that run it, and for a larger model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama.evals.batches import batches
from llama.evals.intervals import Share, share
from llama.evals.syntax import parse
from llama.generation import Llama
from llama.prompts import SPECIAL_TAGS, Dialog

# Code between fences or, as the paper's prompts ask for it, tags; without any, all of an answer is code.
_MARKED = re.compile(r"```(?:\w+\n)?(.*?)```|\[PYTHON\](.*?)\[/PYTHON\]", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    dialog: Dialog
    text: str
    stopped: bool
    parses: bool
    defines: bool


@dataclass(frozen=True)
class Instructions:
    stopped: Share
    """The answer ended by itself, without a tag of the dialog's format in it."""
    parsed: Share
    """Its code parses, and there is some."""
    defined: Share
    """And it defines a function or a class: a word of prose may parse as a name, too."""
    samples: tuple[Answer, ...]


def answer_dialogs(
    llama: Llama, dialogs: Sequence[Dialog], max_gen_len: int = 256, progress: bool = False
) -> Instructions:
    """Greedy answers to dialogs that ask for Python. Raises ValueError where there are none, and as chat_completion."""
    if not dialogs:
        raise ValueError("there are no dialogs to answer: give at least one that asks for code")
    samples: list[Answer] = []
    for batch in batches(llama, dialogs, "dialogs", progress):
        results = llama.chat_completion(batch, temperature=0.0, max_gen_len=max_gen_len)
        for dialog, result in zip(batch, results, strict=True):
            text = result["generation"]["content"]
            stopped = result["finish_reason"] == "stop" and not any(tag in text for tag in SPECIAL_TAGS)
            tree = parse(code_of(text))
            parses = tree is not None and bool(tree.body)
            samples.append(Answer(dialog, text, stopped, parses, tree is not None and _defines(tree)))
    n = len(samples)
    return Instructions(
        share(sum(sample.stopped for sample in samples), n),
        share(sum(sample.parses for sample in samples), n),
        share(sum(sample.defines for sample in samples), n),
        tuple(samples),
    )


def code_of(answer: str) -> str:
    """What of an answer is code: the marked parts one after the other, or all of it where nothing is marked."""
    marked = [fenced or tagged for fenced, tagged in _MARKED.findall(answer)]
    return "\n".join(marked) if marked else answer.strip()


def _defines(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in tree.body)
