"""Rows come back from disk as they were written, and nothing else is taken for them."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llama.train.sequences import Rows
from llama.train.tokenfile import has_tokens, read_tokens, write_tokens

FACTS = {"corpus": "a", "tokenizer": "0123", "length": 3, "mixture": {"keys": 0.5}}
PARTS = [(np.array([[1, -2, 3], [32767, -32768, 0]], dtype=np.int16), 5), (np.array([[7, 8, 9]], dtype=np.int16), 6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "train", FACTS, PARTS)
    return tmp_path / "train"


def test_parts_come_back_as_one_map(path: Path) -> None:
    rows, text_bytes = read_tokens(path, FACTS)
    assert isinstance(rows, np.memmap)
    assert rows.tolist() == [[1, -2, 3], [32767, -32768, 0], [7, 8, 9]]
    assert text_bytes == 11
    assert path.with_suffix(".bin").stat().st_size == 18
    assert {found.name for found in path.parent.iterdir()} == {"train.bin", "train.json"}


def test_rows_of_another_tokenizer_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"made from tokenizer '0123', and now it is '4567': remove .*train.json"):
        read_tokens(path, {**FACTS, "tokenizer": "4567"})


def test_everything_that_differs_is_named(path: Path) -> None:
    with pytest.raises(ValueError, match=r"length 3, and now it is 4; mixture .*0\.5.* now it is .*0\.25"):
        read_tokens(path, {**FACTS, "length": 4, "mixture": {"keys": 0.25}})


@pytest.mark.parametrize("fault", ["flipped", "cut", "empty", "gone", "no header", "half a header", "a list"])
def test_a_broken_file_is_named_with_the_remedy(path: Path, fault: str) -> None:
    binary, header = path.with_suffix(".bin"), path.with_suffix(".json")
    content = binary.read_bytes()
    if fault == "gone":
        binary.unlink()
    elif fault == "no header":
        header.unlink()
    elif fault == "half a header":
        header.write_text(header.read_text()[:40])
    elif fault == "a list":
        header.write_text("[]")
    else:
        binary.write_bytes({"flipped": b"\x07" + content[1:], "cut": content[:-2], "empty": b""}[fault])
    with pytest.raises(ValueError, match=r"train\.(bin|json).*remove .*train\.json, and the next start writes it anew"):
        read_tokens(path, FACTS)


def test_what_was_begun_and_not_finished_is_not_there(tmp_path: Path) -> None:
    def stopped() -> Iterator[tuple[Rows, int]]:
        yield PARTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "train", FACTS, stopped())
    assert not has_tokens(tmp_path / "train")
    assert list(tmp_path.iterdir()) == []


def test_a_header_outlives_no_rewriting(path: Path) -> None:
    """Else the old header would stand beside new rows if the machine stopped between the two."""

    def look() -> Iterator[tuple[Rows, int]]:
        assert not has_tokens(path)
        yield PARTS[1]

    write_tokens(path, FACTS, look())
    assert json.loads(path.with_suffix(".json").read_text())["shape"] == [1, 3]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def full() -> Iterator[tuple[Rows, int]]:
        yield PARTS[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"train\.bin can't be written .*No space left.*make room"):
        write_tokens(tmp_path / "train", FACTS, full())


def test_no_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a single row"):
        write_tokens(tmp_path / "train", FACTS, [])
