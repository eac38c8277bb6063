"""Memory: what a prompt takes above weights and cache, by the kernel's own account."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from timekeeping import Clock, Paced
from torch import Tensor

from llama.bench.memory import CLEAR, Gauge, growth, in_fresh_process

MB = 1 << 20
linux = pytest.mark.skipif(not CLEAR.exists(), reason="resident memory is read from Linux's /proc")


class Hungry(Paced):
    """Weights of 80 MB, made with the help of 150 MB that are gone by then; and while it reads more than 64 tokens 60
    MB that are gone at the end: blocks so large that this process's allocator never keeps them."""

    def __init__(self) -> None:
        super().__init__(Clock(), 0.0)
        torch.ones(150 * MB // 4).sum()
        self.weights = torch.ones(80 * MB // 4)

    def read(self, prompts: Sequence[list[int]]) -> Tensor:
        if len(prompts[0]) > 64:
            torch.ones(60 * MB // 4).sum()
        return super().read(prompts)


@linux
def test_what_comes_and_goes_is_told_from_what_stays() -> None:
    found = growth(lambda: None, Hungry, 96, 128, torch.device("cpu"))
    assert found.above == pytest.approx(60 * MB, abs=4 * MB)
    assert found.total == pytest.approx(150 * MB, abs=8 * MB)


@linux
def test_a_cache_that_grows_is_no_activation() -> None:
    class Growing(Hungry):
        def cache_bytes(self, rows: int, tokens: int) -> int:
            return 10 * MB

    found = growth(lambda: None, Growing, 96, 128, torch.device("cpu"))
    assert found.above == pytest.approx(50 * MB, abs=4 * MB)


def test_elsewhere_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.bench.memory.CLEAR", Path("/nowhere/at/all"))
    with pytest.raises(ValueError, match="leave memory out of --measures"):
        Gauge(torch.device("cpu"))


@pytest.mark.slow
@linux
def test_a_fresh_process_measures_a_checkpoint(tiny_checkpoint: Path) -> None:
    found = in_fresh_process({"variant": "plain", "tokens": 128, "ckpt_dir": tiny_checkpoint, "dtype": "float32"})
    assert 0 <= found.above < found.total < 200 * MB


@pytest.mark.slow
@linux
def test_what_fails_there_is_told_here() -> None:
    with pytest.raises(ValueError, match="there is no preset 9B"):
        in_fresh_process({"variant": "plain", "tokens": 8, "preset": "9B"})
