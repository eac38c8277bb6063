"""Attacks on the sandbox, each on each layer that this system has; none reaches the host, and none counts as passed."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama.evals.judging import Judge
from llama.evals.sandbox import LOCKS, Limits, Sandbox, has_bubblewrap, sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox's processes need a POSIX system")
LAYERS = [("bubblewrap",), ("landlock", "seccomp"), LOCKS]


@pytest.fixture(scope="module", params=LAYERS, ids="+".join)
def place(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    if "bubblewrap" in request.param and not has_bubblewrap():
        pytest.skip("bubblewrap is not installed, or may make no namespaces here: apt-get install bubblewrap")
    try:
        with sandbox(Limits(seconds=0.5, memory=1 << 28), request.param) as running:
            yield running
    except ValueError as error:
        pytest.skip(str(error))


def passes(place: Sandbox, program: str) -> bool:
    found = next(place.run([program]))
    assert any(next(place.run(["assert 1"])).passed for _ in range(9))  # the next one finds all as it was
    return found.passed


def test_the_layer_stands_in_the_results(place: Sandbox) -> None:
    assert place.is_safe
    assert place.layers[0] == "rlimits"


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)\nassert 0",
        "import os\nos._exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM) or os._exit(0)",
        "import builtins\nbuiltins.AssertionError = builtins.BaseException = Exception\nassert 0",
        "import builtins\nbuiltins.exec = builtins.compile = print\nassert 0",
        "import os\nos.write = lambda *a: 0\nos._exit = lambda *a: 0\nraise ValueError",
        "import os\nfor fd in range(3, 9):\n    os.isatty(fd) or os.write(fd, b'passed')\nos._exit(0)",
        "import os\nfor fd in os.listdir('/proc/self/fd'):\n    os.write(int(fd), b'passed')\nos._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nassert 0",
        "print('passed')\nprint('OK')\nraise SystemExit(0)",
        "def check(f):\n    pass\nimport sys\nsys.exit()\ncheck(1)",
        "class Quiet(BaseException):\n    def __str__(self):\n        import os\n        os._exit(0)\nraise Quiet",
    ],
)
def test_an_exit_code_that_lies_is_no_proof(place: Sandbox, program: str) -> None:
    assert not passes(place, program)


def test_the_home_folder_is_out_of_reach(place: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    for path in (secret, Path("/etc/passwd"), Path("/proc/1/environ"), Path(__file__)):
        assert not passes(place, f"open({str(path)!r}).read()")
    assert not passes(place, f"import os\nassert os.listdir({str(Path.home())!r}) and os.listdir({str(tmp_path)!r})")


def test_nothing_is_written_outside(place: Sandbox, tmp_path: Path) -> None:
    for path in (tmp_path / "new", Path("/tmp/of-a-sandbox-test"), Path("/usr/of-a-sandbox-test")):
        next(place.run([f"open({str(path)!r}, 'w').write('x')"]))
        assert not path.exists()


def test_no_network(place: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not passes(place, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.5)")


def test_the_parent_lives(place: Sandbox) -> None:
    kill = "import os, signal\nfor pid in (os.getppid(), {}):\n    try:\n        os.kill(pid, signal.SIGKILL)\n"
    kill = kill.format(os.getpid()) + "    except (PermissionError, ProcessLookupError):\n        pass\nassert 0"
    assert not passes(place, kill)
    assert place.process.poll() is None


def test_a_fork_bomb_ends_with_its_time(place: Sandbox) -> None:
    """Without seccomp, one of a hundred processes, since it is the host's tests that must go on."""
    bomb = (
        "while True:\n    os.fork()"
        if "seccomp" in place.layers
        else "for _ in range(100):\n    os.fork() or time.sleep(60)"
    )
    assert not passes(place, f"import os, time\n{bomb}\nassert 0")


def test_a_background_process_does_not_outlive_its_program(place: Sandbox) -> None:
    """It would write for as long as it lives, if only into its folder."""
    behind = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(4321)\n"
    next(place.run([behind]))
    assert any(passes(place, "import os\nassert os.listdir('.') == []") for _ in range(9))
    found = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
    children = [line for line in found.splitlines() if line.split()[0] == str(place.process.pid)]
    assert len(children) <= 1  # of bubblewrap's own: the server


def test_endless_output_input_stack_and_memory(place: Sandbox) -> None:
    assert not passes(place, "while True:\n    print('x' * 10 ** 6)")
    assert not passes(place, "input()")
    assert not passes(place, "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n):\n    return f(n + 1)\nf(0)")
    assert not passes(place, "x = []\nwhile True:\n    x.append(bytearray(10 ** 7))")
    assert not passes(
        place, "with open('f', 'wb') as f:\n    while True:\n        f.write(bytes(10 ** 6))\n        f.flush()"
    )


def test_without_locks_it_is_refused() -> None:
    with pytest.raises(ValueError, match="--unsafe_without_sandbox"):
        Judge(Limits(seconds=1), 1, locks=())
    with Judge(Limits(seconds=1), 1, locks=(), unsafe=True) as judge:
        assert judge.layers == ("rlimits",)
        assert judge.one("assert 1").passed


def test_a_lock_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.evals.sandbox.has_bubblewrap", lambda: False)
    with pytest.raises(ValueError, match="no bubblewrap"), sandbox(locks=("bubblewrap",)):
        pass


def test_a_judge_goes_on_after_its_sandbox_died() -> None:
    with Judge(Limits(seconds=1), 1) as judge:
        assert judge.one("assert 1").passed
        running = judge._places[0].open()
        running.process.kill()
        running.process.wait()
        assert judge.one("assert 1").passed
        assert [v.error for _, v in sorted(judge.all(["", "assert 0", "1 +"]), key=lambda pair: pair[0])] == [
            "", "AssertionError", "SyntaxError",
        ]  # fmt: skip


def test_time_is_over_on_time(place: Sandbox) -> None:
    began = time.monotonic()
    assert not passes(place, "import time\ntime.sleep(50)")
    assert time.monotonic() - began < 15
