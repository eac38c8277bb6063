"""The index of what the published code got wrong: each row is guarded by tests that bear its name.

D1 to D14 gave wrong results, P1 to P9 cost time or memory, and "process" is what it did to the process around it. To
see the tests of a row, run `pytest -k d5`; to change what a row says, change the test that is named after it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

KNOWN = {
    "d1": "log-probabilities of generated tokens are all -0.0",
    "d2": "with nothing to write, nothing is scored",
    "d3": "an eos inside the prompt cuts the echo",
    "d4": "infilling and turns don't end at eos",
    "d5": "a completion loses a leading space",
    "d6": "several tokens at a position above 0 fail",
    "d7": "a wrong state dict loads silently",
    "d8": "the tokenizer's vocabulary replaces the checkpoint's",
    "d9": "a mark in user text becomes the special id",
    "d10": "a dialog with special tags still runs the model",
    "d11": "a dialog that can't be one raises IndexError",
    "d12": "the turn format depends on the history's destinations",
    "d13": "arguments that can't be are accepted, or fail obscurely",
    "d14": "a row's draws depend on its batch mates",
    "p1": "prefill goes token by token beyond the shortest prompt",
    "p2": "an n x n mask on the host",
    "p3": "scores of all positions at once, in two precisions",
    "p4": "the cache is copied for grouped heads",
    "p5": "logits of every position of the prompt",
    "p6": "the cache is moved and cast at every step",
    "p7": "weights are read whole beside a second model",
    "p8": "a wait for the device for each row and token; finished rows go on",
    "p9": "the vocabulary is sorted at every step",
    "process": "defaults, stdout and the like are changed",
}


@pytest.fixture(scope="module")
def names() -> list[str]:
    """Of all tests in the source of all test files."""
    files = Path(__file__).parents[1].rglob("test_*.py")
    return [name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)]


@pytest.mark.parametrize("row", KNOWN)
def test_each_known_defect_has_a_test_of_its_name(row: str, names: list[str]) -> None:
    assert any(f"_{row}_" in name for name in names), f"no test guards {row.upper()}: {KNOWN[row]}"
