"""Measures, with time that the test makes: what is counted, in which rounds, and beside which limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timekeeping import WORK, Clock, Paced

from fixtures_text import Spy
from llama.bench.figures import Figure, figures, rows_of, table, title
from llama.bench.measures import Machine, Measured, decode, first_token, loading, prefill, roofline
from llama.bench.roofline import Probe, matmul
from llama.bench.rounds import Spread, timed
from llama.bench.subject import Ours, work_of
from llama.config import ModelArgs
from llama.generation import Llama

ARGS = ModelArgs(dim=64, n_layers=3, n_heads=4, vocab_size=96, hidden_dim=96)
CPU = torch.device("cpu")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def machine(clock: Clock) -> Machine:
    """It reads 4,000 bytes a second, copies 1,000, and does 8,000 operations in float32."""
    made = Machine(ARGS, CPU, chunk=32, rounds=3, size=1e-4)
    made.timer = clock.timer
    made.bandwidth = {
        "read": Probe(timed(lambda: clock.spend(1.0)), 4000.0),
        "copy": Probe(timed(lambda: clock.spend(2.0)), 2000.0),
    }
    made._products = {"float32": {"float32 square": Probe(timed(lambda: clock.spend(1.0)), 8000.0)}}
    return made


def test_decode_beside_the_bandwidth_of_the_same_rounds(machine: Machine, clock: Clock) -> None:
    """8 rows in 2 seconds a step; a step must read the weights once and the cache of 8 rows."""
    subjects = {"one": Paced(clock, 2.0, overhead=0.5), "other": Paced(clock, 4.0)}
    step, loop = decode(machine, subjects, rows=8, prompt=100, n=4, layers=None)
    assert step.rates == {"one": pytest.approx([4.0] * 3), "other": pytest.approx([2.0] * 3)}
    assert loop.rates["one"] == pytest.approx([8 / 2.5] * 3)
    necessary = 1100 * 2 + 8 * 102.5 * 10 * 2
    assert step.limits["one"] == pytest.approx([8 * 4000 / necessary] * 3)
    one, other = figures(step, ["other"])
    assert one.of_limit is not None
    assert one.of_limit.median == pytest.approx(4.0 / (8 * 4000 / necessary))
    assert one.over["other"] == Spread(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0), 3)
    assert other.over == {}
    assert (step.measure, loop.measure, step.unit, step.layers) == ("decode", "decode, loop", "tokens/s", None)


def test_steps_and_loop_can_be_measured_apart(machine: Machine, clock: Clock) -> None:
    """Behind a long prompt the loop, which reads it in every round, would take hours."""
    one = Paced(clock, 2.0)
    (step,) = decode(machine, {"one": one}, 1, 10, 4, loop=False)
    assert (step.measure, one.calls.count("read")) == ("decode", 1)
    (loop,) = decode(machine, {"one": one}, 1, 10, 4, alone=False)
    assert (loop.measure, one.calls.count("read")) == ("decode, loop", 5)


def test_decode_goes_back_to_the_same_place_each_round(machine: Machine, clock: Clock) -> None:
    one = Paced(clock, 2.0)
    decode(machine, {"one": one}, rows=1, prompt=100, n=4, layers=None)
    steps = [call for call in one.calls if call.startswith("step")]
    assert steps == [f"step {100 + i}" for i in range(4)] * 4  # with the round that doesn't count
    assert one.calls[0] == "room 1 128"


def test_the_first_token_is_no_part_of_the_loop(machine: Machine, clock: Clock) -> None:
    one = Paced(clock, 2.0, read=5.0)
    _, loop = decode(machine, {"one": one}, rows=1, prompt=10, n=5, layers=None)
    assert loop.rates["one"] == pytest.approx([0.5] * 3)
    found = first_token(machine, {"one": one}, 10)
    assert found.rates["one"] == pytest.approx([1 / 50.0] * 3)
    assert figures(found, [])[0].value.median == pytest.approx(50.0)


def test_our_loop_is_measured_while_every_row_writes(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read one after the other, and the first would write long before the last is read. And its text is the
    one that a single stream writes."""
    monkeypatch.setattr(tiny_llama.loop, "chunk", 32)
    prompts = [[1, *range(first, first + 40)] for first in (100, 200, 300)]
    expected = tiny_llama.generate(prompts, 12, temperature=0.0, stop_token=1)[0]
    assert all(len(answer) == 12 for answer in expected)
    tiny_llama.model.own_cache().forget()
    spy = Spy(tiny_llama, monkeypatch)
    stream = Ours(tiny_llama, work_of(tiny_llama.model)).stream(prompts, 12)
    known = next(stream)
    begun = len(spy.read)
    assert sum(rows * tokens for rows, tokens in spy.read) >= 3 * 41
    assert known + sum(stream) == 12
    assert spy.read[begun:] == [(3, 1)] * (12 - known)
    held = [tokens[41:] for tokens in tiny_llama.model.own_cache().tokens if tokens]
    assert sorted(held) == sorted(answer[:-1] for answer in expected)
    assert list(Ours(tiny_llama, work_of(tiny_llama.model)).stream(prompts, 1)) == [1]


