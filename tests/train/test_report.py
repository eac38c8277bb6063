"""The report: figures are made once, and what is written is what was measured."""

from __future__ import annotations

import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama.evals.compression import xz_bits
from llama.train.cli import COMMANDS
from llama.train.report import cli, tables
from llama.train.report.chapter import fill
from llama.train.report.measurements import Measurement, measure
from llama.train.stages import SHAPES, STAGES

SMALL: dict[str, Any] = {
    "dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 700, "multiple_of": 32,
}  # fmt: skip
SPLIT = {
    "train": ("textwrap.py", "argparse.py", "inspect.py", "shutil.py", "tarfile.py"),
    "validation": ("bisect.py", "heapq.py"),
    "heldout": ("fractions.py", "statistics.py", "zipfile.py", "calendar.py"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a run of all three stages in `out.training`, and a report of it."""
    folder = tmp_path_factory.mktemp("report")
    packages = {}
    for split, names in SPLIT.items():
        (folder / "corpus").mkdir(exist_ok=True)
        with gzip.open(folder / "corpus" / f"documents-{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            for name in names:
                text = (Path(os.__file__).parent / name).read_text(encoding="utf-8")
                package = name.removesuffix(".py")
                file.write(json.dumps({"package": package, "path": name, "text": text}) + "\n")
                packages[package] = {"version": "1", "licence": "PSF-2.0", "split": split, "files": 1, "bytes": 9}
    (folder / "corpus" / "corpus.json").write_text(json.dumps({"packages": packages, "dropped": {}}))
    (folder / "chapter.md").write_text(
        "# Mine\n\n"
        + "\n\n".join(
            f"About {name}:\n<!-- report: {name} -->\nold\n<!-- end -->"
            for name in (
                "files",
                "run",
                "targets",
                "stages",
                "packages",
                "keys",
                "gaps",
                "functions",
                "lines",
                "answers",
            )
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "small", SMALL)
        for name, stage in list(STAGES.items()):
            training = replace(stage.training, rows_per_step=2, rows_at_once=1, warmup_steps=1)
            patch.setitem(STAGES, name, replace(stage, length=stage.length * 3 // 4, training=training))
        corpus = f"{folder}/corpus"
        COMMANDS["all"](f"{folder}/out", steps=2, device="cpu", shape="small", corpus=corpus)
        COMMANDS["gaps"](f"{folder}/gaps", corpus=corpus, steps=2, files=2, shape="small")
        COMMANDS["report"](
            f"{folder}/out.training",
            out=f"{folder}/out",
            chapter=f"{folder}/chapter.md",
            gaps=f"{folder}/gaps",
            quick=True,
        )
    return folder


def figures(made: Path, stage: str, name: str) -> Any:
    return json.loads((made / "out.training" / "report" / f"{stage}-{name}.json").read_text())["figures"]


def test_what_the_tables_say_is_what_was_measured(made: Path) -> None:
    card = (made / "out" / "MODEL_CARD.md").read_text()
    chapter = (made / "chapter.md").read_text()
    total = figures(made, "instruct", "compression")["total"]
    for text in (card, chapter):
        row = re.search(r"^\| all \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
        assert row is not None
        assert int(row[1].replace(",", "")) == total["bytes"]
        assert float(row[2]) == pytest.approx(total["model_bits"] / total["bytes"], abs=6e-4)
        assert float(row[3]) == pytest.approx(total["xz_bits"] / total["bytes"], abs=6e-4)
        psm = figures(made, "instruct", "lines-psm")["exact"]
        assert f"| single lines filled in exactly, PSM | {psm['rate']:.1%} (" in text
    assert "## Measured" in card
    assert "4 packages" in card


def test_held_out_files_are_what_is_measured(made: Path) -> None:
    found = figures(made, "instruct", "compression")
    texts = {name: (Path(os.__file__).parent / name).read_bytes() for name in SPLIT["heldout"]}
    assert found["total"]["bytes"] == sum(len(text) for text in texts.values())
    by_name = {package["name"]: package for package in found["packages"]}
    assert by_name["fractions"]["xz_bits"] == xz_bits(texts["fractions.py"])
    whole = b"".join(texts[name] for name in sorted(texts, key=lambda name: f"{name.removesuffix('.py')}/{name}"))
    assert found["total"]["solid_xz_bits"] == xz_bits(whole)


def test_the_chapters_own_words_stay(made: Path) -> None:
    chapter = (made / "chapter.md").read_text()
    assert chapter.startswith("# Mine\n\nAbout files:\n<!-- report: files -->\n")
    assert "\nold\n" not in chapter


def test_pictures_are_drawn(made: Path) -> None:
    for name in ("losses", "positions", "retrieval", "packages"):
        assert (made / "chapter" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_gaps_is_of_equal_steps_and_the_same_files(made: Path) -> None:
    cost = json.loads((made / "gaps" / "gaps.json").read_text())
    plain, filled = cost["runs"]["without gaps"], cost["runs"]["with gaps"]
    assert plain["steps"] == filled["steps"] == 2
    ratio = filled["bits_per_byte"]["value"] / plain["bits_per_byte"]["value"]
    assert cost["ratio"]["value"] == pytest.approx(ratio)
    assert f"| with / without |  |  | {ratio:.4f} (" in (made / "chapter.md").read_text()


def test_every_stage_was_asked_with_its_own_checkpoint(made: Path) -> None:
    facts = [
        json.loads((made / "out.training" / "report" / f"{stage}-sample.json").read_text())["facts"]
        for stage in ("base", "long", "instruct")
    ]
    assert len({fact["checkpoint"] for fact in facts}) == 3
    assert [fact["lengths"][2] for fact in facts] == [192, 1536, 1536]  # base has never seen longer ones


def test_a_second_report_measures_nothing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("measured again")

    before = (made / "chapter.md").read_text()
    monkeypatch.setattr("llama.train.report.cli.load", refuse)
    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, replace(stage, length=stage.length * 3 // 4))
    work = f"{made}/out.training"
    COMMANDS["report"](work, chapter=f"{made}/chapter.md", gaps=f"{made}/gaps", quick=True)
    assert (made / "chapter.md").read_text() == before
    with pytest.raises(AssertionError, match="measured again"):
        COMMANDS["report"](work, quick=False)


def test_figures_are_made_once_for_the_same_facts(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"value": len(made)}

    def value(**facts: Any) -> int:
        found: int = measure(Measurement("base", "size", facts, make), tmp_path)["value"]
        return found

    assert value(checkpoint="a", lengths=(1, 2)) == 1
    assert value(checkpoint="a", lengths=(1, 2)) == 1
    assert value(checkpoint="b", lengths=(1, 2)) == 2


def test_a_measurement_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(Measurement("base", "size", {}, fail), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rate", "verdict"), [(0.97, "aim"), (0.9699, "must"), (0.85, "must"), (0.8499, "**missed**")])
def test_a_target_is_reached_at_its_bar(rate: float, verdict: str) -> None:
    functions = next(target for target in tables.TARGETS if target.of[0] == "functions")
    assert functions.verdict(rate) == verdict


def test_fewer_bits_are_better() -> None:
    of_one_archive = next(target for target in tables.TARGETS if target.of[1] == "of_solid_xz")
    assert [of_one_archive.verdict(value) for value in (0.75, 0.76)] == ["aim", "must"]
    of_files = next(target for target in tables.TARGETS if target.of[1] == "of_xz")
    assert [of_files.verdict(value) for value in (0.7, 0.71)] == ["aim", "**missed**"]


def test_what_was_not_measured_is_a_dash() -> None:
    assert "| answers that stop by themselves | – | ≥ 90% | ≥ 99% | – |" in tables.targets({})


@pytest.mark.parametrize("text", ["no block\n", "<!-- report: unknown -->\n<!-- end -->\n"])
def test_a_chapter_that_cannot_be_filled_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "chapter.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="may be targets"):
        fill(path, {"targets": "new"})
    assert path.read_text() == text


def test_a_block_may_hold_what_looks_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "chapter.md"
    path.write_text("<!-- report: code -->\n<!-- end -->\n")
    for _ in range(2):
        fill(path, {"code": r"re.sub(r'\1', '\g<0>')"})
    assert path.read_text() == "<!-- report: code -->\n\nre.sub(r'\\1', '\\g<0>')\n\n<!-- end -->\n"


def test_a_line_stays_in_its_cell() -> None:
    cell = cli._cell("a | b\n  c")
    assert cell == "`` a \\| b⏎  c ``"


def test_without_a_corpus_there_is_nothing_to_measure_on(tmp_path: Path) -> None:
    run = {"params": SMALL, "seed": 0, "corpus": None, "made_of": "the standard library"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="0 finished stages, of the corpus None"):
        COMMANDS["report"](str(tmp_path))
