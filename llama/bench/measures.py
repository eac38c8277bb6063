"""What is measured: decode, the loop around it, prefill, the first token, loading.

Each measure is put to all models in the same rounds, with the limits of the machine as further tasks of those rounds.
What comes out is one `Measured`: rates, round by round, of every model, beside the rate that the machine would allow.
Figures, ratios and tables are made of it later (figures.py), by arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llama.bench.roofline import PLAIN, Pack, Probe, bandwidth, best, matmul
from llama.bench.rounds import Task, Timer, interleave, timed
from llama.bench.subject import Subject
from llama.config import ModelArgs

Subjects = Mapping[str, Subject]
Unit = Literal["tokens/s", "s", "GB/s", "GFLOP/s", "MB"]
PAGE = 4096
BLOCK = 1 << 24  # bytes of a file that are read at a time


@dataclass(frozen=True)
class Measured:
    """One measure of several models, in the same rounds."""

    measure: str
    rates: Mapping[str, Sequence[float]]
    """What each did per second, round by round: tokens, or, where the unit is s, the whole thing."""
    unit: Unit
    rows: int = 1
    tokens: int = 0
    """Of the prompt."""
    limits: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The rates that the machine would have allowed in the same rounds."""
    limit: str = ""
    """What limits: bandwidth, arithmetic, the file."""
    layers: int | None = None
    """Where it is extrapolated: to how many."""


class Machine:
    """Where and how all is measured: the device, the rounds, and the probes of what it could do."""

    def __init__(
        self,
        args: ModelArgs,
        device: torch.device,
        chunk: int,
        rounds: int,
        *,
        ways: Mapping[str, Pack] = PLAIN,
        size: float = 1.0,
        progress: bool = False,
    ) -> None:
        """`args` and `chunk` are the shape that matrix products are probed at, in all `ways`; `size` is how large the
        probes are, relative to what is meant for figures."""
        self.args, self.device, self.chunk, self.rounds, self.progress = args, device, chunk, rounds, progress
        self.timer = Timer.of(device)
        self.ways, self.size = ways, size
        whole = 4.0 if device.type == "cuda" else 1.0
        self.bandwidth = bandwidth(device, whole * size, ways)
        self._products: dict[str, dict[str, Probe]] = {}

    def products(self, dtype: str) -> dict[str, Probe]:
        """Those of `matmul` in a dtype, made once."""
        if dtype not in self._products:
            side = int((8192 if self.device.type == "cuda" else 2048) * self.size)
            self._products[dtype] = matmul(self.device, dtype, self.args, self.chunk, max(side, 64), self.ways)
        return self._products[dtype]

    def run(self, what: str, tasks: Mapping[tuple[str, str], Task]) -> dict[tuple[str, str], list[float]]:
        return interleave(tasks, self.rounds, self.timer, what=what, progress=self.progress)


