"""The server of sandbox.py: a program of its own, which imports nothing of this package.

It reads programs from standard input, each a length, a newline and as many bytes of JSON, and writes a line of JSON
for each. It locks itself in before it reads the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import time
import types

_FORBIDDEN = {
    "x86_64": (41, 42, 43, 44, 45, 46, 47, 49, 50, 53, 56, 57, 58, 59, 62, 101, 155, 161, 165, 166, 200, 234, 272, 288,
               308, 310, 311, 321, 322, 323, 424, 425, 434, 435, 438),
    "aarch64": (39, 40, 41, 51, 97, 117, 129, 130, 131, 198, 199, 200, 201, 202, 203, 206, 207, 211, 212, 220, 221, 242,
                268, 270, 271, 280, 281, 282, 424, 425, 434, 435, 438),
}  # fmt: skip
"""By machine, the numbers of the system calls for sockets, new processes and programs, signals, tracing, mounts, other
namespaces, io_uring and BPF. The server keeps what it needs by locking each child, not itself."""
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def main() -> None:
    settings = json.loads(sys.argv[1])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: it ends with its parent
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    layers = ["rlimits"]
    if "bubblewrap" in settings["locks"] and os.getpid() == 1:
        layers.append("bubblewrap")
    if "landlock" in settings["locks"] and restrict_files(libc, settings["folder"]):
        layers.append("landlock")
    if "seccomp" in settings["locks"] and can_filter(libc):
        layers.append("seccomp")
    settings["layers"] = layers
    for module in ("collections", "datetime", "functools", "itertools", "math", "random", "re", "string", "typing",
                   "dataclasses", "heapq", "bisect", "operator", "statistics", "copy", "abc", "enum"):  # fmt: skip
        with contextlib.suppress(ImportError):
            __import__(module)  # so that no program has to read them again
    answers.write(json.dumps(layers).encode() + b"\n")
    answers.flush()
    while line := requests.readline():
        request = json.loads(requests.read(int(line)))
        answers.write(json.dumps(judge(libc, request, settings)).encode() + b"\n")
        answers.flush()


def judge(libc: ctypes.CDLL, request: dict[str, str], settings: dict[str, object]) -> dict[str, object]:
    """Runs one program in a child; says what it said, how it ended, and how long it took."""
    started = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run(libc, request, settings, writing)
    os.close(writing)
    deadline = started + float(str(settings["seconds"]))
    said, ended = b"", "exit"
    while True:
        left = deadline - time.monotonic()
        ready = select.select([reading], [], [], max(0.0, left))[0] if left > 0 else []
        if not ready:
            ended = "timeout"
            break
        part = os.read(reading, 4096)
        if not part:
            break
        said = (said + part)[:4096]
    if ended == "timeout":
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    os.close(reading)
    if "bubblewrap" in str(settings["layers"]) and os.getpid() == 1:
        end_others()
    if ended == "exit" and os.WIFSIGNALED(status):
        ended = "timeout" if os.WTERMSIG(status) == signal.SIGXCPU else "killed"
    empty(str(settings["folder"]))
    text = "" if ended == "timeout" else said.decode(errors="replace")
    processor = round(used.ru_utime + used.ru_stime, 4)
    return {"said": text, "ended": ended, "seconds": round(time.monotonic() - started, 4), "processor": processor}


def end_others() -> None:
    """Of process 1 of a namespace: ends whatever the program left running in it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def run(libc: ctypes.CDLL, request: dict[str, str], settings: dict[str, object], writing: int) -> None:
    """The child: never returns. The word is written by functions that the program can't have changed."""
    write, leave = os.write, os._exit
    try:
        os.setsid()
        nothing = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        limit(settings)
        if "seccomp" in str(settings["layers"]):
            filter_calls(libc)
        name = request.pop("module")
        module = types.ModuleType(name)
        sys.modules[name] = module
        code = compile(request.pop("program"), "<program>", "exec")
        said = request.pop("token")
        exec(code, module.__dict__)
        write(writing, said.encode())
    except MemoryError:
        write(writing, b"MemoryError\n")
    except BaseException as error:
        try:
            text = f"{type(error).__name__}\n{str(error)[:500]}"
        except BaseException:
            text = "Exception\n"
        write(writing, text.encode(errors="replace"))
    leave(0)


def limit(settings: dict[str, object]) -> None:
    seconds, memory, output = (int(float(str(settings[name]))) for name in ("seconds", "memory", "output"))
    for name, value in (
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 64),  # root is exempt: there, seccomp alone forbids new processes
    ):
        resource.setrlimit(name, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def empty(folder: str) -> None:
    """Removes what a program left in its folder."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


# Locks ------------------------------------------------------------------------------------------------------------

_READ = 1 << 2 | 1 << 3 | 1 << 0  # files to read, folders to list, programs to run (which seccomp then forbids)
_ALL = (1 << 13) - 1
_WRITE = _ALL & ~(1 << 0) & ~(1 << 6) & ~(1 << 9) & ~(1 << 10) & ~(1 << 11)  # no devices, sockets and pipes


def restrict_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Landlock: nothing may be opened but the interpreter's files, to read, and `folder`. False where there is none."""
    attributes = struct.pack("Q", _ALL)
    rules = libc.syscall(444, attributes, len(attributes), 0)
    if rules < 0:
        return False
    readable = {sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo"}
    places = [(path, _READ) for path in readable] + [(folder, _WRITE), ("/dev/null", 1 << 1 | 1 << 2)]
    for path, rights in places:
        if not os.path.exists(path):
            continue
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, at)
        libc.syscall(445, rules, 1, rule, 0)
        os.close(at)
    locked = libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return bool(locked)


def can_filter(libc: ctypes.CDLL) -> bool:
    return os.uname().machine in _FORBIDDEN and libc.prctl(21, 0, 0, 0, 0) == 0


def filter_calls(libc: ctypes.CDLL) -> None:
    """seccomp: the forbidden calls fail with EPERM, and calls of another machine's kind kill."""
    machine = os.uname().machine
    if machine not in _FORBIDDEN:
        return
    calls = _FORBIDDEN[machine]
    allow, deny, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, _AUDIT[machine]), (0x06, 0, 0, kill), (0x20, 0, 0, 0)]
    for n, call in enumerate(calls):
        program.append((0x15, len(calls) - n, 0, call))
    program += [(0x06, 0, 0, allow), (0x06, 0, 0, deny)]
    lines = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(lines)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    if libc.prctl(22, 2, header, 0, 0) != 0:
        raise OSError("seccomp refused its filter")


if __name__ == "__main__":
    main()
