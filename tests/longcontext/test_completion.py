"""Line completion by context: what is shown and in which order, what counts, and how near a miss is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.scripted import script
from fixtures_text import training_texts
from llama import parallel
from llama.evals.lines import LONGEST
from llama.evals.sources import File
from llama.generation import Llama
from llama.longcontext.completion import (
    Repositories,
    command,
    complete_lines,
    edit_similarity,
    levenshtein,
    steps_between,
)
from llama.tokenizer import Tokenizer

ASKED = "import collections\n\nfirst = collections.Counter()\nsecond = helper_of_b(first)\n"
REPOSITORY = [
    File("box/app/asked.py", ASKED),
    File("box/app/b.py", "def helper_of_b(x):\n    return x\n"),
    File("box/app/a.py", "a = 1\na = 2"),
    File("box/app/deep/c.py", "c = 1\n"),
    File("box/about/d.py", "d = 1\n"),
    File("box/e.py", "e = 1\n"),
    File("lid/f.py", "value = [1, 2, 3]\n"),
]

letters = st.text(alphabet="ab\nü𝄞", max_size=7)


def brute_force(one: str, other: str) -> int:
    """The definition: the cheapest of deleting, inserting and replacing the first letter."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return brute_force(one[1:], other[1:])
    return 1 + min(brute_force(one[1:], other), brute_force(one, other[1:]), brute_force(one[1:], other[1:]))


@given(letters, letters)
def test_distance_is_the_fewest_edits(one: str, other: str) -> None:
    assert levenshtein(one, other) == brute_force(one, other)


@given(letters, letters, letters)
def test_distance_is_a_distance(one: str, other: str, third: str) -> None:
    assert levenshtein(one, other) == levenshtein(other, one)
    assert levenshtein(one, third) <= levenshtein(one, other) + levenshtein(other, third)
    assert (edit_similarity(one, other) == 1) is (one == other)
    assert 0 <= edit_similarity(one, other) <= 1


@pytest.mark.parametrize(
    ("one", "other", "distance", "similarity"),
    [("kitten", "sitting", 3, 4 / 7), ("", "", 0, 1.0), ("", "abc", 3, 0.0), ("return x", "return xs", 1, 8 / 9)],
)
def test_similarity_is_of_the_longer_text(one: str, other: str, distance: int, similarity: float) -> None:
    """difflib's ratio, which weighs matches twice over both lengths, would say 0.615 of kitten and sitting."""
    assert levenshtein(one, other) == distance
    assert edit_similarity(one, other) == pytest.approx(similarity)


@pytest.mark.parametrize(
    ("one", "other", "steps"),
    [
        ("a.py", "b.py", 0),
        ("x/a.py", "x/b.py", 0),
        ("x/a.py", "b.py", 1),
        ("x/a.py", "y/b.py", 2),
        ("x/y/a", "x/z/w/b", 3),
    ],
)
def test_steps_are_folders_up_and_down(one: str, other: str, steps: int) -> None:
    assert steps_between(one, other) == steps_between(other, one) == steps


def test_nearest_files_of_the_repository_come_first(tokenizer: Tokenizer) -> None:
    """And neither the file itself, which holds the answer, nor another repository's."""
    found = Repositories(tokenizer, REPOSITORY)
    nearest = ["box/app/a.py", "box/app/b.py", "box/app/deep/c.py", "box/e.py", "box/about/d.py"]
    assert found.nearest("box/app/asked.py") == nearest
    assert found.nearest("lid/f.py") == []
    assert len(Repositories(tokenizer, REPOSITORY, one_repository=True).nearest("lid/f.py")) == 6


def test_context_is_whole_files_with_the_nearest_last(tokenizer: Tokenizer) -> None:
    text, tokens = Repositories(tokenizer, REPOSITORY).context("box/app/asked.py", 10_000)
    assert text == (
        "# box/about/d.py\nd = 1\n\n"
        "# box/e.py\ne = 1\n\n"
        "# box/app/deep/c.py\nc = 1\n\n"
        "# box/app/b.py\ndef helper_of_b(x):\n    return x\n\n"
        "# box/app/a.py\na = 1\na = 2\n\n"
    )
    assert tokens == len(tokenizer.encode_infilling(text))


