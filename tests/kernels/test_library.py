"""Where compiled kernels are kept: who may write there, and what is loaded from there. A script stands in for the
compiler, since a real one takes half a minute."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama.kernels import library

MADE = b"\x7fELF, as a compiler makes it" * 40
SIGNED = MADE + hashlib.sha256(MADE).digest()


class Compiler:
    """What the script has compiled, and what was loaded of it."""

    def __init__(self, place: Path) -> None:
        self.made, self.log, self.loaded = place / "made", place / "log", list[bytes]()
        self.made.write_bytes(MADE)
        self.script = place / "compiler"
        self.script.write_text(
            f'#!/bin/sh\necho once >> {self.log}\nwhile [ "$1" != -o ]; do shift; done\ncp {self.made} "$2"\n'
        )
        self.script.chmod(0o700)

    @property
    def runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    made = Compiler(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(made.script))
    monkeypatch.setattr(library, "opened", lambda path: made.loaded.append(path.read_bytes()))
    monkeypatch.setattr(library, "_check", lambda loaded: None)
    library.load.cache_clear()
    yield made
    library.load.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The cache folder, as an earlier start has left it."""
    (tmp_path / "cache" / "codellama").mkdir(parents=True, mode=0o700)
    return tmp_path / "cache" / "codellama"


def load_again() -> None:
    library.load.cache_clear()
    library.load()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_and_the_library_are_the_users_alone_whatever_the_umask(compiler: Compiler, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        library.load()
    finally:
        os.umask(before)
    made = library._place()
    assert made.parent == tmp_path / "cache" / "codellama"
    assert mode(made.parent) == mode(made) == 0o700
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_a_whole_library_is_loaded_and_not_compiled_again(compiler: Compiler) -> None:
    library.load()
    assert library._place().read_bytes() == SIGNED
    load_again()
    assert compiler.runs == 1
    assert compiler.loaded == [SIGNED, SIGNED]


@pytest.mark.parametrize(
    "damaged",
    [b"", SIGNED[:-1], SIGNED[: len(MADE) // 2], MADE, SIGNED[:99] + b"!" + SIGNED[100:], SIGNED + b"\0", b"\0" * 5000],
    ids=["empty", "a byte short", "half", "without a digest", "altered", "too long", "zeros"],
)
def test_a_damaged_library_is_compiled_again_and_never_loaded(compiler: Compiler, damaged: bytes) -> None:
    """Loading half of a library ends the process with a bus error."""
    library.load()
    library._place().write_bytes(damaged)
    load_again()
    assert compiler.runs == 2
    assert compiler.loaded == [SIGNED, SIGNED]
    assert library._place().read_bytes() == SIGNED


def test_a_pipe_in_place_of_the_library_is_replaced_and_not_read(compiler: Compiler, folder: Path) -> None:
    os.mkfifo(library._place(), 0o600)
    library.load()
    assert compiler.loaded == [SIGNED]


def test_a_folder_of_another_user_is_not_used(
    compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = library._place()
    planted.write_bytes(b"planted" + hashlib.sha256(b"planted").digest())
    planted.chmod(0o700)
    monkeypatch.setattr(library.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(UserWarning, match=rf"{folder} belongs to another user.*chown"):
        library.load()
    assert compiler.loaded == [SIGNED]
    assert list(folder.iterdir()) == [planted]


@pytest.mark.parametrize("shared", [0o770, 0o702, 0o777, 0o1777])
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_can_write_to_is_not_used(compiler: Compiler, folder: Path, shared: int, what: str) -> None:
    planted = library._place()
    planted.write_bytes(b"planted" + hashlib.sha256(b"planted").digest())
    planted.chmod(0o700)
    written = folder if what == "folder" else planted
    written.chmod(shared)
    with pytest.warns(UserWarning, match=rf"{written} belongs to another user, or others can write.*chmod go-w"):
        library.load()
    assert compiler.loaded == [SIGNED]
    assert planted.read_bytes().startswith(b"planted")


@pytest.mark.parametrize("private", [0o700, 0o755, 0o711])
def test_what_others_can_only_read_is_used(compiler: Compiler, folder: Path, private: int) -> None:
    folder.chmod(private)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.load()
    assert library._place().parent == folder
    assert library._place().exists()


def test_a_file_in_place_of_the_folder_is_left_alone(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "codellama").write_text("notes")
    library.load()
    assert compiler.loaded == [SIGNED]
    assert (tmp_path / "cache" / "codellama").read_text() == "notes"


def test_the_scratch_folder_is_gone_when_the_process_ends(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    program = "from llama.kernels import library; place = library._place(); place.touch(); print(place)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "a file"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    scratch = Path(done.stdout.strip()).parent
    assert scratch.parent == tmp_path
    assert scratch.name.startswith("codellama-")
    assert not scratch.exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles ten characters")
def test_a_library_with_its_digest_at_the_end_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seven.cpp").write_text('extern "C" int seven() { return 7; }\n')
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library, "SOURCE", tmp_path / "seven.cpp")
    library.build(tmp_path / "seven.so")
    assert library._is_whole(tmp_path / "seven.so")
    assert ctypes.CDLL(str(tmp_path / "seven.so")).seven() == 7
