"""What is in the corpus, and that the held-out files are chosen alike everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama.train.corpus import TEST_SHARE, Source, read_corpus, stable_hash


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_only_programs_are_read_and_each_once(tmp_path: Path) -> None:
    table = "TABLE = [\n" + "    0,\n" * 50 + "]\nx = 1\n"
    root = write(
        tmp_path,
        {
            "good.py": "def f():\n    return 1\n",
            "copy_of_good.py": "def f():\n    return 1\n",
            "package/also.py": "class A:\n    pass\n",
            "package/data.txt": "x = 1\n",
            "empty.py": "",
            "comment.py": "# nothing\n",
            "broken.py": "print 'two'\n",
            "null.py": "x = 1\0\n",
            "latin.py": b"# -*- coding: latin-1 -*-\nx = '\xe9'\n",
            "table.py": table,
            "encodings/cp1252.py": "x = 1\n",
            "site-packages/other.py": "y = 1\n",
        },
    )
    assert read_corpus(root) == [
        Source("copy_of_good.py", "def f():\n    return 1\n"),
        Source("package/also.py", "class A:\n    pass\n"),
    ]


def test_test_suites_get_no_more_than_their_share(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"m{i}.py": f"x = {i}\n" + "y = 1\n" * 100 for i in range(20)}
    files |= {f"test/test_m{i}.py": f"x = -{i}\n" + "y = 1\n" * 20 for i in range(100)}
    corpus = read_corpus(write(tmp_path, files))
    tests = sum(len(source.text) for source in corpus if source.is_test)
    share = tests / sum(len(source.text) for source in corpus)
    assert TEST_SHARE - 0.01 < share <= TEST_SHARE


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("test/support/__init__.py", True),
        ("idlelib/idle_test/mock_tk.py", True),
        ("unittest/test/test_case.py", True),
        ("lib/test_alone.py", True),
        ("unittest/case.py", False),
        ("doctest.py", False),
        ("latest.py", False),
    ],
)
def test_what_counts_as_a_test_suite(path: str, expected: bool) -> None:
    assert Source(path, "").is_test is expected


def test_held_out_files_are_the_same_on_every_machine() -> None:
    """Pinned, since a file that changes sides would make held-out losses before and after incomparable."""
    assert stable_hash("heapq.py") == 0x935DEE365100866B
    assert Source("fractions.py", "").is_held_out
    assert not Source("heapq.py", "").is_held_out


def test_a_fortieth_of_many_files_is_held_out() -> None:
    held_out = sum(Source(f"folder/file{i}.py", "").is_held_out for i in range(40_000))
    assert 900 < held_out < 1100


@pytest.mark.slow
def test_the_running_interpreter_has_a_corpus() -> None:
    corpus = read_corpus()
    paths = [source.path for source in corpus]
    assert {"heapq.py", "json/decoder.py", "argparse.py"} <= set(paths)
    assert not any("site-packages" in path for path in paths)
    assert paths == sorted(set(paths))
    assert sum(len(source.text) for source in corpus) > 5_000_000