def test_variants_alternate_within_a_round(machine: Machine, clock: Clock) -> None:
    """Guards against measuring one variant whole, then the next."""
    log: list[str] = []

    class Logged(Paced):
        name = ""

        def read(self, prompts: list[list[int]]) -> torch.Tensor:  # type: ignore[override]
            log.append(self.name)
            return super().read(prompts)

    subjects = {name: Logged(clock, 1.0, read=1.0) for name in ("one", "other")}
    for name, subject in subjects.items():
        subject.name = name
    prefill(machine, subjects, 10, None)
    turns = [tuple(log[i : i + 2]) for i in range(0, len(log), 2)]
    assert len(turns) == 4
    assert set(turns) == {("one", "other"), ("other", "one")}  # both in each round, and not always in one order


def test_a_slow_phase_leaves_ratios_and_shares_alone(machine: Machine, clock: Clock) -> None:
    """Each round is slower than the one before: figures spread, ratios and shares of the limit don't."""
    one, other = Paced(clock, 1.0, read=0.5), Paced(clock, 1.0, read=1.0)
    machine.rounds = 1
    rates: dict[str, list[float]] = {"one": [], "other": []}
    limits: dict[str, list[float]] = {"one": [], "other": []}
    for clock.pace in (1.0, 3.0, 7.0):
        (found,) = prefill(machine, {"one": one, "other": other}, 10, None)
        for name in rates:
            rates[name] += found.rates[name]
            limits[name] += found.limits[name]
    joined = Measured("prefill", rates, "tokens/s", 1, 10, limits, "arithmetic")
    figure = figures(joined, ["other"])[0]
    assert figure.value.high / figure.value.low == pytest.approx(7.0)
    assert figure.over["other"] == Spread(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0), 3)
    assert figure.of_limit is not None
    assert figure.of_limit.low == pytest.approx(figure.of_limit.high)


def test_prefill_beside_the_arithmetic_of_its_own_dtype(machine: Machine, clock: Clock) -> None:
    (found,) = prefill(machine, {"one": Paced(clock, 1.0, read=0.5)}, 10, None)
    operations = 2 * 1000 * 10 + 2 * 100 + 8 * 55
    assert found.rates["one"] == pytest.approx([2.0] * 3)
    assert found.limits["one"] == pytest.approx([10 * 8000 / operations] * 3)
    machine._products["float32"] = {}  # a machine that has no such product
    (found,) = prefill(machine, {"one": Paced(clock, 1.0, read=0.5)}, 10, None)
    assert figures(found, [])[0].of_limit is None


def test_layers_that_were_not_measured_are_extrapolated_and_labelled(machine: Machine, clock: Clock) -> None:
    """A head of 1 s and 3 blocks of 2 s: 10 blocks would take 21 s."""
    subject = Paced(clock, 7.0, head=1.0, read=0.7)
    measured = decode(machine, {"one": subject}, rows=2, prompt=10, n=4, layers=10)
    assert [m.layers for m in measured] == [None, None, 10]
    assert measured[0].rates["one"] == pytest.approx([2 / 7.0] * 3)
    assert measured[2].rates["one"] == pytest.approx([2 / 21.0] * 3)
    whole = figures(measured[2], [])[0]
    assert title(whole) == "decode, batch 2, extrapolated to 10 layers"
    assert whole.row()["extrapolated_to"] == 10
    read = prefill(machine, {"one": subject}, 10, 10)
    assert read[1].rates["one"] == pytest.approx([10 / 21.0] * 3)  # 7 s with 3 blocks


