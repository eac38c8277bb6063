"""The sandbox: right programs pass, wrong ones fail with their class, and bad ones get nowhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama.evals.sandbox import Limits, Sandbox, run_programs, sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox's processes need a POSIX system")


@pytest.fixture(scope="module")
def place() -> Iterator[Sandbox]:
    with sandbox(Limits(seconds=1, memory=1 << 28)) as running:
        yield running


def verdict(place: Sandbox, program: str) -> tuple[bool, str]:
    found = next(place.run([program]))
    return found.passed, found.error


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert sum([1, 2]) == 3", ""),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)", ""),
        ("if __name__ == '__main__':\n    x = 1\nassert x", ""),
        ("with open('a.txt', 'w') as file:\n    file.write('1')\nassert open('a.txt').read() == '1'", ""),
        ("", ""),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("undefined", "NameError"),
        ("raise ValueError('x')", "ValueError"),
        ("while True:\n    pass", "timeout"),
        ("import time\ntime.sleep(60)", "timeout"),
        ("def f():\n    f()\nf()", "RecursionError"),
        ("x = bytearray(10 ** 10)", "MemoryError"),
        ("input()", "EOFError"),
    ],
)
def test_each_program_gets_its_class(place: Sandbox, program: str, error: str) -> None:
    assert verdict(place, program) == (error == "", error)


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import sys\nsys.exit()",
        "import os\nos.abort()",
        "import builtins, os\nbuiltins.AssertionError = BaseException\nos._exit(0)\nassert 0",
        "import os\nos.write(1, b'passed')\nassert 0",
    ],
)
def test_an_exit_code_of_zero_is_no_proof(place: Sandbox, program: str) -> None:
    assert not verdict(place, program)[0]


def locked(place: Sandbox, layer: str) -> None:
    if layer not in place.layers:
        pytest.skip(f"this system has no {layer}")


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.fork()",
        "import threading\nthreading.Thread(target=print).start()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true') == 0 or 1 / 0",
        "import socket\nsocket.socket()",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
    ],
)
def test_no_processes_no_network_no_signals(place: Sandbox, program: str) -> None:
    locked(place, "seccomp")
    assert not verdict(place, program)[0]
    assert verdict(place, "assert True") == (True, "")


def test_files_are_out_of_reach(place: Sandbox, tmp_path: Path) -> None:
    locked(place, "landlock")
    secret = tmp_path / "secret"
    secret.write_text("x")
    for program in (
        f"open({str(secret)!r}).read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open('/etc/passwd').read()",
        "import os\nos.listdir('/root')",
        "import os\nos.symlink('/etc/passwd', 'link')\nopen('link').read()",
        "import os\nos.unlink('../x')",
        f"import os\nos.rename({str(secret)!r}, 'mine')",
    ):
        assert not verdict(place, program)[0], program
    assert secret.read_text() == "x"
    assert not (tmp_path / "new").exists()


def test_what_a_program_leaves_the_next_does_not_find(place: Sandbox) -> None:
    assert verdict(place, "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nopen('d', 'w').close()")[0]
    assert verdict(place, "import os\nassert os.listdir('.') == []")[0]
    assert verdict(place, "import math\nmath.pi = 3\nlen = None")[0]
    assert verdict(place, "import math\nassert math.pi > 3 and len([1]) == 1")[0]


def test_output_is_swallowed_and_files_are_limited(place: Sandbox) -> None:
    assert verdict(place, "print('x' * 10 ** 7)") == (True, "")
    assert verdict(place, "import sys\nsys.stdout.close()\nsys.stderr.close()")[0]
    assert not verdict(place, "open('big', 'w').write('x' * 10 ** 8)")[0]


def test_its_time_is_over_even_where_it_ignores_signals(place: Sandbox) -> None:
    started = time.monotonic()
    program = "import signal\nfor n in (1, 2, 15, 24):\n    signal.signal(n, signal.SIG_IGN)\nwhile True:\n    pass"
    assert verdict(place, program) == (False, "timeout")
    assert time.monotonic() - started < 20


def test_the_folder_and_the_server_are_gone_afterwards() -> None:
    with sandbox() as running:
        assert next(running.run(["import os\nopen('x', 'w').write('1')"])).passed
        pid = running.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_verdicts_come_in_order() -> None:
    assert [v.passed for v in run_programs(["assert 1", "assert 0", "assert 1"])] == [True, False, True]


def test_a_server_that_died_is_an_error() -> None:
    with sandbox() as running:
        running.process.kill()
        running.process.wait()
        with pytest.raises(RuntimeError, match="died"):
            list(running.run(["assert 1"]))
