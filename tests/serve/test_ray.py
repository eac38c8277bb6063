"""Ray Serve on this machine: two replicas of the embedded checkpoint behind one address, and one killed under load.

Ray is started by the first test and stopped after the last; nothing else of it is touched."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import until

from llama.generation import Llama

ray = pytest.importorskip("ray", reason="Ray Serve is tested after pip install -e '.[ray]'")
made = pytest.importorskip("llama.serve.ray_app")
BLOCK, BLOCKS, Holders, blocks_of, build = made.BLOCK, made.BLOCKS, made.Holders, made.blocks_of, made.build

SECONDS = 120
MARK = "x-codellama-replica"


def body_of(prompt: str, **more: Any) -> bytes:
    return json.dumps({"prompt": prompt, **more}).encode()


def test_beginnings_are_known_by_their_blocks() -> None:
    one, other = blocks_of(body_of("a" * 1000)), blocks_of(body_of("a" * 600 + "b" * 400))
    assert len(one) == len(other) == 1000 // BLOCK
    shared = sum(x == y for x, y in zip(one, other, strict=True))
    assert shared == 600 // BLOCK
    assert one[:shared] == other[:shared]
    assert len(blocks_of(body_of("short"))) == 1
    assert blocks_of(body_of("short")) == blocks_of(body_of("short", max_tokens=5))
    assert len(blocks_of(body_of("a" * 100_000))) == BLOCKS
    assert blocks_of(b"nonsense") == []
    assert blocks_of(b"[1, 2]") == blocks_of(b'{"x": 1}'), "no prompt in either"
    turns = [{"role": "system", "content": "b" * 300}, {"role": "user", "content": "c"}]
    more = [*turns, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]
    first, second = (blocks_of(json.dumps({"messages": talk}).encode()) for talk in (turns, more))
    assert second[: len(first)] == first, "a dialog that goes on has the beginning that it had"


def test_the_longest_beginning_decides_and_the_dead_are_not_asked() -> None:
    holders = Holders()
    holders.note([b"1", b"2"], "a")
    holders.note([b"1", b"2", b"3"], "b")
    holders.note([b"1"], "a")
    assert holders.of([b"1", b"2", b"3", b"4"], ["a", "b"]) == "b"
    assert holders.of([b"1", b"9"], ["a", "b"]) == "a"
    assert holders.of([b"1", b"2", b"3"], ["a"]) == "a"
    assert holders.of([b"7"], ["a", "b"]) is None


def test_words_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="no replica"):
        build({"replica": "2"})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from ray import serve
    from ray.serve.config import HTTPOptions

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        words = {"replicas": "2", "num_cpus": "1", "max_batch_size": "4", "max_seq_len": "1024", "model_name": "tiny"}
        serve.run(build(words), name="codellama")
        address = f"http://127.0.0.1:{port}"
        until(lambda: httpx.get(f"{address}/health/ready", timeout=20).status_code == 200, SECONDS)
        yield address
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(url: str, prompt: str, path: str = "/v1/completions", **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, **more}
    return httpx.post(f"{url}{path}", json=body, timeout=SECONDS)


def replicas(url: str) -> set[str]:
    """All that answer at present: prompts with nothing in common go to whoever has least to do."""
    return {ask(url, f"{i} {time.monotonic()} " * 20, max_tokens=1).headers[MARK] for i in range(8)}


@pytest.mark.slow
def test_two_replicas_answer_as_one_server_does(url: str) -> None:
    llama = Llama.build(max_seq_len=256, max_batch_size=4)
    prompts = [f"def f{i}(" for i in range(6)]
    expected = [found["generation"] for found in llama.text_completion(prompts, 0.0, max_gen_len=12)]
    assert [ask(url, prompt).json()["choices"][0]["text"] for prompt in prompts] == expected
    until(lambda: len(replicas(url)) == 2, SECONDS)
    assert httpx.get(f"{url}/v1/models", timeout=20).json()["data"][0]["id"] == "tiny"
    refused = ask(url, "x", n=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert httpx.get(f"{url}/nothing", timeout=20).status_code == 404
    assert httpx.post(f"{url}/infill", content=b"x" * 2_100_000, timeout=20).status_code == 413
    stopped = ask(url, "x", "/infill", input_prefix="def f(", input_suffix="\n", n_predict=3)
    assert stopped.json()["stop"] is True


@pytest.mark.slow
def test_answers_are_streamed_as_they_come_and_end_when_nobody_reads(url: str) -> None:
    body = {"prompt": "def f(", "max_tokens": 400, "stream": True, "ignore_eos": True}
    times: list[float] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        own = response.headers[MARK]
        for line in response.iter_lines():
            times.append(time.monotonic())
            if line == "data: [DONE]":
                break
    assert times[-1] - times[0] > 5 * (times[20] - times[0]) * 0.2, "not all at once"
    assert len(times) > 400
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as response:
        own = response.headers[MARK]
        next(response.iter_lines())

    def running() -> float:
        """Of that replica: prompts with its beginning reach it."""
        while True:
            found = httpx.get(f"{url}/metrics", timeout=20)
            if found.headers[MARK] == own:
                line = next(one for one in found.text.splitlines() if one.startswith("codellama_num_requests_running{"))
                return float(line.rpartition(" ")[2])

    until(lambda: running() == 0, 20)


@pytest.mark.slow
def test_a_shared_beginning_goes_where_it_is_held(url: str) -> None:
    for i in range(4):
        beginning = f"# {i} {time.monotonic()}\n" + "value = index + buffer  # config\n" * 16
        found = [ask(url, beginning + f"def f{j}(", max_tokens=2) for j in range(5)]
        assert len({one.headers[MARK] for one in found}) == 1
        cached = [one.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found]
        assert cached[0] < 50
        assert min(cached[1:]) > 100


@pytest.mark.slow
def test_a_replica_killed_under_load_loses_nothing_but_what_it_was_writing(url: str) -> None:
    until(lambda: len(replicas(url)) == 2, SECONDS)
    victim = sorted(replicas(url))[0]
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if victim in one["name"]]
    ends: dict[str, list[str]] = {"whole": [], "stream": []}

    def whole(i: int) -> None:
        found = ask(url, f"{i} def f(", max_tokens=150, ignore_eos=True)
        is_good = found.status_code == 200 and found.json()["usage"]["completion_tokens"] == 150
        ends["whole"].append("good" if is_good else f"{found.status_code} {found.text}")

    def stream(i: int) -> None:
        body = {"prompt": f"{i} class A", "max_tokens": 150, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as response:
            text = response.read().decode()
        last = text.strip().split("\n\n")[-1]
        ends["stream"].append("good" if last == "data: [DONE]" else last)

    def load(one: Any, count: int) -> None:
        for i in range(count):
            one(threading.get_ident() % 1000 * 100 + i)

    threads = [threading.Thread(target=load, args=(one, 4)) for one in (whole, stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    ray.kill(ray.get_actor(names[0], namespace="serve"))
    for thread in threads:
        thread.join(SECONDS)
    assert ends["whole"] == ["good"] * 16, "those of which nothing was sent are asked again"
    assert len(ends["stream"]) == 16, "none hangs"
    broken = [end for end in ends["stream"] if end != "good"]
    assert len(broken) <= 4, "those that it was writing"
    for end in broken:
        error = json.loads(end.removeprefix("data: "))["error"]
        assert "was lost: send the request again" in error["message"]
        assert error["type"] == "server_error"
    until(lambda: len(replicas(url) - {victim}) == 2, SECONDS)
