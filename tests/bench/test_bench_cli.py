"""The command: a table or JSON, and files; on a checkpoint and on a preset; and what a user got wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fixtures_text import training_texts
from llama import parallel
from llama.bench import cli, shapes
from llama.bench.cli import VARIANTS, Variant, command, variant_of

QUICK: dict[str, Any] = {"rounds": 2, "tokens": 3, "prompt": 5, "batches": (1, 2), "lengths": (9,), "size": 1e-4}
MEASURES = ("decode", "loop", "prefill", "first_token")
Report = tuple[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def group() -> None:
    parallel.start()


@pytest.fixture
def run(told: list[Any]) -> Any:
    def run(**options: Any) -> Report:
        command(**{**QUICK, "measures": MEASURES, **options})
        lines, found = told.pop()
        return "\n".join(lines), found

    return run


def test_a_checkpoint_from_end_to_end(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    text, found = run(
        ckpt_dir=str(tiny_checkpoint),
        dtype="float32",
        variants=("plain",),
        measures=(*MEASURES, "load"),
        out=str(tmp_path),
    )
    figures = {(f["measure"], f["variant"], f["rows"], f["tokens"]): f for f in found["figures"]}
    expected = {
        ("decode", "plain", 1, 5),
        ("decode", "plain", 2, 5),
        ("decode, loop", "plain", 1, 5),
        ("prefill", "plain", 1, 9),
        ("first token", "plain", 1, 9),
        ("load", "plain", 0, 0),
        ("read", "machine", 1, 0),
    }
    assert expected <= figures.keys()
    assert all(f["low"] <= f["median"] <= f["high"] and f["rounds"] == 2 for f in figures.values())
    assert figures["decode", "plain", 1, 5]["limit"] == "bandwidth"
    assert figures["prefill", "plain", 1, 9]["of_limit"] > 0
    assert (found["measure"], found["dtype"], found["variants"]) == ("bench", "float32", ["plain"])
    assert "decode, batch 2" in text
    assert {path.name for path in tmp_path.iterdir()} == {"bench.csv", "bench.json", "bench.png"}


def test_the_embedded_checkpoint_against_transformers(run: Any) -> None:
    text, found = run(
        variants=("plain", "lookup"), against=("transformers",), measures=("decode", "load"), batches=(2,)
    )  # fmt: skip
    decode = {f["variant"]: f for f in found["figures"] if f["measure"] == "decode"}
    assert decode.keys() == {"transformers", "plain", "lookup"}
    assert decode["lookup"]["x_transformers"] > 0
    assert decode["lookup"]["x_plain"] > 0
    assert "x_plain" not in decode["plain"]
    assert found["dtype"] == "bfloat16"
    assert "× transformers" in text
    assert {f["variant"] for f in found["figures"] if f["measure"] == "load"} == {"transformers", "plain", "lookup"}


def test_some_layers_of_a_preset_are_extrapolated(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"dim": 64, "n_layers": 6, "n_heads": 4, "vocab_size": 5000, "hidden_dim": 96}
    monkeypatch.setitem(shapes.SHAPES, "tiny", small)
    text, found = run(preset="tiny", layers=2, variants=("plain",))
    assert found["model"]["n_layers"] == 2
    assert "extrapolated to 6 layers" in text
    whole = [f for f in found["figures"] if f.get("extrapolated_to") == 6]
    assert {f["measure"] for f in whole} == {"decode", "prefill"}
    part = next(f for f in found["figures"] if f["measure"] == "decode" and "extrapolated_to" not in f)
    assert next(f for f in whole if f["measure"] == "decode")["median"] < part["median"]
    text, _ = run(preset="tiny", layers=6, variants=("plain",), measures=("prefill", "load"))
    assert "extrapolated" not in text
    assert "reading the file" in text


def test_editing_from_end_to_end(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for i, source in enumerate(training_texts()):
        (tmp_path / f"{i}.py").write_text(source, encoding="utf-8")
    out = tmp_path / "out"
    text, found = run(
        editing=True, ckpt_dir=str(tiny_checkpoint), prompts=1, rounds=1, sources=str(tmp_path), variants=("plain",),
        dtype="float32", out=str(out),
    )  # fmt: skip
    kinds = {one["kind"]: one for one in found["kinds"]}
    assert kinds.keys() == {"edit", "continue", "random", "edit, own", "continue, own"}
    assert kinds["edit"]["tokens_per_pass"] > 1.3
    assert kinds["random"]["tokens_per_pass"] == 1
    assert "ratio" in text
    assert (out / "editing.csv").is_file()


def test_a_variant_settles_again_for_each_cache(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for one cache must not be asked about another: it would run plain, and nobody would know."""
    settled: list[tuple[int, int]] = []

    def settle_(llama: Any) -> None:
        cache = llama.model.own_cache()
        settled.append((cache.rows, cache.slots))

    monkeypatch.setitem(VARIANTS, "settling", Variant(settle_=settle_))
    run(variants=("plain+settling",), measures=("decode", "prefill"), lengths=(200,))
    assert settled == [(1, 128), (2, 128), (1, 256)]


def test_variants_are_joined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setitem(VARIANTS, "a", Variant(lambda model: done.append("a"), bits=4, arithmetic="int8"))
    monkeypatch.setitem(VARIANTS, "b", Variant(lambda model: done.append("b"), lookup=3))
    both = variant_of("b+a")
    assert both.change_ is not None
    both.change_(None)  # type: ignore[arg-type]
    assert (done, both.bits, both.arithmetic, both.lookup, both.settle_) == (["b", "a"], 4, "int8", 3, None)


def test_a_variant_whose_room_is_missing_says_so(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Variant(lambda model: cli._from("llama.nowhere.layers", "change_")(model))
    monkeypatch.setitem(VARIANTS, "absent", absent)
    with pytest.raises(ValueError, match=r"llama\.nowhere\.layers\.change_, which this version"):
        run(variants=("plain", "absent"))
    with pytest.raises(ValueError, match=r"llama\.model\.nothing, which this version"):
        cli._from("llama.model", "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("plain", "quick")}, r"there is no variant quick \(there are plain, fast"),
        ({"variants": ("fsat",)}, r"there is no variant fsat; did you mean fast\? \(there are plain, fast"),
        ({"preset": "8B"}, "there is no preset 8B; choose 7B"),
        ({"batches": ()}, "--batches and --lengths are empty"),
        ({"preset": "S", "layers": 13}, "it has 1 to 12"),
        ({"layers": 2}, "--layers without --preset"),
        ({"max_seq_len": 100}, "--max_seq_len is chosen by the measures"),
        ({"fast": True}, "--fast is a variant here"),
        ({"preset": "S", "rope_theta": 1.0}, "--rope_theta with --preset; a preset takes --device"),
        ({"preset": "S", "dtype": "float8"}, "--dtype float8 is unknown"),
        ({"ckpt_dir": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"rounds": 0}, "at least one task and one round"),
    ],
)
def test_what_a_user_got_wrong(run: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**{"variants": ("plain",), **options})


def test_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "VARIANTS", dict(VARIANTS))
    readme = Path(cli.__file__).with_name("README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "mine" in capsys.readouterr().out
