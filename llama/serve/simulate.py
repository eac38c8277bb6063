"""Planning past this machine: the loop's scheduler with a clock instead of a model.

What a server's latency will be follows from two things: how long a step takes, and which requests a step moves on. The
second is decoding.py's policy, and stands here once more without tokens and tensors, so that a minute of 10,000
requests a second on hundreds of replicas takes less than a minute; tests/serve/test_simulate.py holds its decisions
against the real loop's, step by step. The first is measured on this machine (`measure`), or computed from the memory
bandwidth and the arithmetic of a GPU that somebody else has (`roofline`).

Prompts arrive independently of each other (Poisson) and go to the less loaded of two replicas drawn by chance. A token
counts when its step ends. Steps in which nobody joins, reads or leaves are summed in closed form.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from typing_extensions import Unpack

from llama.config import PRESETS, ModelArgs
from llama.errors import QueueFull
from llama.evals.table import render
from llama.options import Above, Amount, Count, Counts, Loading, MaybeOut, MaybePath, Seed, Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama.generation import Llama
    from llama.requests import Request

# How long a step takes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step's two halves. Each is linear in the slots that attention is given."""

    decode_base: Sequence[float]
    """By the number of rows; index 0 is unused."""
    decode_slot: Sequence[float]
    """More for each slot of the longest row."""
    read_base: Sequence[float]
    """By the number of tokens of all rows together."""
    read_slot: Sequence[float]

    def decode(self, rows: int, longest: int) -> float:
        return self.decode_base[rows] + self.decode_slot[rows] * longest

    def read(self, tokens: int, longest: int) -> float:
        return self.read_base[tokens] + self.read_slot[tokens] * longest


@dataclass(frozen=True)
class Points:
    """A small table of measured steps: [rows or tokens, slots of the longest row, seconds]."""

    decode: Sequence[tuple[int, int, float]]
    read: Sequence[tuple[int, int, float]]
    factor: float = 1.0
    """How many times as long steps take where they alternate, and rows join and leave, as one kind over and over."""

    def times(self, rows: int, chunk: int) -> StepTimes:
        """Between the points, and beyond the last tokens, straight lines. Raises ValueError where they don't reach so
        many rows."""
        if max((n for n, _, _ in self.decode), default=0) < rows or not self.read:
            raise ValueError(f"steps were measured with fewer rows than {rows}: measure as many")
        lines = *_lines(self.decode, rows), *_lines(self.read, chunk)
        return StepTimes(*([self.factor * seconds for seconds in line] for line in lines))


def _lines(points: Sequence[tuple[int, int, float]], most: int) -> tuple[list[float], list[float]]:
    """For 0 to `most`: the time without slots, and for each slot."""
    sizes = sorted({size for size, _, _ in points})
    bases, slopes = [], []
    for size in sizes:
        own = [(slots, seconds) for s, slots, seconds in points if s == size]
        (near, low), (far, high) = min(own), max(own)
        slope = max(0.0, (high - low) / (far - near)) if far > near else 0.0
        slopes.append(slope)
        bases.append(max(low - slope * near, 0.0))
    if sizes[-1] < most and len(sizes) > 1:
        share = (most - sizes[-1]) / (sizes[-1] - sizes[-2])
        for line in (bases, slopes):
            line.append(line[-1] + max(0.0, line[-1] - line[-2]) * share)
        sizes.append(most)
    index = range(most + 1)
    return np.interp(index, sizes, bases).tolist(), np.interp(index, sizes, slopes).tolist()


Clock = Callable[[], float]
"""Seconds. `time.thread_time` leaves out what others compute meanwhile, where PyTorch has one thread."""


