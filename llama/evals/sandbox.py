"""Where generated programs run: a process of its own, with no network, no other processes, and hardly any files.

One server process is started for many programs. It locks itself in, and forks a child for each program, which takes a
millisecond; the child gets limits of its own and is killed when its time is over. The locks, where Linux has them, are
bubblewrap (namespaces of its own: no host files, network or processes; where it is installed), Landlock (files: the
interpreter's to read, an empty folder to write) and a seccomp filter (no sockets, no new processes or threads, no
signals to others, no tracing); the limits are those of `setrlimit`. A program has passed when
its last statement was reached: the child then says a word that the program was never told, so an exit code of 0 alone
proves nothing.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LOCKS = ("bubblewrap", "landlock", "seccomp")
"""What may lock programs in besides `rlimits`, the strongest first."""


@dataclass(frozen=True)
class Limits:
    seconds: float = 3.0
    """Of wall time for a program; its processor time is limited to a second more."""
    memory: int = 512 << 20
    """Bytes of address space."""
    output: int = 1 << 20
    """Bytes that a file may have. What is printed goes nowhere."""


@dataclass(frozen=True)
class Verdict:
    passed: bool
    error: str = ""
    """The class of what went wrong: an exception's name, `timeout`, `exit` (it left before its end), `killed`."""
    message: str = ""
    seconds: float = 0.0
    processor: float = 0.0
    """Seconds of processor time; much less than `seconds` where it slept, or others took the processor."""


@dataclass(frozen=True)
class Sandbox:
    """A server at work. `layers` says what locks it in."""

    process: subprocess.Popen[bytes]
    layers: tuple[str, ...]
    limits: Limits

    @property
    def is_safe(self) -> bool:
        """Whether the host is out of reach: where it isn't, a caller should refuse to run what a model wrote."""
        return "bubblewrap" in self.layers or {"landlock", "seccomp"} <= set(self.layers)

    def run(self, programs: Iterable[str], module: str = "__main__") -> Iterator[Verdict]:
        """The verdict of each program, in order; `module` is its `__name__`. Raises RuntimeError where the server
        died."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        for program in programs:
            token = secrets.token_hex(16)
            message = json.dumps({"program": program, "token": token, "module": module}).encode()
            try:
                requests.write(b"%d\n" % len(message) + message)
                requests.flush()
                line = answers.readline()
            except BrokenPipeError:
                line = b""
            if not line:
                raise RuntimeError("the sandbox's server died; no verdict was given for this program")
            yield _verdict(json.loads(line), token)


@contextmanager
def sandbox(limits: Limits | None = None, locks: Sequence[str] | None = None) -> Iterator[Sandbox]:
    """A sandbox to run programs in; it ends with the block. Its folder is new, and is removed. `locks` are those of
    LOCKS to use (default: all that this system has); ValueError for one that it lacks."""
    limits, wanted = limits or Limits(), LOCKS if locks is None else tuple(locks)
    source = Path(__file__).with_name("sandbox_server.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        settings = json.dumps({**vars(limits), "folder": folder, "parent": os.getpid(), "locks": wanted})
        command = [sys.executable, "-I", "-S", "-c", source, settings]
        process = subprocess.Popen(
            [*bubblewrap(folder), *command] if "bubblewrap" in wanted and has_bubblewrap() else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            layers = tuple(json.loads(_line(process.stdout)))
            missing = [lock for lock in locks or () if lock not in layers]
            if missing:
                raise ValueError(f"this system has no {missing[0]}; there are {', '.join(layers)}")
            yield Sandbox(process, layers, limits)
        finally:
            with_group_killed(process)


def bubblewrap(folder: str) -> list[str]:
    """The words that start a command in namespaces of its own, with the interpreter's files to read and `folder`, in
    memory, to write. There is no /proc, so that no process is seen."""
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    words += ["--tmpfs", "/tmp"]
    interpreter = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    for path in ["/usr", "/lib", "/lib64", *sorted(interpreter)]:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            words += ["--ro-bind", path, path]
    words += ["--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]
    return [*words, "--size", str(64 << 20), "--tmpfs", folder, "--chdir", folder, "--"]


@functools.cache
def has_bubblewrap() -> bool:
    """Whether bubblewrap is installed and may make namespaces here."""
    if shutil.which("bwrap") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        words = [*bubblewrap(folder), sys.executable, "-I", "-S", "-c", ""]
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def run_programs(programs: Sequence[str], limits: Limits | None = None) -> list[Verdict]:
    """The verdicts of some programs, in a sandbox of their own."""
    with sandbox(limits) as place:
        return list(place.run(programs))


def with_group_killed(process: subprocess.Popen[bytes]) -> None:
    """Ends a server and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()


def _line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise RuntimeError("the sandbox's server did not start")
    return line


def _verdict(answer: dict[str, str | float], token: str) -> Verdict:
    said, seconds, processor = str(answer["said"]), float(answer["seconds"]), float(answer["processor"])
    if said == token:
        return Verdict(True, seconds=seconds, processor=processor)
    error, _, message = said.partition("\n")
    return Verdict(False, error or str(answer["ended"]), message, seconds, processor)
