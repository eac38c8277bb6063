"""Command lines run in this process, and what they print."""

from __future__ import annotations

from collections.abc import Callable

Outcome = tuple[int, str, str]  # exit code, stdout, stderr
Run = Callable[..., Outcome]


def assert_one_paragraph(err: str, message: str) -> None:
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert err.endswith("\n")
