"""The simulated scheduler against the real one, its arithmetic against queueing theory, and plans against both."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulate_scripted import real_trace

from llama import Llama
from llama.config import PRESETS, ModelArgs
from llama.serve.simulate import (
    GPUS,
    Kind,
    Points,
    Replica,
    Simulated,
    Sizes,
    StepTimes,
    Wanted,
    Work,
    choose,
    command,
    kinds_of,
    longest_answer,
    measure,
    observed,
    replay,
    roofline,
    simulate,
    table,
)
from llama.tokenizer import Tokenizer


def constant(rows: int, chunk: int, decode: float = 1.0, read: float = 1.0) -> StepTimes:
    return StepTimes([decode] * (rows + 1), [0.0] * (rows + 1), [read] * (chunk + 1), [0.0] * (chunk + 1))


def schedule(rng: random.Random, slots: int, sharing: bool) -> list[Simulated]:
    """Requests in bursts and pauses, of every length there may be."""
    now, found = 0.0, []
    groups = [rng.choice([20, 40, 70]) for _ in range(3)]
    for _ in range(rng.choice([3, 12, 40])):
        now += rng.choice([0, 0, 0, 1, 3, 20])
        prompt = rng.choice([1, 2, 5, 16, 17, 33, 34, 65, rng.randrange(1, slots), rng.randrange(1, slots)])
        group = rng.choice([-1, 0, 1, 2]) if sharing else -1
        answer = rng.choice([1, 1, 2, 3, 9, 30])
        found.append(Simulated(now, min(prompt, slots - answer), answer, group, groups[group] if group >= 0 else 1))
    return found


def simulated_trace(sequences: list[Simulated], rows: int, slots: int, chunk: int, sharing: bool) -> list[Any]:
    trace: list[Any] = []
    replica = Replica(constant(rows, chunk), rows, slots, chunk, shares=sharing, trace=trace)
    for sequence in sequences:
        replica.advance(sequence.arrival)
        replica.join(sequence)
    replica.advance(math.inf)
    assert len(replica.finished) == len(sequences)
    return trace


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_it_decides_as_the_real_loop_does(tokenizer: Tokenizer, seed: int, sharing: bool) -> None:
    """The same requests in the same pieces and steps, at the same times."""
    rng = random.Random(1000 * sharing + seed)
    rows, slots, chunk = rng.choice([1, 2, 4, 7]), rng.choice([64, 160]), rng.choice([8, 32, 128])
    sequences = schedule(rng, slots, sharing)
    numbers = {id(sequence): i for i, sequence in enumerate(sequences)}
    real, times = real_trace(tokenizer, sequences, rows, slots, chunk)
    trace = simulated_trace(sequences, rows, slots, chunk, sharing)
    told = [
        (kind, [(numbers[id(s)], at) for s, at in what], more)
        if kind == "read"
        else (kind, [numbers[id(s)] for s in what], more)
        for kind, what, more in trace
    ]
    assert told == real
    assert [(s.first, s.end) for s in sequences] == times


def test_steps_that_are_summed_take_as_long_as_one_by_one() -> None:
    """The trace has every step; its times, each from the tables, add up to the clock, also where they grow with the
    slots."""
    times = StepTimes(
        [0.0, 1.0, 1.5, 1.75, 2.0], [0.0, 0.01, 0.02, 0.03, 0.05], [0.5] * 33, [0.001 * n for n in range(33)]
    )
    for seed in range(20):
        rng, trace = random.Random(seed), list[Any]()
        replica = Replica(times, 4, 160, 32, trace=trace)
        sequences = schedule(rng, 160, False)
        for sequence in sequences:
            replica.advance(sequence.arrival)
            assert replica.clock >= sequence.arrival or not replica.load_at(sequence.arrival)
            replica.join(sequence)
        replica.advance(math.inf)
        seconds = sum(
            times.read(len(what) * more, max(at for _, at in what) + more)
            if kind == "read"
            else times.decode(len(what), more)
            for kind, what, more in trace
        )
        assert replica.busy == pytest.approx(seconds)
        written = sum(len(what) for kind, what, _ in trace if kind == "decode")
        assert sum(s.answer for s in sequences) == written + sum(
            s.prompt > 1 and _read_whole(s, trace) for s in sequences
        )
        assert sum(replica.counts) == sum(s.answer - 1 for s in sequences)


def _read_whole(sequence: Simulated, trace: list[Any]) -> bool:
    """Whether its first token came from reading its last piece, and not from a decode step."""
    pieces = [(at, T) for kind, what, T in trace if kind == "read" for s, at in what if s is sequence]
    return bool(pieces) and sum(pieces[-1]) >= sequence.prompt


def test_waiting_is_what_queueing_theory_says() -> None:
    """One row and answers that all take D: an M/D/1 queue, whose mean wait is load·D / 2(1 - load) (Pollaczek and
    Khinchine)."""
    times, D = constant(1, 8, decode=0.1, read=0.5), 0.5 + 9 * 0.1
    for load in (0.3, 0.6, 0.8):
        replica, work = Replica(times, 1, 32, 8), Work(load / D, 8, 10, spread=0.0)
        waits = []
        for sequence in work.arrivals(60_000, 32):
            replica.advance(sequence.arrival)
            replica.join(sequence)
        replica.advance(math.inf)
        waits = [s.first - 0.5 - s.arrival for s in replica.finished]
        assert sum(waits) / len(waits) == pytest.approx(load * D / 2 / (1 - load), rel=0.08)
        assert replica.busy / 60_000 == pytest.approx(load, rel=0.02)


def test_arrivals_are_as_many_and_as_long_as_asked_for() -> None:
    found = list(Work(100.0, 300, 50, spread=0.5).arrivals(100.0, 10_000))
    assert len(found) == pytest.approx(10_000, rel=0.03)
    assert sum(s.prompt for s in found) / len(found) == pytest.approx(300, rel=0.03)
    assert sum(s.answer for s in found) / len(found) == pytest.approx(50, rel=0.03)
    assert all(s.prompt + s.answer <= 10_000 and s.prompt >= 1 and s.answer >= 1 for s in found)
    assert all(s.prompt == 300 for s in Work(5.0, 300, 50, spread=0.0).arrivals(10.0, 1000))
    again = list(Work(100.0, 300, 50, spread=0.5).arrivals(100.0, 10_000))
    assert [(s.arrival, s.prompt) for s in found] == [(s.arrival, s.prompt) for s in again]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_sizes_are_those_of_the_model(preset: str, ranks: int) -> None:
    """Against the shapes that a Transformer of this preset has."""
    import torch

    from llama.model import Transformer

    args = ModelArgs(**PRESETS[preset])
    with torch.device("meta"):
        model = Transformer(args)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "tok_emb" not in name)
    sizes = Sizes(args, ranks, 16.0)
    assert sizes.weights == pytest.approx(matrices / ranks)
    assert sizes.slot_bytes == 2 * 2 * args.n_layers * max(1, args.n_kv_heads // ranks) * args.head_dim


def test_a_roofline_is_memory_for_few_tokens_and_arithmetic_for_many() -> None:
    sizes, gpu = Sizes(ModelArgs(**PRESETS["7B"]), 1, 16.0), GPUS["A100-80GB"]
    times = roofline(sizes, gpu, 64, 512, efficiency=0.5, overhead=0.0)
    assert times.decode(1, 0) == times.decode(64, 0) == pytest.approx(6.607e9 * 2 / (0.5 * 2039e9), rel=0.01)
    assert times.read(512, 0) == pytest.approx(2 * 6.607e9 * 512 / (0.5 * 312e12), rel=0.01)
    assert times.decode(8, 1000) - times.decode(8, 0) == pytest.approx(8 * 1000 * 524_288 / (0.5 * 2039e9))
    fewer_bits = roofline(Sizes(sizes.args, 1, 8.1), gpu, 1, 1, overhead=0.0)
    assert fewer_bits.decode(1, 0) < 0.55 * roofline(sizes, gpu, 1, 1, overhead=0.0).decode(1, 0)
    both = roofline(Sizes(sizes.args, 2, 16.0), gpu, 1, 1, overhead=0.0)
    assert 0.5 < both.decode(1, 0) / roofline(sizes, gpu, 1, 1, overhead=0.0).decode(1, 0) < 0.65  # and the all-reduces


def test_only_what_fits_is_planned() -> None:
    args = ModelArgs(**PRESETS["70B"])
    kinds = kinds_of(args, GPUS["A100-80GB"], ranks=(1, 2, 3, 4, 8), rows=(16, 4096), slots=2048)
    assert {(kind.ranks, kind.rows) for kind in kinds} == {(4, 16), (8, 16)}
    assert kinds_of(args, GPUS["L4"], ranks=(1,), rows=(1,), slots=128, quantize="int4:64") == []


KIND = Kind(1, 8, constant(8, 64, decode=0.02, read=0.05), 1024, 64)


def test_a_plan_holds_and_with_fewer_replicas_it_does_not() -> None:
    work, wanted = Work(20.0, 100, 40), Wanted(1.0, 0.2)
    choice = choose(work, KIND, wanted)
    assert choice is not None
    assert wanted.holds(choice.found)
    assert choice.each == pytest.approx(20.0 / choice.replicas, rel=0.25)
    fewer = observed(work, KIND, 20.0, math.floor(choice.replicas * 0.8), 120.0)
    assert not wanted.holds(fewer)
    twice = choose(Work(40.0, 100, 40), KIND, wanted)
    assert twice is not None
    assert twice.replicas == pytest.approx(2 * choice.replicas, abs=2)
    assert choose(work, KIND, Wanted(0.01, 0.2)) is None
    assert choose(work, KIND, Wanted(1.0, 0.01)) is None
    assert f"{choice.replicas}" in table([choice])


def test_shared_beginnings_and_routing_are_felt() -> None:
    """What is read already isn't read again; the less loaded of two is a better choice than any."""
    alone, shared = (observed(Work(6.0, 400, 10, spread=0.2, shared=length), KIND, 6.0, 4, 60.0) for length in (0, 350))
    assert shared.ttft_p50 < 0.6 * alone.ttft_p50
    by = {
        router: simulate(Work(30.0, 100, 40, router=router), KIND.times, replicas=8, rows=8, slots=1024, chunk=64)
        for router in ("random", "two", "least")
    }
    assert by["least"].ttft_p95 <= by["two"].ttft_p95 * 1.05
    assert by["two"].ttft_p95 < by["random"].ttft_p95