def draw_prompts(vocab_size: int, rows: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Random ids, none of the first three, which begin and end texts."""
    draw = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(3, vocab_size, (rows, tokens), generator=draw).tolist()
    return ids


def roofline(machine: Machine, dtypes: Sequence[str]) -> list[Measured]:
    """The machine alone: every probe, in rounds of their own."""
    probes = dict(machine.bandwidth)
    for dtype in dtypes:
        probes |= machine.products(dtype)
    found = machine.run("roofline", {("machine", name): probe.task for name, probe in probes.items()})
    measured = []
    for name, probe in probes.items():
        unit: Unit = "GB/s" if name in machine.bandwidth else "GFLOP/s"
        rates = [probe.amount / 1e9 / seconds for seconds in found["machine", name]]
        measured.append(Measured(name, {"machine": rates}, unit))
    return measured


def decode(
    machine: Machine,
    subjects: Subjects,
    rows: int,
    prompt: int,
    n: int,
    layers: int | None = None,
    *,
    alone: bool = True,
    loop: bool = True,
) -> list[Measured]:
    """`n` tokens a round to each of `rows` rows behind a prompt: by the model `alone` (one step after the other, the
    likeliest token read next), and as a user gets them, out of the `loop`.

    `layers` is how many the whole model has, where the one measured has fewer: its speed is then extrapolated.
    """
    prompts = draw_prompts(machine.args.vocab_size, rows, prompt)
    tasks: dict[tuple[str, str], Task] = {("", name): probe.task for name, probe in machine.bandwidth.items()}
    for name, subject in subjects.items():
        subject.room(rows, _slots(prompt + n))
        if alone:
            first = subject.read(prompts).argmax(-1, keepdim=True)
            tasks[name, "step"] = timed(partial(_steps, subject, first, prompt, n))
            tasks[name, "head"] = timed(partial(_heads, subject, first, n))
        if loop:
            tasks[name, "loop"] = partial(_loop, subject, prompts, n)
    if not layers:
        tasks = {task: work for task, work in tasks.items() if task[1] != "head"}
    seconds = machine.run(f"decode {rows}", tasks)
    read = best({name: seconds["", name] for name in machine.bandwidth}, machine.bandwidth)
    limits = {
        # Half of the new tokens are there in the middle of a round.
        name: [rows * rate / s.work.step_bytes(rows, prompt + (n + 1) / 2) for rate in read]
        for name, s in subjects.items()
    }
    found = []
    if alone:
        rates = {name: _rates(seconds[name, "step"], rows * n) for name in subjects}
        found.append(Measured("decode", rates, "tokens/s", rows, prompt, limits, "bandwidth"))
    if loop:
        rates = {name: _rates(seconds[name, "loop"], rows * (n - 1)) for name in subjects}
        found.append(Measured("decode, loop", rates, "tokens/s", rows, prompt, limits, "bandwidth"))
    if alone and layers:
        rates = {
            name: _rates(_extrapolated(seconds[name, "step"], seconds[name, "head"], machine.args, layers), rows * n)
            for name in subjects
        }
        found.append(Measured("decode", rates, "tokens/s", rows, prompt, layers=layers))
    return found


def prefill(machine: Machine, subjects: Subjects, tokens: int, layers: int | None) -> list[Measured]:
    """Reading one prompt, in the chunks that the loop reads it in."""
    prompts = draw_prompts(machine.args.vocab_size, 1, tokens)
    kinds = {name: machine.products(subject.work.arithmetic) for name, subject in subjects.items()}
    probes = {name: probe for products in kinds.values() for name, probe in products.items()}
    tasks: dict[tuple[str, str], Task] = {("", name): probe.task for name, probe in probes.items()}
    ids = torch.tensor(prompts, device=machine.device)
    for name, subject in subjects.items():
        subject.room(1, _slots(tokens))
        tasks[name, "read"] = timed(partial(subject.read, prompts))
        if layers:
            tasks[name, "head"] = timed(partial(subject.head, ids))
    seconds = machine.run(f"prefill {tokens}", tasks)
    limits = {
        name: [tokens * rate / s.work.prompt_operations(tokens) for rate in _best_of(seconds, kinds[name])]
        for name, s in subjects.items()
        if kinds[name]
    }
    rates = {name: _rates(seconds[name, "read"], tokens) for name in subjects}
    found = [Measured("prefill", rates, "tokens/s", 1, tokens, limits, "arithmetic")]
    if layers:
        whole = {
            name: _rates(_extrapolated(seconds[name, "read"], seconds[name, "head"], machine.args, layers), tokens)
            for name in subjects
        }
        found.append(Measured("prefill", whole, "tokens/s", 1, tokens, layers=layers))
    return found


def first_token(machine: Machine, subjects: Subjects, tokens: int) -> Measured:
    """From the call until a user has the first token after a prompt."""
    prompts = draw_prompts(machine.args.vocab_size, 1, tokens)
    tasks: dict[tuple[str, str], Task] = {}
    for name, subject in subjects.items():
        subject.room(1, _slots(tokens + 1))
        tasks[name, ""] = timed(partial(_exhaust, subject, prompts))
    seconds = machine.run(f"first token {tokens}", tasks)
    return Measured("first token", {name: _rates(seconds[name, ""], 1) for name in subjects}, "s", 1, tokens)


def loading(machine: Machine, builds: Mapping[str, Callable[[], torch.nn.Module]], files: Sequence[Path]) -> Measured:
    """From a folder to a model whose every weight can be used, whatever is packed or quantised on the way; beside
    reading the same files into a buffer. The files are in the system's memory by then: each was read before."""
    tasks: dict[tuple[str, str], Task] = {("", "file"): timed(partial(_read_files, files))}
    tasks |= {(name, ""): timed(partial(_load, build)) for name, build in builds.items()}
    seconds = machine.run("load", tasks)
    rates = {name: _rates(seconds[name, ""], 1) for name in builds}
    limit = _rates(seconds["", "file"], 1)
    return Measured("load", rates, "s", 0, 0, dict.fromkeys(builds, limit), "reading the file")


def _slots(tokens: int) -> int:
    """A cache that ends with one of its buckets of 128, as a user's mostly does."""
    return -(-tokens // 128) * 128


def _rates(seconds: Sequence[float], amount: float) -> list[float]:
    return [amount / s for s in seconds]


def _best_of(seconds: Mapping[tuple[str, str], Sequence[float]], probes: Mapping[str, Probe]) -> list[float]:
    return best({name: seconds["", name] for name in probes}, probes)


def _extrapolated(seconds: Sequence[float], head: Sequence[float], args: ModelArgs, layers: int) -> list[float]:
    """What comes before and after the blocks stays, and each block takes what a block took."""
    return [h + (s - h) * layers / args.n_layers for s, h in zip(seconds, head, strict=True)]


def _steps(subject: Subject, token: Tensor, position: int, n: int) -> None:
    for i in range(n):
        token = subject.step(token, position + i).argmax(-1, keepdim=True)


def _heads(subject: Subject, token: Tensor, n: int) -> None:
    for _ in range(n):
        token = subject.head(token).argmax(-1, keepdim=True)


def _loop(subject: Subject, prompts: Sequence[list[int]], n: int, timer: Timer) -> float:
    """Seconds from the first token to the last: n - 1 steps of the loop."""
    stream = subject.stream(prompts, n)
    known = next(stream)  # more than one where the first are parts of a character, which comes whole
    begin = timer.now()
    for _ in stream:
        pass
    return (timer.now() - begin) * (n - 1) / max(n - known, 1)


def _exhaust(subject: Subject, prompts: Sequence[list[int]]) -> None:
    for _ in subject.stream(prompts, 1):
        pass


def _read_files(files: Sequence[Path]) -> None:
    buffer = bytearray(BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _load(build: Callable[[], torch.nn.Module]) -> None:
    touch(build())


def touch(model: torch.nn.Module) -> None:
    """Reads a byte of every page of a model's weights, so that those that are mapped are in memory."""
    for weight in model.parameters():
        if weight.layout is torch.strided and weight.is_contiguous():
            weight.detach().view(-1).view(torch.uint8)[::PAGE].sum()
