"""Folders of files, and samples that are the same everywhere."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llama.evals.sources import File, choose, choose_files, read_folder, with_text


def test_folder_is_read_by_path_without_what_is_empty_or_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.py").write_text("z = 'ä'\n", encoding="utf-8")
    (tmp_path / "a.py").write_text("a = 1\n", encoding="utf-8")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"s = '\xe4'\n")
    (tmp_path / "readme.txt").write_text("no code")
    assert read_folder(tmp_path) == [File("a.py", "a = 1\n"), File("b/z.py", "z = 'ä'\n")]


def test_folder_without_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.py file"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        read_folder(tmp_path / "nowhere")


def test_sample_does_not_depend_on_the_order_and_grows_by_adding() -> None:
    names = [f"name {i}" for i in range(100)]
    shuffled = random.Random(0).sample(names, 100)
    assert choose(names, 10, str) == choose(shuffled, 10, str) == choose(names, 30, str)[:10]
    assert set(choose(names, 10, str, seed=1)) != set(choose(names, 10, str)) != set(names[:10])
    assert set(choose(names, None, str)) == set(names)


def test_sample_is_the_same_on_every_machine() -> None:
    assert choose(["a", "b", "c", "d", "e"], 3, str) == ["d", "e", "b"]


def test_chosen_files_stand_in_the_order_of_their_paths() -> None:
    files = [File(str(i), "x") for i in range(9, 0, -1)]
    found = choose_files(files, 4)
    assert len(found) == 4
    assert found == sorted(found, key=lambda file: file.path)


def test_nothing_to_measure_on_is_refused() -> None:
    for nothing in ([], [File("a.py", "")]):
        with pytest.raises(ValueError, match="nothing to measure on"):
            with_text(nothing)
    with pytest.raises(ValueError, match="n is 0"):
        choose(["a"], 0, str)