def test_points_become_lines_and_say_where_they_end() -> None:
    points = Points([(1, 10, 1.0), (1, 20, 2.0), (4, 10, 4.0)], [(1, 1, 0.1), (8, 8, 0.8)], factor=2.0)
    times = points.times(4, 8)
    assert times.decode(1, 10) == 2.0
    assert times.decode(1, 20) == 4.0
    assert times.decode(4, 999) == 8.0
    assert times.read(8, 5) == pytest.approx(1.6)
    assert points.times(1, 15).read(15, 1) == pytest.approx(3.0)
    for few, rows in ((points, 5), (Points([], []), 1)):
        with pytest.raises(ValueError, match=f"fewer rows than {rows}"):
            few.times(rows, 8)


def test_a_model_is_measured_by_its_own_loop(tiny_llama: Llama) -> None:
    points = measure(tiny_llama, repeats=3)
    rows, slots = tiny_llama.model.own_cache().rows, tiny_llama.model.args.max_seq_len
    assert {n for n, _, _ in points.decode} == {1, 2, rows}
    assert all(0 < seconds < 1 and at <= slots for _, at, seconds in (*points.decode, *points.read))
    assert 0.2 < points.factor < 5
    found = replay(tiny_llama, Work(20.0, 30, 10), seconds=1.0)
    assert found.requests > 5
    assert found.tokens > 50
    assert not tiny_llama.loop._rows or all(request.gone for request in tiny_llama.loop._rows)
    with pytest.raises(ValueError, match="max_seq_len is"):
        measure(tiny_llama, repeats=100)


