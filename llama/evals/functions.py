"""Completion: given the head of a function, does the model write a body that is Python?

The prompt is a held-out function from `def` to the end of its docstring, by itself and without its place's indent.
The model writes on greedily until the function ends, which in Python is the first line that isn't indented. Whether
the result parses says nothing of whether it works, but a small model has to know indentation, brackets, strings and
statements for it; what it wrote is kept, to be looked at.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from llama.evals.batches import batches
from llama.evals.intervals import Share, share
from llama.evals.sources import Source, choose, with_text
from llama.evals.syntax import functions, parse
from llama.generation import Llama

# A line that begins with anything but white space ends the function. Those that begin with ASCII end the generation
# too, which only saves time: what counts is `cut`.
STOP = tuple(f"\n{character}" for character in string.printable if not character.isspace())
_END = re.compile(r"\n(?=\S)")
# A blank line, a comment, or the head of a block.
_SAYS_NOTHING = re.compile(r"^\s*(#.*)?$|:\s*$")


@dataclass(frozen=True)
class Head:
    """`prompt` ends with the last line of the docstring, without its newline; `body` is what its author wrote next."""

    path: str
    name: str
    prompt: str
    body: str


@dataclass(frozen=True)
class Completion:
    head: Head
    text: str
    ended: bool
    parses: bool


@dataclass(frozen=True)
class Functions:
    parsed: Share
    """Head and completion parse, and the function has a statement besides its docstring."""
    ended: Share
    """The function came to its end within max_gen_len tokens."""
    samples: tuple[Completion, ...]


def complete_functions(
    llama: Llama,
    sources: Sequence[Source],
    n: int = 200,
    max_gen_len: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Functions:
    """Greedy completions of `n` function heads with a docstring; of fewer, where `sources` don't have as many.

    Left out are heads that leave no room for `max_gen_len` tokens in max_seq_len. Raises ValueError where none is left.
    """
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 function has to be completed")
    # By prompt, since the same head twice would be one answer counted twice.
    different = {head.prompt: head for source in with_text(sources) for head in heads(source)}
    found = choose(different.values(), None, lambda head: head.prompt, seed)
    room = llama.model.args.max_seq_len - max_gen_len
    fitting = (h for h in found if len(llama.tokenizer.encode(h.prompt, bos=True, eos=False)) <= room)
    asked = list(islice(fitting, n))
    if not asked:
        raise ValueError(
            f"none of {len(found)} functions with a docstring fits into {room} tokens: give more files, a smaller "
            f"max_gen_len than {max_gen_len}, or build with a larger max_seq_len"
        )
    samples: list[Completion] = []
    for batch in batches(llama, asked, "functions", progress):
        prompts = [head.prompt for head in batch]
        results = llama.text_completion(prompts, temperature=0.0, max_gen_len=max_gen_len, stop=STOP)
        for head, result in zip(batch, results, strict=True):
            ended = result["finish_reason"] == "stop"
            text = cut(result["generation"], ended)
            samples.append(Completion(head, text, ended, is_written(head.prompt + text)))
    return Functions(
        share(sum(sample.parses for sample in samples), len(samples)),
        share(sum(sample.ended for sample in samples), len(samples)),
        tuple(samples),
    )


def heads(source: Source) -> Iterator[Head]:
    """The functions of a file that have a docstring and something after it."""
    for function in functions(source.text):
        if function.head_lines is not None:
            lines = function.code.split("\n")
            prompt, body = lines[: function.head_lines], lines[function.head_lines :]
            yield Head(source.path, function.name, "\n".join(prompt), "\n" + "\n".join(body))


def cut(text: str, ended: bool = True) -> str:
    """A completion up to the first line that isn't indented. One that did not end by itself is broken off before the
    line that it was at, and before a block that it only opened: the break is the measure's doing, not the model's."""
    end = _END.search(text)
    if end:
        return text[: end.start()]
    if ended:
        return text
    lines = text.split("\n")[:-1]
    while lines and _SAYS_NOTHING.search(lines[-1]):
        lines.pop()
    return "\n".join(lines)


def is_written(code: str) -> bool:
    """Whether `code` is a function with more than a docstring: a head alone parses too."""
    tree = parse(code)
    written = tree.body[:1] if tree else []
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1 for node in written)