def measure(
    llama: Llama, *, temperature: float = 0.6, repeats: int = 9, seed: int = 0, clock: Clock = time.perf_counter
) -> Points:
    """Times steps of this model's own loop, which must have nothing else to do: decode by rows and read by tokens, each
    with a short and a long row, and a mix of both. Sampling, text and events count. No two rows have the same length,
    as in a server. Raises ValueError where max_seq_len leaves no room for that."""
    loop, args = llama.loop, llama.model.args
    slots, rows, draw = args.max_seq_len, llama.model.own_cache().rows, random.Random(seed)
    short, long = 32, slots - repeats - 4
    if long < 2 * short + rows:
        raise ValueError(
            f"max_seq_len is {slots}; give at least {2 * short + rows + repeats + 4} to measure {rows} rows"
        )
    stem = _random_prompt(draw, args, long)  # what was read of it isn't read again

    def asked(tokens: list[int], limit: int) -> Request:
        request = _request(llama, tokens, limit, temperature, reuse=True)
        loop.join(request)
        return request

    decode, read = [], []
    for n in _doubling(rows):
        for length in (short + rows, long):
            first = asked(stem[:length], 1)
            while not first.gone:
                loop.step()
            requests = [asked([*stem[: length - i - 1], 3], repeats + 2) for i in range(n)]
            while any(request.written == 0 for request in requests):
                loop.step()
            times = [_timed(loop.step, clock) for _ in range(repeats)]
            decode.append((n, length + repeats // 2, statistics.median(times)))
            loop.leave(*requests)
            loop.step()
    for tokens in _doubling(min(loop.chunk, long)):
        for before in sorted({0, (long - tokens) // loop.chunk * loop.chunk}):
            times = []
            for _ in range(repeats):
                request = asked(stem[:before] + _random_prompt(draw, args, tokens), 1)
                while not request.gone:
                    last = _timed(loop.step, clock)
                times.append(last)
            read.append((tokens, before + tokens, statistics.median(times)))
    points = Points(decode, read)
    return replace(points, factor=_mixed(llama, points, temperature, draw, clock))


def _mixed(llama: Llama, points: Points, temperature: float, draw: random.Random, clock: Clock) -> float:
    """The time that many requests of all lengths take, over what they take by `points`."""
    loop, slots, rows = llama.loop, llama.model.args.max_seq_len, llama.model.own_cache().rows
    sequences = [
        Simulated(0.0, draw.randrange(2, slots // 2), draw.randrange(1, slots // 8)) for _ in range(3 * rows + 4)
    ]
    prompts = [_random_prompt(draw, llama.model.args, sequence.prompt) for sequence in sequences]
    requests = [_request(llama, p, s.answer, temperature) for p, s in zip(prompts, sequences, strict=True)]
    replica = Replica(points.times(rows, loop.chunk), rows, slots, loop.chunk)
    for sequence, request in zip(sequences, requests, strict=True):
        loop.join(request)
        replica.join(sequence)
    replica.advance(math.inf)
    taken = 0.0
    while not all(request.gone for request in requests):
        taken += _timed(loop.step, clock)
    return taken / replica.busy


def _doubling(most: int) -> list[int]:
    """1, 2, 4 … and `most`."""
    return sorted({*(2**i for i in range(most.bit_length())), most})


def _random_prompt(draw: random.Random, args: ModelArgs, length: int) -> list[int]:
    return [draw.randrange(3, args.vocab_size) for _ in range(length)]


def _request(llama: Llama, tokens: list[int], limit: int, temperature: float, reuse: bool = False) -> Request:
    from llama.prompts import Prompt
    from llama.requests import Request
    from llama.sampling import Sampling

    return Request(llama.tokenizer, Prompt(tokens, frozenset()), limit, Sampling(temperature), reuse=reuse)


def _timed(work: Callable[[], object], clock: Clock) -> float:
    begin = clock()
    work()
    return clock() - begin


@dataclass(frozen=True)
class GPU:
    """From its maker's public data sheet: bytes/s of memory, dense bfloat16 operations/s, bytes of memory, and bytes/s
    to and from the other GPUs."""

    bandwidth: float
    operations: float
    memory: float
    link: float


GPUS: dict[str, GPU] = {
    "A100-80GB": GPU(2039e9, 312e12, 80e9, 600e9),
    "H100": GPU(3350e9, 989e12, 80e9, 900e9),
    "H200": GPU(4800e9, 989e12, 141e9, 900e9),
    "L4": GPU(300e9, 121e12, 24e9, 64e9),
    "4090": GPU(1008e9, 165e12, 24e9, 64e9),
}
BITS = {"": 16.0, "int8": 8.1, "int8-dynamic": 8.1, "int4": 5.0, "int4-dynamic": 5.0, "nf4": 4.25}
"""Of a weight as it lies in memory, scales included, by the scheme."""
USABLE = 0.9
"""Of a GPU's memory; the rest is for activations, tables and the driver (`codellama plan` counts them)."""
REDUCE = 12e-6
"""Seconds that an all-reduce takes besides moving bytes; there are two in each layer."""


@dataclass(frozen=True)
class Sizes:
    """Of a rank's share of a model."""

    args: ModelArgs
    ranks: int
    bits: float

    @property
    def weights(self) -> float:
        """Numbers in the matrices that a step multiplies by."""
        a, width = self.args, self.args.n_heads * self.args.head_dim
        attention = 2 * a.dim * width + 2 * a.dim * a.n_kv_heads * a.head_dim
        return (a.n_layers * (attention + 3 * a.dim * a.hidden_dim) + a.dim * a.vocab_size) / self.ranks

    @property
    def weight_bytes(self) -> float:
        return self.weights * self.bits / 8

    @property
    def slot_bytes(self) -> float:
        """Keys and values of a token in bfloat16."""
        heads = max(1, self.args.n_kv_heads // self.ranks)
        return 2 * self.args.n_layers * heads * self.args.head_dim * 2

    def rows_within(self, gpu: GPU, slots: int) -> int:
        """Rows of so many slots that fit beside the weights; the embedding is kept in bfloat16."""
        embedding = 2 * self.args.dim * self.args.vocab_size / self.ranks
        free = USABLE * gpu.memory - self.weight_bytes - embedding
        return max(0, int(free // (slots * self.slot_bytes)))


def roofline(
    sizes: Sizes, gpu: GPU, rows: int, chunk: int, *, efficiency: float = 0.6, overhead: float = 2e-3
) -> StepTimes:
    """A step takes as long as its memory traffic or its arithmetic, whichever is longer, at a share `efficiency` of
    what the data sheet says, and `overhead` seconds besides (Python, launches, sampling)."""
    a, memory, arithmetic = sizes.args, efficiency * gpu.bandwidth, efficiency * gpu.operations

    def alone(tokens: int) -> float:
        reduced = 2 * a.n_layers * (REDUCE + 2 * tokens * a.dim * 2 / gpu.link) if sizes.ranks > 1 else 0.0
        return max(sizes.weight_bytes / memory, 2 * sizes.weights * tokens / arithmetic) + overhead + reduced

    seen = 4 * a.n_layers * a.n_heads * a.head_dim / sizes.ranks / arithmetic  # scores and values of a token and slot
    return StepTimes(
        [alone(n) for n in range(rows + 1)],
        [n * sizes.slot_bytes / memory for n in range(rows + 1)],
        [alone(n) for n in range(chunk + 1)],
        [max(n * seen, sizes.slot_bytes / memory) for n in range(chunk + 1)],
    )


# What a step moves on ------------------------------------------------------------------------------------------------


class Simulated:
    """A request without its tokens: how many there are, and which beginning it shares with others."""

    __slots__ = (
        "answer", "arrival", "end", "first", "group", "held", "lead", "place", "prompt", "seat", "shared", "used"
    )  # fmt: skip

    def __init__(self, arrival: float, prompt: int, answer: int, group: int = -1, shared: int = 0) -> None:
        self.arrival, self.prompt, self.answer, self.group, self.shared = arrival, prompt, answer, group, shared
        self.held = 0  # tokens of the prompt that were read; -1 where it decodes
        self.lead = 0  # its slots, less the decode steps of its replica
        self.place = self.used = 0
        self.seat = -1  # how many had been given rows before it
        self.first = self.end = 0.0

    def common(self, other: Simulated) -> int:
        """Tokens at the beginning that both prompts have: bos at least."""
        alike = self.group >= 0 and self.group == other.group
        return min(self.shared, other.shared, self.prompt, other.prompt) if alike else 1


class Replica:
    """One loop and its cache, and when it did what. The names are those of decoding.py."""

    def __init__(
        self, times: StepTimes, rows: int, slots: int, chunk: int = 512, *, shares: bool = False,
        trace: list[Any] | None = None,
    ) -> None:  # fmt: skip
        """`shares` follows what rows hold, for prompts with shared beginnings. `trace` gets every step."""
        from llama.decoding import FEWEST, PASS, SHARED  # with it comes PyTorch, which help does without

        self.times, self.n, self.slots, self.chunk, self.shares, self.trace = times, rows, slots, chunk, shares, trace
        self._fewest, self._pass, self._shared = FEWEST, PASS, SHARED
        self.clock = self.busy = 0.0
        self.waiting: deque[Simulated] = deque()
        self.rows: list[Simulated] = []
        self.reading: set[Simulated] = set()
        self.fresh: list[Simulated] = []  # whose first token comes from a decode step
        self.gone: list[Simulated] = []  # that ended with the last step
        self.steps = 0  # of decoding
        self.ends: list[tuple[int, int, Simulated]] = []
        self.longest = 0  # the largest lead of those that decode
        self.gaps, self.counts = array("d"), array("d")  # seconds between tokens, and of how many
        self.finished: list[Simulated] = []
        self._joined = self._spans = self._seats = 0
        self.contents: list[tuple[Simulated | None, int, int]] = [(None, 0, 0)] * rows  # whose tokens, how many, used

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self.waiting) + len(self.rows)

    def load_at(self, now: float) -> int:
        """As it is known at a time before which all steps have begun: the last one may not have ended."""
        return self.load - (len(self.gone) if self.clock <= now else 0)

    def join(self, sequence: Simulated) -> None:
        """Between two calls of `advance`, at the time of the last one."""
        if not (self.waiting or len(self.rows) > len(self.gone)):
            self.clock = max(self.clock, sequence.arrival)
        self.waiting.append(sequence)

    def advance(self, until: float) -> None:
        """Makes all steps that begin before `until`."""
        while self.clock < until and (self.waiting or len(self.rows) > len(self.gone)):
            self._admit()
            decoding = self._gather(self.reading)
            if self.reading:
                self._step(decoding)
            else:
                self._run(until)

    def _admit(self) -> None:
        if self.gone:
            del self.rows[self._gather(set(self.gone)) :]
            self.gone = []
        free = self.n - len(self.rows)
        if not (self.waiting and free):
            return
        if self.shares:
            joining: list[Simulated] = []
            for sequence in islice(self.waiting, 4 * free):
                if len(joining) < free and not self._is_read_for_another(sequence, joining):
                    joining.append(sequence)
            for sequence in joining:
                self.waiting.remove(sequence)
        else:
            joining = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        joining.sort(key=lambda sequence: -sequence.prompt)
        for sequence in joining:
            sequence.held = self._place(sequence) if self.shares else 0
            sequence.place, sequence.seat, self._seats = len(self.rows), self._seats, self._seats + 1
            self.rows.append(sequence)
            self.reading.add(sequence)
            if sequence.prompt - sequence.held == 1:
                self._decodes(sequence, 0)

    def _gather(self, last: set[Simulated]) -> int:
        """Moves the rows of `last` behind the others, by the same swaps as the loop; returns how many the others
        are."""
        rows, before = self.rows, len(self.rows) - len(last)
        wrong = sorted(sequence.place for sequence in last if sequence.place < before)
        at = len(rows) - 1
        for low in wrong:
            while rows[at] in last:
                at -= 1
            one, other = rows[low], rows[at]
            rows[low], rows[at] = other, one
            one.place, other.place = at, low
            if self.shares:
                self.contents[low], self.contents[at] = self.contents[at], self.contents[low]
            at -= 1
        return before

    def _decodes(self, sequence: Simulated, written: int) -> None:
        """All but its last token are read, and `written` tokens of its answer are there."""
        self.reading.discard(sequence)
        self._joined += 1
        sequence.held = -1
        sequence.lead = sequence.prompt + written - self.steps
        self.longest = sequence.lead if len(self.ends) == 0 else max(self.longest, sequence.lead)
        heappush(self.ends, (self.steps + sequence.answer - written, self._joined, sequence))
        if not written:
            self.fresh.append(sequence)

    def _step(self, decoding: int) -> None:
        """A piece of some prompts, and a token of each row that decodes."""
        rows, T = self._piece(decoding)
        slots = max(sequence.held for sequence in rows) + T
        seconds = self.times.read(len(rows) * T, slots)
        if self.trace is not None:
            self.trace.append(("read", [(s, s.held) for s in rows], T))
        self._spans += 1
        if decoding:
            seconds += self.times.decode(decoding, self.longest + self.steps)
        fresh, self.fresh = self.fresh, []
        self._decoded(decoding, 1, seconds, len(fresh))
        for sequence in fresh:
            sequence.first = self.clock
        for sequence in rows:
            read = min(T, sequence.prompt - sequence.held)
            sequence.held += read
            if self.shares:
                self.contents[sequence.place] = (sequence, sequence.held, self._spans - (decoding > 0))
            unread = sequence.prompt - sequence.held
            if unread == 0:
                sequence.first = self.clock
                if sequence.answer == 1:
                    self.reading.discard(sequence)
                    self._ended(sequence, self._spans - (decoding > 0))
                else:
                    self._decodes(sequence, 1)
            elif unread == 1:
                self._decodes(sequence, 0)

    def _run(self, until: float) -> None:
        """As many steps of decoding alone as pass until a row ends or, where there is a free one, until `until`."""
        n, longest = len(self.rows), self.longest + self.steps
        most = self.ends[0][0] - self.steps
        first, more = self.times.decode(n, longest), self.times.decode_slot[n]
        steps = 1 if self.fresh else most
        if n < self.n and steps > 1 and until < math.inf:
            steps = min(steps, _steps_until(until - self.clock, first, more))
        seconds = steps * first + more * steps * (steps - 1) / 2
        fresh, self.fresh = self.fresh, []
        self._decoded(n, steps, seconds, len(fresh))
        for sequence in fresh:
            sequence.first = self.clock

    def _decoded(self, n: int, steps: int, seconds: float, fresh: int) -> None:
        """Time passes, with so many tokens of each of n rows. `fresh` rows have no token before."""
        self.clock += seconds
        self.busy += seconds
        if not n:
            return
        if self.trace is not None:
            tops = range(self.longest + self.steps, self.longest + self.steps + steps)
            self.trace += [("decode", self.rows[:n], longest) for longest in tops]
        self.steps += steps
        self._spans += steps
        if steps * n > fresh:
            self.gaps.append(seconds / steps)
            self.counts.append(steps * n - fresh)
        top = False
        while self.ends and self.ends[0][0] == self.steps:
            sequence = heappop(self.ends)[2]
            top = top or sequence.lead == self.longest
            self._ended(sequence, self._spans)
        if top:
            self.longest = max((sequence.lead for _, _, sequence in self.ends), default=0)

    def _ended(self, sequence: Simulated, span: int) -> None:
        sequence.end = self.clock
        self.gone.append(sequence)
        self.finished.append(sequence)
        if self.shares:
            self.contents[sequence.place] = (sequence, sequence.prompt + sequence.answer - 1, span)

    def _piece(self, row: int) -> tuple[list[Simulated], int]:
        first = self.rows[row]
        rows, T = [first], min(first.prompt - first.held, self.chunk)
        padding, longest = 0, first.held
        for sequence in islice(self.rows, row + 1, None):
            unread = sequence.prompt - sequence.held
            width = min(max(T, unread), self.chunk)
            more = padding + len(rows) * (width - T) + width - min(unread, width)
            top = max(longest, sequence.held)
            if top + width > self.slots or (len(rows) + 1) * width > self.chunk or more > self._pass * len(rows):
                break
            rows.append(sequence)
            padding, T, longest = more, width, top
        oldest = min(islice(self.rows, row, None), key=lambda sequence: sequence.seat)
        return (rows, T) if oldest in rows else self._piece(oldest.place)

    # Shared beginnings -----------------------------------------------------------------------------------------------

    def _held(self, row: int, wanted: Simulated) -> int:
        """Tokens of a prompt's beginning that a row holds; the last one is not looked for."""
        sequence, length, _ = self.contents[row]
        if sequence is None:
            return 0
        if row < len(self.rows):
            running = self.rows[row]
            length = running.lead + self.steps - 1 if running.held < 0 else running.held
        return min(sequence.common(wanted), length, wanted.prompt - 1)

    def _is_read_for_another(self, sequence: Simulated, joining: list[Simulated]) -> bool:
        others = [*self.reading, *(other for other in joining if other.prompt > 1)]
        coming = max((min(o.common(sequence), sequence.prompt - 1) for o in others), default=0)
        return coming >= self._shared and coming - self._shared >= max(
            self._held(row, sequence) for row in range(self.n)
        )

    def _place(self, sequence: Simulated) -> int:
        contents, row = self.contents, len(self.rows)
        shared = [length if (length := self._held(i, sequence)) >= self._fewest else 0 for i in range(self.n)]
        source = max(range(self.n), key=lambda i: (shared[i], i >= row))
        known, oldest = shared[source], min(range(row, self.n), key=lambda i: contents[i][2])
        if known and source >= row and (source == oldest or known == contents[source][1]):
            contents[source], contents[row] = contents[row], contents[source]
        elif oldest != row:
            contents[oldest] = contents[row]
        used = contents[row][2]
        contents[row] = (sequence, known, used)
        return known


def _steps_until(seconds: float, first: float, more: float) -> int:
    """The fewest steps that take at least `seconds`, where each takes `more` longer than the one before."""
    if more * seconds < 1e-9 * first * first:
        return max(1, math.ceil(seconds / first))
    half = first - more / 2
    return max(1, math.ceil((math.sqrt(half * half + 2 * more * seconds) - half) / more))


# Many replicas -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What clients ask for: requests a second, and how long they are."""

    rps: float
    prompt: int
    """Tokens, on average."""
    answer: int
    spread: float = 0.5
    """Of both lengths: the standard deviation over the mean (log-normal); 0: all alike."""
    shared: int = 0
    """Tokens at the beginning that prompts have in common."""
    groups: int = 1
    """How many such beginnings there are."""
    router: Literal["two", "random", "least"] = "two"
    """To which replica a request goes: the less loaded of two drawn by chance, any, or the least loaded."""

    def arrivals(self, seconds: float, slots: int, seed: int = 0) -> Iterator[Simulated]:
        """Requests in the order in which they come, within `seconds`."""
        draw = np.random.default_rng(seed)
        now, block = 0.0, 4096
        while True:
            times = now + np.cumsum(draw.exponential(1 / self.rps, block))
            prompts = self._lengths(draw, self.prompt, block, slots - 1)
            answers = np.minimum(self._lengths(draw, self.answer, block, slots), slots - prompts)
            groups = draw.integers(self.groups, size=block) if self.shared else np.full(block, -1)
            columns = times.tolist(), prompts.tolist(), answers.tolist(), groups.tolist()
            for at, prompt, answer, group in zip(*columns, strict=True):
                if at > seconds:
                    return
                yield Simulated(at, prompt, answer, group, self.shared)
            now = float(times[-1])

    def _lengths(self, draw: np.random.Generator, mean: int, n: int, most: int) -> Any:
        sigma = math.sqrt(math.log(1 + self.spread**2))
        drawn = mean * np.exp(sigma * draw.standard_normal(n) - sigma**2 / 2)
        return np.clip(np.rint(drawn), 1, most).astype(np.int64)


@dataclass(frozen=True)
class Latencies:
    """Of the requests that came after the first fifth of the time. Seconds."""

    ttft_p50: float
    ttft_p95: float
    gap_p50: float
    gap_p95: float
    end_to_end_p95: float
    requests: int
    rps: float
    """Answers that ended, a second."""
    tokens: float
    """Tokens written a second."""
    busy: float
    """The share of the time in which steps were made."""


def simulate(
    work: Work, times: StepTimes, *, replicas: int, rows: int, slots: int, chunk: int = 512, seconds: float = 60.0,
    seed: int = 0,
) -> Latencies:  # fmt: skip
    """A load on some replicas, from an empty start. All that came is answered; the time is what clients wait in."""
    fleet = [Replica(times, rows, slots, chunk, shares=work.shared > 0) for _ in range(replicas)]
    draw = random.Random(seed)
    for sequence in work.arrivals(seconds, slots, seed):
        now = sequence.arrival
        if work.router == "random" or replicas == 1:
            chosen = fleet[draw.randrange(replicas)]
            chosen.advance(now)
        else:
            some = fleet if work.router == "least" else [fleet[draw.randrange(replicas)] for _ in range(2)]
            for replica in some:
                replica.advance(now)
            chosen = min(some, key=lambda replica: replica.load_at(now))
        chosen.join(sequence)
    for replica in fleet:
        replica.advance(seconds)
    busy = sum(replica.busy for replica in fleet) / replicas / seconds
    ended = sum(sum(s.end <= seconds and s.end > seconds / 5 for s in r.finished) for r in fleet)
    written = sum(s.answer for r in fleet for s in r.finished if seconds / 5 < s.end <= seconds)
    for replica in fleet:
        replica.advance(math.inf)
    return _latencies(fleet, seconds, ended, written, busy)


def _latencies(fleet: Sequence[Replica], seconds: float, ended: int, written: int, busy: float) -> Latencies:
    begin = seconds / 5
    counted = [s for replica in fleet for s in replica.finished if s.arrival >= begin]
    gaps = np.concatenate([np.frombuffer(r.gaps) for r in fleet if r.gaps] or [np.zeros(1)])
    weights = np.concatenate([np.frombuffer(r.counts) for r in fleet if r.gaps] or [np.ones(1)])
    order = np.argsort(gaps)
    gaps, weights = gaps[order], np.cumsum(weights[order])
    middle, high = (float(gaps[np.searchsorted(weights, share * weights[-1])]) for share in (0.5, 0.95))
    ttft = np.array([s.first - s.arrival for s in counted] or [math.inf])
    whole = np.array([s.end - s.arrival for s in counted] or [math.inf])
    window = seconds - begin
    return Latencies(
        float(np.quantile(ttft, 0.5)),
        float(np.quantile(ttft, 0.95)),
        middle,
        high,
        float(np.quantile(whole, 0.95)),
        len(counted),
        ended / window,
        written / window,
        min(1.0, busy),
    )


# What holds a load ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of replica: ranks that share a model, and rows of its cache."""

    ranks: int
    rows: int
    times: StepTimes
    slots: int
    chunk: int = 512


@dataclass(frozen=True)
class Wanted:
    p95_ttft: float
    """Seconds."""
    p95_gap: float
    """Between two tokens of an answer."""

    def holds(self, found: Latencies) -> bool:
        return found.ttft_p95 <= self.p95_ttft and found.gap_p95 <= self.p95_gap


@dataclass(frozen=True)
class Choice:
    """How many replicas of a kind hold a load, and what clients wait then."""

    kind: Kind
    replicas: int
    each: float
    """Requests a second that one replica holds."""
    found: Latencies

    @property
    def ranks(self) -> int:
        return self.replicas * self.kind.ranks


def observed(work: Work, kind: Kind, rps: float, replicas: int, seconds: float, seed: int = 0) -> Latencies:
    """`replicas` of a kind under `rps` requests a second in all."""
    own = replace(work, rps=rps)
    return simulate(
        own,
        kind.times,
        replicas=replicas,
        rows=kind.rows,
        slots=kind.slots,
        chunk=kind.chunk,
        seconds=seconds,
        seed=seed,
    )


def longest_answer(work: Work, kind: Kind) -> float:
    """About how many seconds an answer takes where all rows are busy."""
    reads = -(-work.prompt // kind.chunk)
    one = kind.times.decode(kind.rows, min(kind.slots, work.prompt + work.answer))
    return work.answer * one + reads * kind.times.read(min(kind.chunk, work.prompt), work.prompt)


def _long_enough(work: Work, kind: Kind, wanted: Wanted, rps: float) -> float:
    """Seconds after which a load that is 3 % too high has built up a queue that shows in the TTFT."""
    return max(12 * longest_answer(work, kind), 600 / rps, min(30 * wanted.p95_ttft, 200_000 / rps))


def capacity(work: Work, kind: Kind, wanted: Wanted, *, sample: int = 4, seed: int = 0) -> float:
    """Requests a second that a replica holds as one of `sample`, within 3 %; 0 where not even a few do."""
    high = sample * 2.0 * kind.rows / longest_answer(work, kind)
    low = high / 1024

    def holds(rps: float) -> bool:
        return wanted.holds(observed(work, kind, rps, sample, _long_enough(work, kind, wanted, rps), seed))

    if not holds(low):
        return 0.0
    while high > 1.03 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low / sample


def choose(work: Work, kind: Kind, wanted: Wanted, *, sample: int = 32, seed: int = 0) -> Choice | None:
    """The fewest replicas of a kind that hold a load; None where none does. Of more than `sample` replicas, so many are
    simulated with their part of the load."""
    each = capacity(work, kind, wanted, sample=1 if work.router == "random" else 4, seed=seed)
    if not each:
        return None
    replicas = max(1, math.ceil(0.98 * work.rps / each))
    for _ in range(12):
        part = min(replicas, sample)
        rps = work.rps * part / replicas
        found = observed(work, kind, rps, part, _long_enough(work, kind, wanted, rps), seed + 1)
        if wanted.holds(found):
            return Choice(kind, replicas, each, found)
        replicas += max(1, replicas // 50)
    return None


def table(choices: Sequence[Choice]) -> str:
    """For people: the fewest ranks first."""
    columns = "ranks|rows|replicas|req/s each|TTFT p50|p95|between tokens p50|p95|tokens/s each|busy"
    header = ["", *columns.split("|")]
    lines = []
    for number, choice in enumerate(choices):
        kind, found = choice.kind, choice.found
        lines.append([
            "best" if number == 0 else "", kind.ranks, kind.rows, f"{choice.replicas:,}", f"{choice.each:.2f}",
            _time(found.ttft_p50), _time(found.ttft_p95), _time(found.gap_p50), _time(found.gap_p95),
            f"{found.tokens / min(choice.replicas, 32):,.0f}", f"{found.busy:.0%}",
        ])  # fmt: skip
    return render(header, lines)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2f} ms"


def curve(work: Work, choice: Choice, wanted: Wanted, *, seed: int = 0) -> list[tuple[float, Latencies]]:
    """Latencies from a tenth of the load that a choice's replicas hold to a fifth more than that, in requests a second
    of all replicas; up to 4 are simulated."""
    sample, kind = min(choice.replicas, 4), choice.kind
    found = []
    for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        rps = share * choice.each * sample
        point = observed(work, kind, rps, sample, _long_enough(work, kind, wanted, rps), seed)
        found.append((share * choice.each * choice.replicas, point))
    return found


def draw(points: Sequence[tuple[float, Latencies]], work: Work, wanted: Wanted, figure: Figure) -> None:
    """Latency against load: TTFT and the time between tokens, with the wanted limits as dashes."""
    loads = [rps for rps, _ in points]
    left, right = figure.subplots(1, 2)
    for axes, name, limit in ((left, "ttft", wanted.p95_ttft), (right, "gap", wanted.p95_gap)):
        for percentile in ("p50", "p95"):
            axes.plot(loads, [getattr(found, f"{name}_{percentile}") for _, found in points], "o-", label=percentile)
        if math.isfinite(limit):
            axes.axhline(limit, color="black", linestyle="dashed", label="wanted")
        axes.axvline(work.rps, color="gray", linestyle="dotted", label="this load")
        axes.set_yscale("log")
        axes.set_xlabel("requests/s")
        axes.set_ylabel("seconds")
        axes.legend()
    left.set_title("to the first token")
    right.set_title("between two tokens")


# The same for real ---------------------------------------------------------------------------------------------------


def replay(
    llama: Llama, work: Work, *, seconds: float = 20.0, temperature: float = 0.6, seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Latencies:  # fmt: skip
    """The load on this machine's own loop, measured as `simulate` measures: to check the one by the other. Time in
    which there is nothing to do is skipped."""
    loop, args, rng = llama.loop, llama.model.args, random.Random(seed)
    coming = deque(work.arrivals(seconds, args.max_seq_len, seed))
    requests = {s: _request(llama, _random_prompt(rng, args, s.prompt), s.answer, temperature) for s in coming}
    replica = Replica(StepTimes([], [], [], []), 1, args.max_seq_len)
    running: dict[Simulated, tuple[int, float]] = {}  # tokens, and when the last one came
    begin = clock()
    while coming or running:
        now = clock() - begin
        if not running and coming[0].arrival > now:
            begin -= coming[0].arrival - now
            now = coming[0].arrival
        with suppress(QueueFull):  # then the client waits
            while coming and coming[0].arrival <= now:
                loop.join(requests[coming[0]])
                running[coming.popleft()] = (0, 0.0)
        loop.step()
        after = clock() - begin
        replica.busy += min(after, seconds) - min(now, seconds)
        for sequence, (before, last) in list(running.items()):
            request = requests[sequence]
            if request.written > before:
                if before:
                    replica.gaps.append(after - last)
                    replica.counts.append(1.0)
                else:
                    sequence.first = after
                running[sequence] = (request.written, after)
            if request.gone:
                sequence.end = after
                replica.finished.append(sequence)
                del running[sequence]
    ended = [s for s in replica.finished if seconds / 5 < s.end <= seconds]
    return _latencies([replica], seconds, len(ended), sum(s.answer for s in ended), replica.busy / seconds)


# The command ---------------------------------------------------------------------------------------------------------


def kinds_of(
    args: ModelArgs, gpu: GPU, *, ranks: Sequence[int], rows: Sequence[int], slots: int, chunk: int = 512,
    quantize: str | None = None, efficiency: float = 0.6, overhead: float = 2e-3,
) -> list[Kind]:  # fmt: skip
    """Those that fit into a GPU's memory, out of some numbers of ranks and of rows."""
    found = []
    for n in ranks:
        if args.n_heads % n or args.hidden_dim % n or (args.n_kv_heads % n and n % args.n_kv_heads):
            continue
        sizes = Sizes(args, n, BITS[(quantize or "").partition(":")[0]])
        room = sizes.rows_within(gpu, slots)
        for r in [r for r in rows if r <= room]:
            times = roofline(sizes, gpu, r, chunk, efficiency=efficiency, overhead=overhead)
            found.append(Kind(n, r, times, slots, chunk))
    return found


def command(
    *,
    rps: Above = 1.0,
    prompt: Count = 1500,
    answer: Count = 200,
    p95_ttft: Above = 2.0,
    p95_gap: Above = 0.2,
    spread: Share = 0.5,
    shared: Amount = 0,
    groups: Count = 1,
    router: Literal["two", "random", "least"] = "two",
    model: Literal["7B", "13B", "34B", "70B"] = "7B",
    gpu: Literal["A100-80GB", "H100", "H200", "L4", "4090"] = "A100-80GB",
    ranks: Counts = (1, 2, 4, 8),
    rows: Counts = (4, 8, 16, 32, 64, 128),
    efficiency: Share = 0.6,
    overhead: Above = 0.002,
    here: bool = False,
    points: MaybePath = None,
    check: bool = False,
    seed: Seed = 0,
    out: MaybeOut = None,
    **loading: Unpack[Loading],
) -> None:
    """How many replicas, of how many ranks and rows, hold a load: a simulation of the loop's scheduler.

    Step times come from a GPU's data sheet (for --max_seq_len, --prefill_chunk and --quantize), or with --here from a
    checkpoint on this machine.

    Args:
        rps: requests a second in all.
        prompt: tokens of a prompt, on average.
        answer: tokens of an answer, on average.
        p95_ttft: seconds within which 95 % of the answers shall begin.
        p95_gap: seconds within which 95 % of the tokens shall follow the one before.
        spread: of the lengths: standard deviation over mean (0: all alike).
        shared: tokens at the beginning that prompts have in common.
        groups: how many such beginnings there are.
        router: a request goes to the less loaded of two replicas drawn by chance, to any, or to the least loaded.
        model: a published size.
        gpu: whose data sheet is taken.
        ranks: GPUs that share a model: these numbers are tried.
        rows: of a replica's cache (max_batch_size): these numbers are tried.
        efficiency: the share of the data sheet's bandwidth and arithmetic that is reached.
        overhead: seconds of a step besides.
        here: measure the steps of the checkpoint (--ckpt_dir …) on this machine, and plan with these.
        points: a file of measured steps: read where it exists; written with --here.
        check: with --here, make a part of the load for real as well.
        seed: of arrivals and lengths.
        out: a folder for plan_serve.json and the picture latency.png.
    """
    if out is not None:
        _require_matplotlib()
    work = Work(rps, prompt, answer, spread, shared, groups, router)
    wanted = Wanted(p95_ttft, p95_gap)
    llama: Llama | None = None
    if here or points is not None:
        measured, most_rows, slots, chunk, llama = _measured(points, here, loading)
        kinds = [Kind(1, r, measured.times(r, chunk), slots, chunk) for r in {*rows, most_rows} if r <= most_rows]
        on = "this machine" if here else str(points)
    else:
        args, quantize = ModelArgs(**PRESETS[model]), loading.get("quantize")
        slots = loading.get("max_seq_len") or -(-round((prompt + answer) * (4 if spread else 1) + 1) // 128) * 128
        kinds = kinds_of(
            args, GPUS[gpu], ranks=ranks, rows=rows, slots=slots, chunk=loading.get("prefill_chunk", 512),
            quantize=quantize, efficiency=efficiency, overhead=overhead,
        )  # fmt: skip
        on = f"{model} on {gpu}" + (f" in {quantize}" if quantize else "")
        if not kinds:
            raise ValueError(f"{on}: {slots:,} slots a row fit with none of these ranks and rows; give more --ranks")
    if prompt + 1 > slots:
        raise ValueError(f"prompts of {prompt:,} tokens don't fit into {slots:,} slots: give more --max_seq_len")
    choices = [c for kind in kinds if (c := choose(work, kind, wanted, seed=seed)) is not None]
    choices.sort(key=lambda choice: (choice.ranks, choice.found.ttft_p95))
    limits = f"p95 TTFT {p95_ttft:g} s, between tokens {p95_gap:g} s"
    print(f"{on}: {rps:g} requests/s of {prompt:,} + {answer:,} tokens; {limits}")
    if not choices:
        raise ValueError("no number of replicas holds that: allow more time, or give faster devices or more ranks")
    print(table(choices))
    best = choices[0]
    print(
        f"{best.replicas:,} replicas of {best.kind.ranks} ranks with {best.kind.rows} rows (--max_batch_size) hold it"
    )
    if best.replicas > 32:
        begin = time.perf_counter()
        whole = observed(work, best.kind, rps, best.replicas, 60.0, seed + 2)
        taken = f"a minute of it, simulated in {time.perf_counter() - begin:.0f} s"
        print(f"all of them: p95 TTFT {_time(whole.ttft_p95)}, between tokens {_time(whole.gap_p95)} ({taken})")
    if check and llama is not None:
        print(_checked(llama, work, best, seed))
    if out is not None:
        _save(Path(out), work, wanted, choices, curve(work, best, wanted, seed=seed))


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError("the picture is drawn by matplotlib: pip install 'codellama[plot]', or leave --out away")


def _measured(path: str | None, here: bool, loading: Loading) -> tuple[Points, int, int, int, Llama | None]:
    """Points, rows, slots and chunk: from a file, or by a model on this machine."""
    if not here:
        try:
            facts = json.loads(Path(str(path)).read_text(encoding="utf-8"))
            decode, read = ([(int(n), int(at), float(s)) for n, at, s in facts[half]] for half in ("decode", "read"))
            found = Points(decode, read, float(facts["factor"]))
            return found, max(n for n, _, _ in found.decode), int(facts["slots"]), int(facts["chunk"]), None
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "give --here as well to measure it"
            raise ValueError(f"{path} holds no measured steps ({type(error).__name__}: {error}): {remedy}") from None
    from llama.front import load
    from llama.system import replacing

    llama = load(**loading)
    found = measure(llama)
    rows, slots = llama.model.own_cache().rows, llama.model.args.max_seq_len
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"slots": slots, "chunk": llama.prefill_chunk, **asdict(found)}) + "\n")
    return found, rows, slots, llama.prefill_chunk, llama


def _checked(llama: Llama, work: Work, best: Choice, seed: int) -> str:
    """One replica's part of the load, for real and simulated."""
    rows = llama.model.own_cache().rows
    kind = replace(best.kind, rows=rows, times=measure(llama).times(rows, llama.prefill_chunk))
    rps = min(work.rps, 0.8 * best.each)
    seconds = min(60.0, 300 / rps)
    real = replay(llama, replace(work, rps=rps), seconds=seconds, seed=seed)
    told = observed(work, kind, rps, 1, seconds, seed)
    lines = [
        [name, one, other]
        for name, one, other in (
            ("TTFT p95", _time(real.ttft_p95), _time(told.ttft_p95)),
            ("between tokens p95", _time(real.gap_p95), _time(told.gap_p95)),
            ("tokens/s", f"{real.tokens:,.0f}", f"{told.tokens:,.0f}"),
        )
    ]
    return f"\n{rps:.2f} requests/s on this machine\n" + render(["", "for real", "simulated"], lines)


def _save(
    folder: Path, work: Work, wanted: Wanted, choices: Sequence[Choice], points: Sequence[tuple[float, Latencies]]
) -> None:
    from llama.evals.record import picture
    from llama.system import replacing

    rows = [
        {"ranks": c.kind.ranks, "rows": c.kind.rows, "replicas": c.replicas, "rps_each": c.each, **asdict(c.found)}
        for c in choices
    ]
    curve_of = [{"load": load, **asdict(found)} for load, found in points]
    facts = {"work": asdict(work), "wanted": asdict(wanted), "choices": rows, "latency_against_load": curve_of}
    with replacing(folder / "plan_serve.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    with picture(folder / "latency.png", 10) as figure:
        draw(points, work, wanted, figure)
