"""Every command of the rooms, as typed: help, unknown options, values that can't be; all before anything is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama import cli
from llama.bench import cli as bench
from llama.bench import commits
from llama.evals.cli import COMMANDS as EVALS
from llama.interop import bench_memory, check, convert, download, measure_plan, plan
from llama.longcontext import spectra
from llama.longcontext.cli import COMMANDS as LONGCONTEXT
from llama.quantize import bench_linear
from llama.quantize import cli as quantize
from llama.serve import cli as serve
from llama.serve import load, simulate
from llama.train.cli import COMMANDS as TRAIN

Command = Callable[..., None]
Case = tuple[Command, list[str], list[str], list[str]]
"""The command, what it can't do without, an option misspelt and the right one, and a value that can't be."""
TYPO = ["--sorces", "--sources"]
CASES: dict[str, Case] = {
    "plan": (plan.command, ["7B"], ["--device_memry", "--device_memory"], ["--max_batch_size", "0"]),
    "download": (download.command, ["owner/name"], ["--revison", "--revision"], ["--out", __file__]),
    "check": (check.command, ["folder"], ["--quik", "--quick"], []),
    "convert": (convert.command, ["a", "b", "--to", "hf"], ["--shard", "--shards"], ["--shards", "0"]),
    "convert, format": (convert.command, ["a", "b", "--to", "hf"], ["--dtyp", "--dtype"], ["--to", "onnx"]),
    "quantize": (quantize.command, ["a", "b"], ["--schem", "--scheme"], ["--scheme", "int7"]),
    "quantize --report": (quantize.command, ["--report"], TYPO, ["--schemes", "int8,int5"]),
    "bench": (bench.command, [], ["--variant", "--variants"], ["--measures", "decode,speed"]),
    "serve": (serve.serve, [], ["--prot", "--port"], ["--port", "65537"]),
    "bench serve": (load.command, [], ["--client", "--clients"], ["--clients", "0"]),
    "plan serve": (simulate.command, [], ["--prompts", "--prompt"], ["--rps", "-1"]),
    "bench, preset": (bench.command, [], ["--rouns", "--rounds"], ["--preset", "8B"]),
    "python -m llama.bench grow": (bench.grow, ["--variant", "plain", "--tokens", "5"], ["--prset", "--preset"], []),
    "python -m llama.bench.commits": (commits.compare, ["a", "b"], ["--round", "--rounds"], ["--measures", "loop2"]),
    "measure_plan compare": (measure_plan.compare, [], ["--shape", "--shapes"], ["--shapes", "embedded,200M"]),
    "bench_memory": (bench_memory.bench, [], ["--gigabyte", "--gigabytes"], ["--gigabytes", "-1"]),
    "bench_linear": (bench_linear.main, [], ["--row", "--rows"], ["--rows", "1,x"]),
    "evals compression": (EVALS["compression"], [], TYPO, ["--files", "0"]),
    "evals positions": (EVALS["positions"], [], TYPO, ["--bins", "2.5"]),
    "evals functions": (EVALS["functions"], [], TYPO, ["--samples", "many"]),
    "evals lines": (EVALS["lines"], [], TYPO, ["--order", "pms"]),
    "evals retrieval": (EVALS["retrieval"], [], TYPO, ["--depths", "0,1.5"]),
    "evals exercises": (EVALS["exercises"], [], ["--sample", "--samples"], ["--samples", "0"]),
    "evals run": (EVALS["run"], ["humaneval"], ["--tempereture", "--temperature"], ["--samples", "0"]),
    "evals run, benchmark": (EVALS["run"], ["mbpp"], ["--protocl", "--protocol"], ["--top_p", "1.5"]),
    "evals score": (EVALS["score"], ["mbpp", __file__], ["--worker", "--workers"], ["--ks", "0"]),
    "evals table": (EVALS["table"], ["."], ["--pge", "--page"], []),
    "longcontext spectra": (LONGCONTEXT["spectra"], [], ["--scheme", "--schemes"], ["--theta", "1"]),
    "longcontext perplexity": (LONGCONTEXT["perplexity"], [], TYPO, ["--lengths", "64,1"]),
    "longcontext sweep": (LONGCONTEXT["sweep"], [], TYPO, ["--factors", "1,0"]),
    "longcontext retrieval": (LONGCONTEXT["retrieval"], [], TYPO, ["--samples", "0"]),
    "longcontext completion": (LONGCONTEXT["completion"], [], TYPO, ["--contexts", "-5"]),
    "longcontext attention": (LONGCONTEXT["attention"], [], TYPO, ["--heads", "0:x"]),
    "longcontext precision": (LONGCONTEXT["precision"], [], TYPO, ["--recipes", "ours,theirs"]),
    "longcontext reproduce": (
        LONGCONTEXT["reproduce"], ["--out", "o"], ["--presets", "--preset"], ["--processes", "0"],
    ),
    "longcontext prefill": (LONGCONTEXT["prefill"], [], TYPO, ["--against", "vllm"]),
    "train corpus": (TRAIN["corpus"], ["o"], ["--cach", "--cache"], ["--cache", __file__]),
    "train plain": (TRAIN["plain"], ["o"], ["--minute", "--minutes"], ["--minutes", "0"]),
    "train base": (TRAIN["base"], ["o"], ["--corpos", "--corpus"], ["--steps", "-3"]),
    "train long": (TRAIN["long"], ["o"], ["--seeds", "--seed"], ["--seed", "-1"]),
    "train instruct": (TRAIN["instruct"], ["o"], ["--devise", "--device"], ["--device", "tpu"]),
    "train exercises": (TRAIN["exercises"], ["o"], ["--step", "--steps"], ["--minutes", "0"]),
    "train answers": (TRAIN["answers"], ["o"], ["--corpos", "--corpus"], ["--steps", "0"]),
    "train all": (TRAIN["all"], ["o"], ["--shapes", "--shape"], ["--shape", "7B"]),
    "train shapes": (TRAIN["shapes"], ["o"], ["--minute", "--minutes"], ["--shapes", "6x256,7B"]),
    "train gaps": (TRAIN["gaps"], ["o", "c"], ["--step", "--steps"], ["--files", "0"]),
    "train report": (TRAIN["report"], ["o"], ["--chaptr", "--chapter"], ["--out", __file__]),
}  # fmt: skip


def test_every_command_has_a_case() -> None:
    tried = {case[0] for case in CASES.values()}
    assert tried >= {*EVALS.values(), *LONGCONTEXT.values(), *TRAIN.values()}
    own = [verb for verb, (place, _) in cli.VERBS.items() if place.endswith(":command")]
    assert [verb for verb in own if verb not in CASES] == []


@pytest.mark.parametrize("name", CASES)
def test_help_stands_on_standard_output(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, needed, (_, right), _ = CASES[name]
    with pytest.raises(SystemExit) as exit_:
        cli.parse(command, ["--help"], name)
    out, err = capsys.readouterr()
    assert (exit_.value.code, err) == (0, "")
    assert right in out
    assert "options: those" not in out  # of fire's time
    cli.parse(command, needed, name)  # and without more, it would run


@pytest.mark.parametrize("name", CASES)
def test_an_unknown_option_suggests_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, needed, (wrong, right), _ = CASES[name]
    with pytest.raises(SystemExit) as exit_:
        cli.parse(command, [*needed, wrong, "1"], name)
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert wrong in err
    assert re.search(rf"{right}[ ,]", err)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3]])
def test_a_value_that_can_not_be_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, needed, _, wrong = CASES[name]
    with pytest.raises(SystemExit) as exit_:
        cli.parse(command, [*needed, *wrong], name)
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert wrong[0] in err


def test_lists_are_written_with_brackets_or_without() -> None:
    for words in (["--lengths", "512,1024"], ["--lengths", "[512, 1024]"], ["--lengths=(512,1024,)"]):
        _, found = cli.parse(LONGCONTEXT["perplexity"], words, "perplexity")
        assert found["lengths"] == (512, 1024)


def test_schemes_may_be_files_and_whole_scalings(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(
        "from llama.rope import default\n\n\ndef of_my_own(head_dim, theta, length):\n"
        "    return default(head_dim, theta, length)\n"
    )
    listed = f"yarn,{tmp_path}/my.py:of_my_own," + "{'rope_type': 'linear', 'factor': 4}"
    for command in (LONGCONTEXT["spectra"], LONGCONTEXT["sweep"]):
        _, found = cli.parse(command, ["--schemes", listed], "name")
        whole = {"rope_type": "linear", "factor": 4}
        assert spectra.named(found["schemes"]) == ["yarn", "of_my_own", whole]
    _, found = cli.parse(EVALS["lines"], ["--rope_scaling", f"{tmp_path}/my.py:of_my_own"], "lines")
    assert found["rope_scaling"].endswith("my.py:of_my_own")
    with pytest.raises(ValueError, match="there is no scheme 'yran'; did you mean yarn"):
        spectra.named(["yran"])


def test_spellings_of_before() -> None:
    """Those of the docs until now: an argument by its name, and --report with the checkpoints after it."""
    _, found = cli.parse(TRAIN["all"], ["--out", "OUT", "--corpus", "C", "--minutes", "90"], "all")
    assert (found["out"], found["corpus"], found["minutes"]) == ("OUT", "C", 90)
    _, found = cli.parse(quantize.command, ["--report", "a", "2", "--files", "3"], "quantize")
    assert (found["paths"], found["report"], found["files"]) == (("a", "2"), True, 3)


def test_without_matplotlib_all_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is said before the measurement."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(spectra, "spectra", lambda *_: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception), pytest.warns(UserWarning, match="pip install matplotlib"):
        spectra.command(out=str(tmp_path / "out"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match="pip install matplotlib"):
        spectra.command(out=str(tmp_path / "out"), schemes=("default",), head_dim=8, trained=64)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"spectra.csv", "spectra.json"}
    assert "default" in capsys.readouterr().out


def test_a_process_says_no_before_it_works(tmp_path: Path) -> None:
    """As a process, with a folder in which nothing can be written; nothing is measured, and there is no traceback."""
    words = ["longcontext", "spectra", "--out", str(Path(__file__) / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "llama", *words], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "--out" in done.stderr
    assert "Traceback" not in done.stderr
