"""The scripts print with the embedded checkpoint what they printed when it was made, and the README quotes it."""

from __future__ import annotations

import re

import pytest

from examples.golden import NAMES, ROOT, golden, printed


@pytest.mark.parametrize("name", NAMES)
def test_script_prints_the_golden_text(name: str) -> None:
    """If this fails after a change that was not to change any text, the change did more than that. A new checkpoint
    has new texts: `make golden`."""
    assert printed(name) == golden(name).read_text(encoding="utf-8")


def test_readme_quotes_the_golden_texts() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## What the three scripts print")[1].split("\n## ")[0]
    quotes = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(quotes) == len(NAMES)
    for quote, name in zip(quotes, NAMES, strict=True):
        parts = quote.split("...\n")  # where it is cut short
        assert all(part.rstrip() in golden(name).read_text(encoding="utf-8") for part in parts), name
