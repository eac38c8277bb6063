"""Key retrieval with models that know everything, nothing, or what is near."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fixtures_text import training_texts
from llama.evals.retrieval import DEPTHS, DIGITS, KEY, QUESTION, Filler, Retrieval, retrieval, retrieval_by
from llama.evals.sources import File
from llama.generation import Llama
from llama.tokenizer import Tokenizer

SOURCES = [File(f"{i}.py", text) for i, text in enumerate(training_texts())]
LENGTHS = (512, 1024)


def key_of(text: str) -> str | None:
    found = re.search(r"def my_function\(\) -> int:\n(?:.*\n)*?    return (\d\d)\n", text)
    return found[1] if found else None


def grid(found: Retrieval) -> dict[tuple[int, float], int]:
    return {(cell.length, cell.depth): cell.found.hits for cell in found.cells}


def test_model_that_knows_finds_every_key(tokenizer: Tokenizer) -> None:
    def complete(prompts: Sequence[str]) -> list[str]:
        return [f" {key_of(prompt)}\n\n" for prompt in prompts]

    found = retrieval_by(complete, tokenizer, SOURCES, LENGTHS, samples=5, rows=2)
    assert grid(found) == {(length, depth): 5 for length in LENGTHS for depth in DEPTHS}
    assert found.cells[0].found.low == pytest.approx(0.5655, abs=1e-3)  # Wilson's bound of 5 of 5


def test_model_that_always_says_one_number_finds_what_chance_gives(tokenizer: Tokenizer) -> None:
    found = retrieval_by(lambda prompts: ["42"] * len(prompts), tokenizer, SOURCES, [512], samples=30)
    assert max(grid(found).values()) <= 3


def test_model_that_sees_a_window_finds_the_keys_inside_it(tokenizer: Tokenizer) -> None:
    def complete(prompts: Sequence[str]) -> list[str]:
        seen = [tokenizer.decode(tokenizer.encode(prompt, bos=False, eos=False)[-400:]) for prompt in prompts]
        return [key_of(text) or "00" for text in seen]

    found = grid(retrieval_by(complete, tokenizer, SOURCES, LENGTHS, depths=(0.0, 0.5, 1.0), samples=6))
    assert found == {(512, 0.0): 0, (512, 0.5): 6, (512, 1.0): 6, (1024, 0.0): 0, (1024, 0.5): 0, (1024, 1.0): 6}


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_is_code_of_the_length_with_the_key_at_its_depth(tokenizer: Tokenizer, length: int) -> None:
    filler = Filler(tokenizer, SOURCES, seed=0)
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        task = filler.task(length, depth, sample=3)
        ids = tokenizer.encode(task.prompt, bos=True, eos=False)
        assert len(ids) == task.tokens
        assert length - length // 8 < len(ids) + 2 <= length
        ast.parse(task.prompt + task.key)
        key = KEY.format(key=task.key)
        before, after = task.prompt.split(key)
        assert after.endswith(QUESTION)
        shown = [len(tokenizer.encode_infilling(text)) for text in (before, after.removesuffix(QUESTION))]
        assert shown[0] / sum(shown) == pytest.approx(depth, abs=1 / 12)


def test_prompt_and_answer_fill_the_length_and_no_more(tokenizer: Tokenizer) -> None:
    filler = Filler(tokenizer, SOURCES, seed=0)
    sizes = [filler.task(512, 0.5, sample).tokens + DIGITS for sample in range(60)]
    assert 510 <= max(sizes) <= 512


def test_number_is_two_tokens_after_those_of_the_prompt(tokenizer: Tokenizer) -> None:
    task = Filler(tokenizer, SOURCES, seed=0).task(512, 0.5, sample=0)
    asked, answered = (tokenizer.encode(text, bos=True, eos=False) for text in (task.prompt, task.prompt + task.key))
    assert answered[: len(asked)] == asked
    assert len(answered) == len(asked) + 2


def test_depths_differ_in_nothing_but_the_place(tokenizer: Tokenizer) -> None:
    filler = Filler(tokenizer, SOURCES, seed=0)
    tasks = [filler.task(512, depth, sample=1) for depth in DEPTHS]
    key = KEY.format(key=tasks[0].key)
    assert len({task.prompt for task in tasks}) == len(DEPTHS)
    assert len({task.prompt.replace(key, "") for task in tasks}) == 1
    others = [filler.task(512, 0.5, sample=i) for i in range(6)]
    assert len({task.prompt.replace(KEY.format(key=task.key), "") for task in others}) == 6
    assert len({task.key for task in others}) > 2


def test_prompts_are_the_same_each_time_in_whatever_order_the_files_come(tokenizer: Tokenizer) -> None:
    one, other = Filler(tokenizer, SOURCES, seed=0), Filler(tokenizer, SOURCES[::-1], seed=0)
    assert one.task(512, 0.5, 2) == other.task(512, 0.5, 2) != Filler(tokenizer, SOURCES, seed=1).task(512, 0.5, 2)


def test_code_that_speaks_of_the_key_is_no_filler(tokenizer: Tokenizer) -> None:
    trap = "".join(f"def a{i}():\n    return my_function() + 1\n\n" for i in range(500))
    prompt = Filler(tokenizer, [*SOURCES, File("trap.py", trap)], seed=0).task(1024, 0.5, 0).prompt
    assert prompt.count("my_function") == 2


def test_checkpoint_is_asked_for_two_tokens_greedily(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = Llama.build(tiny_checkpoint, max_seq_len=512, max_batch_size=3)
    read: list[int] = []
    completion = llama.text_completion

    def spy(prompts, **settings):  # type: ignore[no-untyped-def]
        read.append(len(prompts))
        assert settings == {"temperature": 0.0, "max_gen_len": 2}
        return completion(prompts, **settings)

    monkeypatch.setattr(llama, "text_completion", spy)
    found = retrieval(llama, SOURCES, depths=(0.0, 0.5), samples=4)
    assert read == [3, 1, 3, 1]
    assert [(cell.length, cell.depth, cell.found.n) for cell in found.cells] == [(512, 0.0, 4), (512, 0.5, 4)]


@pytest.mark.parametrize(
    ("lengths", "depths", "samples", "message"),
    [
        ([], [0.0], 1, "give at least one of each"),
        ([512], [], 1, "give at least one of each"),
        ([512], [0.0], 0, "give at least one of each"),
        ([512], [1.5], 1, "between 0 and 1"),
        ([60], [0.0], 1, "a prompt of 60 tokens needs"),
        ([10**6], [0.0], 1, "more source files"),
    ],
)
def test_grid_that_cannot_be_is_refused(
    tokenizer: Tokenizer, lengths: list[int], depths: list[float], samples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_by(lambda prompts: ["42"] * len(prompts), tokenizer, SOURCES, lengths, depths, samples)


def test_length_beyond_the_model_is_refused(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="a length of 129; this model was built for 128"):
        retrieval(tiny_llama, SOURCES, [129])