def test_more_context_shows_all_of_less(tokenizer: Tokenizer) -> None:
    """Tokens given never exceed those asked for, and a file that is cut keeps its path and its first lines."""
    texts = training_texts()
    files = [File("r/a.py", texts[4]), File("r/b.py", texts[3]), File("r/asked.py", "x = 1\n")]
    found = Repositories(tokenizer, files)
    shown: set[str] = set()
    for room in (0, 3, 10, 100, 1000, 2000, 4000):
        text, tokens = found.context("r/asked.py", room)
        assert tokens <= room
        assert tokens == len(tokenizer.encode_infilling(text)) if text else tokens == 0
        assert room < 1000 or tokens > room - 60, "room is left unused"
        lines = set(text.split("\n"))
        assert shown <= lines | {""}
        shown = lines
        for part in text.split("# r/")[1:]:
            name, _, code = part.partition("\n")
            assert next(f.text for f in files if f.path == f"r/{name}").startswith(code.rstrip("\n"))
    assert found.context("r/asked.py", 4000)[0].startswith("# r/b.py\n")
    wide = [File("r/a.py", "a = 1\n" + "a = '" + "word " * 99 + "'\n"), File("r/z/b.py", "b = 1\n"), files[2]]
    assert Repositories(tokenizer, wide).context("r/asked.py", 100)[0] == "# r/a.py\na = 1\n", "a gap in the order"
    path_alone = len(tokenizer.encode_infilling("# r/a.py\n"))
    assert found.context("r/asked.py", path_alone) == ("", 0), "a path without a line says nothing"


@pytest.mark.parametrize("room", [2, 12, 30, 200])
def test_own_file_is_shown_up_to_the_line_and_no_further(tokenizer: Tokenizer, room: int) -> None:
    found = Repositories(tokenizer, REPOSITORY).before("box/app/asked.py", 3, room)
    assert found == "" or len(tokenizer.encode_infilling(found)) <= room
    whole = "# box/app/asked.py\nimport collections\n\nfirst = collections.Counter()\n"
    header, _, rest = found.partition("\n")
    assert whole.endswith(rest)
    assert found == "" or header == "# box/app/asked.py"
    assert room < 200 or found == whole