def test_the_command_plans_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(rps=3.0, prompt=200, answer=40, ranks=(1, 2), rows=(8,), gpu="L4", quantize="int8", out=str(tmp_path))
    printed = capsys.readouterr().out
    assert "7B on L4 in int8" in printed
    assert "best" in printed
    facts = json.loads((tmp_path / "plan_serve.json").read_text())
    assert facts["choices"][0]["found" if "found" in facts["choices"][0] else "ttft_p95"] <= 2
    assert len(facts["latency_against_load"]) == 10
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "70B", "gpu": "4090", "ranks": (1,)}, "give more --ranks"),
        ({"prompt": 5000, "max_seq_len": 4096}, "don't fit into 4,096 slots"),
        ({"p95_ttft": 0.001}, "allow more time"),
        ({"points": "/nowhere/points.json"}, "give --here"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        command(**{"rps": 1.0, "prompt": 200, "answer": 20, "rows": (4,), **arguments})


def test_measured_points_are_kept_in_a_file(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"rps": 90.0, "prompt": 20, "answer": 5, "p95_ttft": 0.1, "spread": 0.2}
    asked["points"] = str(tmp_path / "points.json")
    command(**asked, here=True, check=True, ckpt_dir=str(tiny_checkpoint), max_seq_len=128)
    printed = capsys.readouterr().out
    assert "this machine" in printed
    assert "for real" in printed
    command(**asked)
    assert "points.json: 90 requests/s" in capsys.readouterr().out


@pytest.mark.slow
def test_ten_thousand_requests_a_second_take_less_than_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.perf_counter()
    command(rps=10_000.0, prompt=200, answer=50, gpu="H100", ranks=(1,), rows=(64,))
    seconds = time.perf_counter() - begin
    printed = capsys.readouterr().out
    print(printed, f"{seconds:.1f} s")
    assert "all of them" in printed
    assert seconds < 60


@pytest.mark.slow
def test_a_plan_is_what_this_machine_then_does() -> None:
    """Throughput and p95 within 15 %, with the embedded checkpoint, at a quarter and half of what all rows could do, in
    the thread's own time, so that others' work on this machine counts less. It is a measurement, for a quiet moment:
    steps are measured before and after the load, and all that up to five times, since a shared processor's speed
    changes from minute to minute."""
    import torch

    assert torch.get_num_threads() == 1
    llama = Llama.build(max_seq_len=512, max_batch_size=8, prefill_chunk=128)
    work, told = Work(1.0, 100, 40), []
    for attempt in range(5):
        before = measure(llama, clock=time.thread_time, repeats=7)
        each = 8 / longest_answer(work, Kind(1, 8, before.times(8, 128), 512, 128))
        loads = [replace(work, rps=share * each) for share in (0.25, 0.5)]
        real = [replay(llama, load, seconds=30.0, seed=attempt, clock=time.thread_time) for load in loads]
        kind = Kind(1, 8, between(before, measure(llama, clock=time.thread_time, repeats=7)).times(8, 128), 512, 128)
        errors = []
        for load, found in zip(loads, real, strict=True):
            simulated = observed(load, kind, load.rps, 1, 30.0, attempt)
            pairs = [(getattr(found, name), getattr(simulated, name)) for name in ("tokens", "ttft_p95", "gap_p95")]
            errors += [abs(b / a - 1) for a, b in pairs]
            print(f"{load.rps:.1f}/s, real and simulated:", *(f"{a:.4g} {b:.4g}" for a, b in pairs))
        told.append(max(errors))
        if told[-1] <= 0.15:
            return
    pytest.fail(f"off by {min(told):.0%} at best")


def between(one: Points, other: Points) -> Points:
    """The means of what was measured before and after."""
    decode, read = (
        [(n, at, (a + b) / 2) for (n, at, a), (_, _, b) in zip(*both, strict=True)]
        for both in ((one.decode, other.decode), (one.read, other.read))
    )
    return Points(decode, read, (one.factor + other.factor) / 2)