def test_loading_beside_reading_the_files(machine: Machine, tmp_path: Path) -> None:
    machine.timer = Machine(ARGS, CPU, 32, 1, size=1e-4).timer
    (tmp_path / "file").write_bytes(bytes(5_000_000))
    built: list[int] = []

    def build() -> torch.nn.Module:
        built.append(1)
        return torch.nn.Linear(4, 4)

    found = loading(machine, {"one": build}, [tmp_path / "file"])
    assert len(built) == 4
    assert len(found.limits["one"]) == len(found.rates["one"]) == 3
    assert found.limit == "reading the file"


def test_the_machine_is_measured_by_products_that_are_right() -> None:
    """Every way that counts for the limit runs here, and there is one for every dtype that a model may have."""
    for dtype in ("float32", "bfloat16"):
        assert set(matmul(CPU, dtype, ARGS, 32, 64)) == {f"{dtype} square", f"{dtype} layer"}
    probes = matmul(CPU, "float32", ARGS, 32, 64)
    assert probes["float32 square"].amount == 2 * 64**3
    assert probes["float32 layer"].amount == 2 * 32 * 64 * 96


def test_a_product_that_is_not_there_is_left_out() -> None:
    def missing(weight: torch.Tensor) -> object:
        def product(x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no such kernel")

        return product

    assert matmul(CPU, "float32", ARGS, 32, 64, {", new": missing}) == {}  # type: ignore[dict-item]


def test_roofline_is_bytes_and_operations_a_second(machine: Machine) -> None:
    rates = {m.measure: (m.rates["machine"], m.unit) for m in roofline(machine, ["float32"])}
    assert rates["read"] == (pytest.approx([4e-6] * 3), "GB/s")
    assert rates["copy"] == (pytest.approx([1e-6] * 3), "GB/s")
    assert rates["float32 square"] == (pytest.approx([8e-6] * 3), "GFLOP/s")


def test_copying_counts_what_is_read_and_what_is_written() -> None:
    probes = Machine(ARGS, CPU, 32, 1, size=1.05e-3).bandwidth  # 64 rows of 4096 float32
    assert {name: probe.amount for name, probe in probes.items()} == {
        "read": 2**20,
        "copy": 2**20,
        "read, product": 2**20,
    }


# --- the table ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shown() -> list[Figure]:
    rates = {"transformers": [10.0, 20.0, 5.0], "fast": [40.0, 50.0, 25.0]}
    limits = {"fast": [50.0, 100.0, 50.0]}
    seconds = Measured("first token", {"fast": [4.0, 2.0, 8.0]}, "s", 1, 512)
    measured = [Measured("decode", rates, "tokens/s", 8, 128, limits, "bandwidth"), seconds]
    return [figure for one in measured for figure in figures(one, ["transformers"])]


def test_table_has_medians_spreads_shares_and_ratios(shown: list[Figure]) -> None:
    header, *lines = table(shown, ["transformers"]).splitlines()
    assert header.split("  ")[-1].strip() == "× transformers"
    assert [" ".join(line.split()) for line in lines] == [
        "decode, batch 8 transformers 10.0 (5–20.0) tokens/s",
        "fast 40.0 (25.0–50.0) tokens/s 50% of bandwidth 4.00 (2.50–5.00)",
        "first token 512 fast 0.25 (0.125–0.5) s",
    ]


def test_rows_have_the_same_columns(shown: list[Figure]) -> None:
    rows = rows_of(shown)
    assert len({tuple(row) for row in rows}) == 1
    assert rows[1]["x_transformers"] == 4.0
    assert rows[1]["of_limit"] == 0.5
    assert rows[0]["x_transformers"] is None


def test_work_counts_what_is_necessary() -> None:
    assert WORK.step_bytes(1, 0) == 2200
    assert WORK.prompt_operations(1) == 2000 + 200 + 8
