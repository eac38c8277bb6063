"""Rounds: everything takes turns, and a ratio is taken between neighbours in time."""

from __future__ import annotations

import pytest
import torch
from timekeeping import Clock

from llama.bench.rounds import Spread, Timer, interleave, ratios, spread, timed


def test_tasks_take_turns_and_none_is_always_first() -> None:
    """Guards against one task after the other, and against a fixed order, which favours the same one each time."""
    order: list[str] = []
    names = ("a", "b", "c")
    tasks = {name: timed(lambda name=name: order.append(name)) for name in names}
    found = interleave(tasks, 3, Timer(), warm_up=1)
    turns = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert turns == ["cab", "abc", "bca", "cab"]
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(names, 3)


def test_a_slow_moment_does_not_change_the_ratio() -> None:
    """The machine gets five times slower in the second round: the figures do, the ratio doesn't."""
    clock = Clock()
    tasks = {"quick": timed(lambda: clock.spend(1.0)), "slow": timed(lambda: clock.spend(2.0))}
    seconds: dict[str, list[float]] = {"quick": [], "slow": []}
    for clock.pace in (1.0, 5.0, 2.0):
        found = interleave(tasks, 1, clock.timer)
        for name in seconds:
            seconds[name] += found[name]
    assert spread(seconds["slow"]) == Spread(4.0, 2.0, 10.0, 3)
    assert spread(ratios(seconds["slow"], seconds["quick"])) == Spread(2.0, 2.0, 2.0, 3)


def test_warm_up_rounds_do_not_count() -> None:
    clock = Clock()
    costs = iter([100.0, 50.0, 1.0, 2.0, 3.0])
    seconds = interleave({"x": timed(lambda: clock.spend(next(costs)))}, 3, clock.timer, warm_up=2)
    assert seconds == {"x": [1.0, 2.0, 3.0]}


def test_the_ratio_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    top, bottom = [1.0, 4.0, 10.0], [1.0, 2.0, 20.0]
    assert spread(ratios(top, bottom)) == Spread(1.0, 0.5, 2.0, 3)
    assert spread(top).median / spread(bottom).median == 2.0  # what it must not be


def test_ratios_need_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_the_clock_is_read_when_the_device_is_done() -> None:
    """Guards against timing the launch of a GPU's work instead of the work."""
    log: list[str] = []
    timer = Timer(lambda: log.append("clock") or 0.0, lambda: log.append("wait"))  # type: ignore[func-returns-value]
    timed(lambda: log.append("work"))(timer)
    assert log == ["wait", "clock", "work", "wait", "clock"]


def test_a_timer_of_the_cpu_waits_for_nothing() -> None:
    timer = Timer.of(torch.device("cpu"))
    assert timer.now() <= timer.now()


@pytest.mark.parametrize(("tasks", "rounds"), [({}, 3), ({"a": timed(lambda: None)}, 0)])
def test_nothing_to_measure_is_an_error(tasks: dict, rounds: int) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match="at least one task and one round"):
        interleave(tasks, rounds, Timer())
