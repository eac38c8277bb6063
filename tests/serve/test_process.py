"""`codellama serve` as a process: what it prints, how it ends, what it says when it can't begin, and several ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import until

from llama.generation import Llama
from llama.serve.cli import check_of, keys_of, name_of

SCRIPT = Path(__file__).with_name("ranks_serve.py")


@contextmanager
def started(*words: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server process, its address, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llama.serve", "run", "--port", "0", *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        printed = "".join(process.stdout.readline() for _ in range(3))
        found = re.search(r"http://[\d.]+:\d+", printed)
        assert found is not None, process.communicate()
        yield process, found[0], printed
    finally:
        process.kill()
        process.communicate()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_lets_what_runs_go_on_and_refuses_the_rest() -> None:
    with started("--max_batch_size", "1", "--max_seq_len", "1024", "--log", "json") as (process, url, printed):
        until(lambda: ready(url))
        body = {"prompt": "def f(", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
        got: dict[str, Any] = {}

        def ask(name: str, prompt: str) -> None:
            try:
                got[name] = httpx.post(f"{url}/v1/completions", json={**body, "prompt": prompt}, timeout=30)
            except httpx.TransportError as error:
                got[name] = error

        threads = [threading.Thread(target=ask, args=(name, name)) for name in ("runs", "waits")]
        threads[0].start()
        metrics = f"{url}/metrics"
        until(lambda: 'num_requests_running{model_name="codellama-tiny"} 1.0' in httpx.get(metrics).text)
        threads[1].start()
        until(lambda: 'num_requests_waiting{model_name="codellama-tiny"} 1.0' in httpx.get(metrics).text)
        process.send_signal(signal.SIGTERM)
        until(lambda: "waits" in got)
        late = httpx.post(f"{url}/v1/completions", json=body) if "runs" not in got else None
        for thread in threads:
            thread.join()
        assert got["runs"].json()["usage"]["completion_tokens"] == 300
        assert got["waits"].status_code == 503
        assert late is None or late.status_code == 503
        assert process.wait(10) == 0
        errors = process.communicate()[1]
        assert "1 rows of 1024 tokens" in printed
        assert "Traceback" not in errors
        assert '"completion_tokens": 300' in errors


@pytest.mark.slow
def test_two_signals_end_it_at_once() -> None:
    with started("--drain", "60") as (process, url, _):
        until(lambda: ready(url))
        body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(10) in (0, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--port", "99999"), "65535"),
        (("--api_key_file", "/nowhere/keys"), "/nowhere/keys"),
        (("--filter", "/nowhere.py:check"), "there is no file"),
        pytest.param(("--host", "203.0.113.7"), "--host", marks=pytest.mark.slow),
        pytest.param(("--ckpt_dir", "/nowhere"), "/nowhere", marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_one_sentence(words: tuple[str, ...], said: str) -> None:
    command = [sys.executable, "-m", "llama.serve", "run", "--port", "0", *words]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode in (1, 2)
    assert said in found.stdout + found.stderr
    assert "Traceback" not in found.stderr


def test_without_fastapi_it_names_the_pip_command() -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from llama.serve.cli import serve\n"
        "try: serve(port=0)\n"
        "except ValueError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "pip install 'codellama[serve]'" in found.stdout, found.stderr


def test_keys_names_and_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODELLAMA_API_KEY", "from-env")
    (tmp_path / "keys").write_text("# ours\none\n\n two \n")
    assert keys_of("given", str(tmp_path / "keys")) == ["given", "from-env", "one", "two"]
    for bad in ("", "  ", "é"):
        with pytest.raises(ValueError, match="API key"):
            keys_of(bad, None)
    (tmp_path / "none").write_text("# nothing\n")
    monkeypatch.delenv("CODELLAMA_API_KEY")
    with pytest.raises(ValueError, match="no key"):
        keys_of(None, str(tmp_path / "none"))
    assert name_of("/models/CodeLlama-7b/") == "CodeLlama-7b"
    assert name_of("/models/codellama-7b.Q4_K_M.gguf") == "codellama-7b.Q4_K_M"
    (tmp_path / "my.py").write_text("def check(text, which):\n    return None\ndef other(): ...\nx = 1\n")
    check = check_of(f"{tmp_path}/my.py:check")
    assert check is not None
    assert check("x", "prompt") is None
    for name in ("other", "x", "missing"):
        with pytest.raises(ValueError, match=name):
            check_of(f"{tmp_path}/my.py:{name}")


# --- ranks ---


@contextmanager
def on_two_ranks(folder: Path, timeout: str = "20") -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    found = folder / "address"
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder / "store"), str(rank), str(found)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "TIMEOUT": timeout},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        until(lambda: found.exists() or any(p.poll() is not None for p in processes), 60)
        assert found.exists(), [p.communicate() for p in processes]
        until(lambda: ready(found.read_text()), 20)
        yield processes, found.read_text()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_ranks_answer_as_one_does_and_end_together(tmp_path: Path) -> None:
    llama = Llama.build(max_seq_len=512, max_batch_size=8)
    prompts = ["def f(", "import ", "class A:\n", "for x in "]
    expected = [p["generation"] for p in llama.text_completion(prompts, 0.0, max_gen_len=16)]
    with on_two_ranks(tmp_path) as (processes, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as ai:
            for _ in range(2):
                found = ai.completions.create(model="x", prompt=prompts, max_tokens=16, temperature=0)
                assert [choice.text for choice in found.choices] == expected
            stream = ai.completions.create(model="x", prompt="def f(", max_tokens=400, stream=True)
            next(iter(stream))
            stream.close()
            gone = httpx.post(f"{url}/infill", json={"input_prefix": "    ret", "input_suffix": "\n", "n_predict": 4})
            assert gone.status_code == 200  # healed: the mask is on rank 0 alone
            metrics = httpx.get(f"{url}/metrics").text
            assert 'finished_reason="abort"' in metrics
            assert (
                ai.completions.create(model="x", prompt="def f(", max_tokens=16, temperature=0).choices[0].text
                == (expected[0])
            )
        processes[0].send_signal(signal.SIGTERM)
        assert [process.wait(20) for process in processes] == [0, 0]
        assert "Traceback" not in "".join(process.communicate()[1] for process in processes)


@pytest.mark.slow
def test_a_rank_killed_under_load_ends_the_server_with_one_sentence(tmp_path: Path) -> None:
    with on_two_ranks(tmp_path, "5") as (processes, url):
        got: list[Any] = []

        def ask() -> None:
            body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
            try:
                got.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30))
            except httpx.TransportError as error:
                got.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: 'num_requests_running{model_name="codellama-tiny"} 6.0' in httpx.get(f"{url}/metrics").text)
        processes[1].kill()
        assert processes[0].wait(20) == 1
        for thread in threads:
            thread.join()
        errors = processes[0].communicate()[1]
        assert "has ended or has not answered" in errors
        assert "Traceback" not in errors
        assert [one.status_code for one in got if isinstance(one, httpx.Response)] == [503] * 6
