"""The measurement of token healing: cursors are where they should be, and healing completes more words."""

from __future__ import annotations

import pytest

from llama.generation import Llama
from llama.serve.healing import cursors, measure

TEXT = (
    "def check(self, value):\n    if isinstance(value, str):\n        return value\n    raise ValueError(value)\n\n\n"
    * 20
)


def test_cursors_are_in_lines_and_their_parts_are_the_text() -> None:
    found = cursors([TEXT, "short"], 50)
    assert len(found) == 50
    for one in found:
        assert "\n" not in one.rest
        assert one.prefix + one.rest + one.suffix in TEXT
        assert one.suffix.startswith("\n")
    within = [one for one in found if one.is_within_a_word]
    assert 10 < len(within) < 50
    with pytest.raises(ValueError, match="longer"):
        cursors(["short"], 5)


@pytest.mark.slow
def test_healing_completes_more_words() -> None:
    llama = Llama.build(max_seq_len=512, max_batch_size=8)
    found = measure(llama, cursors([TEXT], 24))
    words = {(one.order, one.healing): one.words for one in found}
    assert words["psm", True] > words["psm", False]
    assert words["spm", True] > words["spm", False]