def test_rates_are_those_of_a_model_that_reads_the_repository(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows `helper_of_b` where it has read it, and everything that its own file says; both are told apart."""
    lines = {"import collections": True, "first = collections.Counter()": True, "second = helper_of_b(first)": False}

    def say(prompt: str) -> str:
        own = prompt[prompt.index("# box/app/asked.py\n") :]
        line = ASKED.split("\n")[own.count("\n") - 1]
        return f"  {line}" if lines[line] or "def helper_of_b" in prompt else line[:-1]

    calls = script(tiny_llama, monkeypatch, "text_completion", say)
    monkeypatch.setattr(tiny_llama.model.args, "max_seq_len", 400)
    beside = File("box/app/b.py", "# def helper_of_b(x), a comment: no line to ask for\n")
    found = complete_lines(tiny_llama, [REPOSITORY[0], beside], [60, 0], n=None, own=100)
    assert [by.context for by in found.by_context] == [0, 60]
    assert [by.exact.hits for by in found.by_context] == [2, 3]
    miss = 1 - 1 / len("second = helper_of_b(first)")
    assert [by.similarity.value for by in found.by_context] == pytest.approx([(2 + miss) / 3, 1.0])
    assert found.by_context[0].exact_gain.value == 0
    assert found.by_context[1].exact_gain.value == pytest.approx(1 / 3)
    assert found.by_context[1].similarity_gain.value == pytest.approx((1 - miss) / 3)
    assert (found.by_context[0].given, found.by_context[1].given > 10) == (0, True)
    assert calls[0] == {"max_gen_len": LONGEST, "stop": "\n"}


def test_every_context_has_the_same_lines_and_fits(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the sample against depending on the context, and the prompt against the model's room."""
    prompts: list[str] = []
    script(tiny_llama, monkeypatch, "text_completion", lambda prompt: prompts.append(prompt) or "x")
    monkeypatch.setattr(tiny_llama.model.args, "max_seq_len", 300)
    texts = training_texts()
    files = [File("r/bisect.py", texts[4]), File("r/heapq.py", texts[3])]
    found = complete_lines(tiny_llama, files, [0, 50, 150], n=8)
    assert found.own == 300 - 150 - LONGEST - 2
    by_context = [found.samples[i : i + 8] for i in (0, 8, 16)]
    assert [s.line for s in by_context[0]] == [s.line for s in by_context[1]] == [s.line for s in by_context[2]]
    for prompt, sample in zip(prompts, found.samples, strict=True):
        assert prompt.endswith(sample.line.before)
        assert len(tiny_llama.tokenizer.encode(prompt, bos=True, eos=False)) <= 300 - LONGEST
        assert sample.line.text not in prompt[-len(sample.line.before) :].split("\n")[-1]
    fewer = complete_lines(tiny_llama, files, [0], n=4, own=found.own)
    assert [s.line for s in fewer.samples] == [s.line for s in by_context[0][:4]]


def test_model_writes_greedily_up_to_the_newline(tiny_llama: Llama) -> None:
    """With the real loop: a line has no newline in it, and asking again gives the same."""
    files = [File("r/a.py", "value = 12345\nother = 6789\n"), File("r/b.py", "b = 1\n")]
    once = complete_lines(tiny_llama, files, [0, 8], n=2, own=24)
    assert once == complete_lines(tiny_llama, files, [0, 8], n=2, own=24)
    assert all("\n" not in sample.text for sample in once.samples)
    assert once.lines == 2


def test_what_cannot_be_asked_is_refused(tiny_llama: Llama) -> None:
    alone = [File("r/a.py", ASKED), File("q/b.py", ASKED)]
    with pytest.raises(ValueError, match=r"of 2 files, 0 have another.*--one_repository"):
        complete_lines(tiny_llama, alone, [0], own=10)
    assert complete_lines(tiny_llama, alone, [0], n=1, own=10, one_repository=True).lines == 1
    for contexts, own in (([], 10), ([-1], 10), ([0, 40], 10), ([0], 0), ([46], None)):
        with pytest.raises(ValueError, match="built for 128; give contexts of 0 or more"):
            complete_lines(tiny_llama, alone, contexts, own=own)
    with pytest.raises(ValueError, match="nothing to measure on"):
        complete_lines(tiny_llama, [File("a.py", "")], [0])
    with pytest.warns(UserWarning, match="beyond the 64"):
        complete_lines(tiny_llama, alone, [0], n=1, own=10, one_repository=True, trained=64)


def test_command_leaves_a_table_a_record_and_a_picture(tmp_path: Path, tiny_checkpoint: Path, told: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    parallel.start()
    for file in REPOSITORY:
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.path).write_text(file.text, encoding="utf-8")
    out = tmp_path / "out"
    limits: dict[str, Any] = {"sources": str(tmp_path), "contexts": (0, 24), "own": 20, "show": 1, "out": str(out)}
    command(**limits, ckpt_dir=str(tiny_checkpoint))
    [(shown, printed)] = told
    rows = list(csv.DictReader((out / "completion.csv").open(encoding="utf-8")))
    assert [(r["context"], r["metric"]) for r in rows[::4]] == [("0", "exact"), ("24", "exact")]
    assert rows[1]["metric"] == "edit_similarity"
    assert all(float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in rows)
    assert printed["rows"][0]["lines"] == int(rows[0]["lines"]) == 5
    assert json.loads((out / "completion.json").read_text(encoding="utf-8"))["own"] == 20
    assert (out / "completion.png").read_bytes().startswith(b"\x89PNG")
    assert shown[0].startswith("# box/app/")
