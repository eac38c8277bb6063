"""`codellama` as processes: closed pipes, Ctrl-C at any time, terminals with few characters, how soon help comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OWN = {"CODELLAMA_NO_KERNELS": "1", "OMP_NUM_THREADS": "1"}
CODELLAMA = [sys.executable, "-m", "llama"]


def run(*words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*CODELLAMA, *words], capture_output=True, env={**os.environ, **OWN, **env}, check=False)


@pytest.mark.parametrize("words", ["--help", "--version", "complete --help", "infill --help", "chat --help"])
def test_help_comes_at_once_and_without_pytorch(words: str) -> None:
    """The best of three processes, beside the best of three that start Python alone."""
    script = "import sys, llama.cli\ntry:\n    llama.cli.main()\nfinally:\n    assert 'torch' not in sys.modules"

    def seconds(*command: str) -> float:
        began = time.perf_counter()
        ended = subprocess.run([sys.executable, *command], capture_output=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, b"")
        return time.perf_counter() - began

    python = min(seconds("-c", "pass") for _ in range(3))
    assert min(seconds("-c", script, *words.split()) for _ in range(3)) - python < 0.3


def test_a_reader_who_goes_away_ends_it_in_silence() -> None:
    command = subprocess.list2cmdline([*CODELLAMA, "complete", "x = 1", "--temperature", "2", "--max_gen_len", "1500"])
    piped = subprocess.run(
        ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        env={**os.environ, **OWN},
        check=False,
    )
    assert piped.stderr == b""
    assert piped.stdout.splitlines()[-1] == b"141"


@pytest.mark.parametrize("after", [0.15, 0.6, 1.2, 2.5])
def test_ctrl_c_ends_it_without_a_traceback(after: float) -> None:
    """While PyTorch is imported, while a model is loaded, and while it writes, which it then stops."""
    words = [*CODELLAMA, "complete", "x = 1", "--temperature", "2", "--max_gen_len", "2000", "--no_fast"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **OWN})
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert err == b""
    # A shell tells both as 130: -2 is Python that is ended by the signal before it can hear of it.
    assert process.returncode in (130, -signal.SIGINT) or out.endswith(b"[stopped]\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_may_have_fewer_characters(encoding: str) -> None:
    written = run("complete", "x = '😀'", "--max_gen_len", "2", PYTHONIOENCODING=encoding)
    assert (written.returncode, written.stderr) == (0, b"")
    assert written.stdout.startswith("x = '😀'".encode(encoding, errors="backslashreplace"))
    told = run("complete", "x", "--temprature", "1", PYTHONIOENCODING=encoding)
    assert told.returncode == 2
    assert b"--temperature X" in told.stderr


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*CODELLAMA, "complete", b"caf\xe9"], capture_output=True, env={**os.environ, **OWN}, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"error: the prompt is not in utf-8 (byte 0xe9 at 3)")


@pytest.mark.slow
def test_the_first_run_is_plain_and_the_next_one_is_fast(tmp_path: Path) -> None:
    """Nobody waits for the compiler: it works in the background, and the next run finds what it made."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    words = [*CODELLAMA, "complete", "x = 1", "--max_gen_len", "2"]
    began = time.monotonic()
    first = subprocess.run(words, capture_output=True, text=True, env=env, check=True)
    assert time.monotonic() - began < 20
    assert first.stderr == (
        "note: the fast kernels are being compiled in the background (about half a minute); this run does without\n"
    )
    while not list(tmp_path.glob("codellama/kernels-*.so")):
        assert time.monotonic() - began < 180
        time.sleep(1)
    assert subprocess.run(words, capture_output=True, text=True, env=env, check=True).stderr == ""


def test_an_example_script_refuses_an_unknown_flag_before_it_loads() -> None:
    for script in ("example_completion.py", "example_infilling.py", "example_instructions.py"):
        path = Path(__file__).parents[2] / script
        words = [sys.executable, str(path), "--ckpt_dir", "/nowhere", "--temprature", "1"]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: there is no option --temprature; did you mean temperature? (there are ")


def test_rank_0_alone_reads_and_prints() -> None:
    """A chat on two ranks is what it is on one."""
    words = ["chat", "--temperature", "0", "--max_gen_len", "5"]
    script = b"Hi\n/set max_gen_len 4\nAnd?\n/retry\n"
    alone = subprocess.run(
        [*CODELLAMA, *words], input=script, capture_output=True, env={**os.environ, **OWN}, check=True
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "llama"]
    shared = subprocess.run(
        [*launcher, *words], input=script, capture_output=True, env={**os.environ, **OWN}, check=True
    )
    assert shared.stdout == alone.stdout
    assert shared.stderr.endswith(alone.stderr)
