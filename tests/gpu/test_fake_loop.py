"""The loop on a device that isn't there: nothing mixes devices, and a step crosses the border once in each direction.

Numbers there are none: whatever the host reads is made up, and counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from gpu.fakes import Crossings
from gpu.test_fake_devices import ARGS, on
from llama import Loop, Prompt, Request, Sampling, Tokenizer, Transformer
from llama.fast import speed_up_
from llama.longcontext.int8_cache import int8_cache
from llama.parallel import Ranks

TOKEN = 40
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "top_p": 1.0},
    "everything": {
        "temperature": 0.8, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.2,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "logit_bias": {3: 1.0},
    },
}  # fmt: skip


class Reads:
    """What `tolist` gives for a tensor without numbers; counts those on the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits = 0

        def without_numbers(tensor: FakeTensor) -> Any:
            self.waits += tensor.device.type != "cpu"

            def nested(shape: tuple[int, ...]) -> Any:
                return [nested(shape[1:]) for _ in range(shape[0])] if shape else TOKEN

            return nested(tuple(tensor.shape))

        monkeypatch.setattr(FakeTensor, "tolist", without_numbers, raising=False)


@pytest.mark.parametrize(
    ("device", "change", "lookup", "settings"),
    [
        ("cuda", "plain", 0, "greedy"),
        ("cuda", "plain", 3, "everything"),
        ("cuda", "fast", 0, "everything"),
        ("cuda", "int8 cache", 3, "drawn"),
        ("mps", "plain", 3, "drawn"),
        ("mps", "fast", 0, "everything"),
    ],
)
def test_a_step_waits_once_and_copies_once(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, device: str, change: str, lookup: int, settings: str
) -> None:
    """Prompts side by side and in pieces, one with log-probabilities of its own, a prefix that is taken over, and then
    steps of rows that stay the same: these are counted."""
    reads = Reads(monkeypatch)
    with on(device, torch.float16) as there:
        model = Transformer(ARGS).requires_grad_(False)
        if change == "fast":
            speed_up_(model)
        model.cache = int8_cache(model) if change == "int8 cache" else model.new_cache(4, 160)
        loop = Loop(model, Ranks(0, 1, there, None), chunk=24)
        prompts = [[1, *range(20, 20 + n)] for n in (5, 40, 18)]
        told = {"sampling": Sampling(**SETTINGS[settings]), "lookup": lookup}
        requests = [
            Request(tokenizer, Prompt(prompt, frozenset()), 60, **told, row=i) for i, prompt in enumerate(prompts)
        ]
        for one in requests:
            loop.join(one)
        for _ in range(5):
            loop.step()
        assert all(one.written > 0 for one in requests)
        reads.waits = 0
        for _ in range(4):
            before = [one.written for one in requests]
            with Crossings() as crossings:
                loop.step()
            assert all(one.written > n for one, n in zip(requests, before, strict=True))
            assert (crossings.read, crossings.copied) == (0, 1)
        assert reads.waits == 4
        more = [
            Request(tokenizer, Prompt([*prompts[1], 7], frozenset()), 3, **told, logprobs=2),
            Request(tokenizer, Prompt(prompts[2], frozenset()), 0, score=True),
        ]
        for one in more:
            loop.join(one)
        loop.leave(*requests[:2])
        monkeypatch.setattr("llama.decoding.math.isfinite", lambda number: True)
        for _ in range(9):
            loop.step()
        assert all(one.gone for one in more)
        assert len(more[1].prompt_logprobs) == len(prompts[2])
