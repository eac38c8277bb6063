"""A scripted server for all tests of a file, and one with the embedded checkpoint for all files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server's tests need pip install -e '.[serve,test]'")
sys.path.insert(0, str(Path(__file__).parent))

from servers import Served, serving

from llama.generation import Llama


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """It says "one two three four five six", or "la la la …" where the prompt has "forever" in it."""
    with serving() as found:
        yield found


@pytest.fixture(scope="session")
def embedded() -> Iterator[Served]:
    """The embedded checkpoint."""
    with serving(Llama.build(max_seq_len=512, max_batch_size=4)) as found:
        yield found
