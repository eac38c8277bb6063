"""What stands between the socket and an endpoint: keys, limits, slow and vanishing clients, odd bytes, and what is said
in each case in each API's shape."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from scripted_llama import Scripted
from servers import Served, serving, until

from llama.serve import edge, running
from llama.serve.edge import JSONLines

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "forever", "max_tokens": 300},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "forever"}]},
    "/v1/fim/completions": {"prompt": "forever", "suffix": "x", "max_tokens": 300},
    "/generate": {"inputs": "forever", "parameters": {"max_new_tokens": 300}},
    "/infill": {"input_prefix": "forever", "input_suffix": "x", "n_predict": 300},
    "/completion": {"prompt": "forever", "n_predict": 300},
    "/api/generate": {"prompt": "forever", "stream": False},
    "/api/chat": {"messages": [{"role": "user", "content": "forever"}], "stream": False},
}
"""Each endpoint that asks the model, with a body whose answer is long."""


def message_of(path: str, response: httpx.Response) -> str:
    """The sentence in an error, which must have the shape of the path's API."""
    body = response.json()
    if path.startswith("/v1"):
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return str(body["error"]["message"])
    if path.startswith("/api"):
        assert set(body) == {"error"}
        return str(body["error"])
    if path.startswith("/generate"):
        assert set(body) == {"error", "error_type"}
        return str(body["error"])
    assert set(body["error"]) == {"code", "message", "type"}
    assert body["error"]["code"] == response.status_code
    return str(body["error"]["message"])


# --- keys ---


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with serving(keys=["first-key", "second-key"], cors=["https://editor.example"]) as found:
        yield found


@pytest.mark.parametrize(
    "path", [*ROUTES, "/v1/models", "/tokenize", "/info", "/props", "/metrics", "/docs", "/nowhere"]
)
def test_every_route_needs_a_key(locked: Served, path: str) -> None:
    with locked.client() as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}, {"X-Api-Key": "é"}):
            method = "POST" if path in ROUTES else "GET"
            response = http.request(method, path, headers={k: v.encode("latin-1") for k, v in headers.items()}, json={})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            if path in ROUTES:
                assert "API key" in message_of(path, response)


def test_each_key_opens(locked: Served) -> None:
    with locked.client() as http:
        for headers in (
            {"Authorization": "Bearer first-key"},
            {"authorization": "bearer second-key"},
            {"X-Api-Key": "first-key"},
        ):
            assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.get("/health").status_code == 200
        assert http.get("/health/ready").status_code == 200
        assert http.get("/healthy").status_code == 401
        assert http.get("/").status_code in (200, 405)


def test_keys_are_compared_in_constant_time(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    original = edge.hmac.compare_digest
    monkeypatch.setattr(edge.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or original(a, b))
    with locked.client() as http:
        http.get("/v1/models", headers={"Authorization": "Bearer first-key"})
    assert len(compared) == 2  # the second as well, though the first fits
    assert len({len(x) for pair in compared for x in pair}) == 1


def test_cors_is_for_named_origins_alone(locked: Served, served: Served) -> None:
    preflight = {"Origin": "https://editor.example", "Access-Control-Request-Method": "POST"}
    with locked.client() as http:
        assert http.options("/v1/completions", headers=preflight).headers["access-control-allow-origin"] == (
            "https://editor.example"
        )
        other = http.options("/v1/completions", headers={**preflight, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    with served.client() as http:
        found = http.get("/v1/models", headers={"Origin": "https://editor.example"})
        assert "access-control-allow-origin" not in found.headers


# --- limits ---


@pytest.mark.parametrize("path", ROUTES)
def test_a_full_queue_is_a_429_that_says_when(path: str) -> None:
    llama = Scripted(rows=1)
    with serving(llama, engine={"max_queue": 0}) as served, served.client() as http:
        llama.model.gate.clear()
        holder = threading.Thread(target=served.post, args=("/v1/completions", {"prompt": "x", "max_tokens": 2}))
        holder.start()
        until(lambda: served.engine._live)
        response = http.post(path, json=ROUTES[path])
        llama.model.gate.set()
        holder.join()
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert "try again later" in message_of(path, response)
        assert b'codellama_request_failure_total{err="overloaded"' in http.get("/metrics").content


@pytest.mark.parametrize("path", ROUTES)
def test_an_answer_that_takes_too_long_is_a_504(path: str) -> None:
    llama = Scripted()
    llama.model.seconds = 0.01
    with serving(llama, engine={"request_timeout": 0.1}) as served:
        response = served.post(path, ROUTES[path])
        assert response.status_code == 504
        assert "0.1 s" in message_of(path, response)
        until(served.is_idle)


@pytest.mark.parametrize("path", ROUTES)
def test_a_draining_server_refuses_with_503(path: str) -> None:
    with serving() as served, served.client() as http:
        served.engine.draining = True
        response = http.post(path, json=ROUTES[path])
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "shutting down" in message_of(path, response)
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_that_are_too_large_or_no_json(served: Served, path: str) -> None:
    with served.client() as http:
        large = b'{"prompt": "' + b"x" * 2_000_000 + b'"}'
        response = http.post(path, content=large, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert "2,000,000" in message_of(path, response)
        chunked = http.post(path, content=iter([large[: 10**6], large[10**6 :]]))  # no content-length
        assert chunked.status_code == 413
        for body in (b"", b"{", b"nonsense", b"[]", b"5", b'"x"', b"null", b"\xff\xfe", b'{"a":' * 5000):
            response = http.post(path, content=body, headers={"Content-Type": "application/json"})
            assert response.status_code in (400, 422)
            assert message_of(path, response)


def test_a_form_of_another_origin_is_not_taken_for_json(served: Served) -> None:
    """curl -d says that it sends a form, and is understood; so might a foreign page in somebody's browser say."""
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    with served.client() as http:
        assert http.post("/v1/completions", content=body, headers=form).status_code == 200
        assert http.post("/v1/completions", content=body).status_code == 200
        foreign = http.post("/v1/completions", content=body, headers={**form, "Origin": "https://evil.example"})
        assert foreign.status_code == 400
        plain = http.post("/v1/completions", content=body, headers={"Content-Type": "text/plain"})
        assert plain.status_code == 400


def raw(served: Served, data: bytes, seconds: float = 5.0) -> bytes:
    """What a socket answers until it is closed."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as sock:
        sock.sendall(data)
        found = b""
        while part := sock.recv(65536):
            found += part
        return found


def test_slow_heads_and_bodies_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.3)
    with serving() as served:
        begun = time.monotonic()
        assert raw(served, b"") == b""
        assert raw(served, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""
        answer = raw(served, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")
        second = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea"  # the next request on the connection
        assert raw(served, second).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - begun < 4


def test_odd_bytes_are_never_a_500(served: Served) -> None:
    for data in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET /%ff%fe%00/../.. HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\nConnection: close\r\n\r\n",
        b"POST /infill HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Type: \xff\r\nConnection: close\r\n\r\n12",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xe9\r\nAuthorization: \xe9\r\nConnection: close\r\n\r\n",
        b"GET /page.js/../../../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"TRACE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        found = raw(served, data)
        assert b" 500 " not in found[:20]
        assert b"root:" not in found
    with served.client() as http:
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "text", ["\ud800", "a\x00b", "\u202e☺漢\U0001f600", "<s></s><unk>", "\r\n\t", " " * 300, "▁<EOT>"]
)
def test_odd_text_is_answered_or_refused(served: Served, text: str) -> None:
    bodies: dict[str, Any] = {
        "/v1/completions": {"prompt": text, "max_tokens": 3, "echo": True, "logprobs": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}], "max_tokens": 3},
        "/infill": {"input_prefix": text, "input_suffix": text, "n_predict": 3},
        "/tokenize": {"content": text, "with_pieces": True},
        "/api/generate": {"prompt": text or "x", "suffix": text, "stream": False},
    }
    with served.client() as http:
        for path, body in bodies.items():
            data = json.dumps(body).encode()  # with escapes, so that it may hold half a pair
            response = http.post(path, content=data, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400), response.text
            response.json()
        stop = http.post("/v1/completions", content=json.dumps({"prompt": "count:", "stop": [text]}).encode())
        assert stop.status_code in (200, 400)


def test_unknown_paths_and_methods(served: Served) -> None:
    with served.client() as http:
        missing = http.get("/v1/nothing")
        assert missing.status_code == 404
        assert missing.json()["error"]["type"] == "not_found_error"
        wrong = http.get("/v1/completions")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        assert http.get("/api/nothing").json() == {"error": "Not Found"}
        assert http.put("/infill").json()["error"]["code"] == 405


def test_request_ids_come_back(served: Served) -> None:
    with served.client() as http:
        assert http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
        for given in ("", "a b", "x" * 200, "<script>"):
            own = http.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"]
            assert own != given
            assert len(own) == 32


# --- clients that go away ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_a_client_that_disconnects_frees_its_row_within_a_step(phase: str, stream: bool) -> None:
    llama = Scripted(rows=1, chunk=8)
    with serving(llama) as served:
        holder = None
        if phase == "queue":
            llama.model.gate.clear()
            holder = threading.Thread(target=served.post, args=("/v1/completions", {"prompt": "count:"}))
            holder.start()
            assert llama.model.waits.wait(5)
        elif phase == "prefill":
            llama.model.gate.clear()
        else:
            llama.model.seconds = 0.01
        body = {"prompt": "word " * 60 if phase == "prefill" else "forever", "max_tokens": 300, "stream": stream}
        data = json.dumps(body).encode()
        host, _, port = served.url.removeprefix("http://").partition(":")
        sock = socket.create_connection((host, int(port)))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        sock.sendall(head.encode() + b"\r\n\r\n" + data)
        until(lambda: len(served.engine._live) == (2 if holder else 1))
        request = list(served.engine._live)[-1]
        if phase == "prefill":
            assert llama.model.waits.wait(5)
        elif phase == "decode":
            until(lambda: request.written > 3)
        sock.close()
        until(lambda: request in served.engine._leaving or request.gone)
        steps = len(llama.model.passes)
        llama.model.gate.set()
        until(lambda: request.gone)
        if holder is None:
            assert len(llama.model.passes) <= steps + 1
        if phase == "prefill":
            assert len(request.held) < len(request.prompt.tokens) / 2
        if holder is not None:
            holder.join()
        until(served.is_idle)
        assert served.post("/v1/completions", {"prompt": "count:"}).status_code == 200


# --- filter, log, metrics ---


def refuse_secrets(text: str, which: str) -> str | None:
    return f"no secrets in the {which}" if "secret" in text else None


async def refuse_three(text: str, which: str) -> bool:
    return not (which == "answer" and "three" in text)


def test_a_filter_refuses_prompts_in_each_apis_shape() -> None:
    with serving(check=refuse_secrets) as served:
        for path, body in ROUTES.items():
            response = served.post(path, json.loads(json.dumps(body).replace("forever", "my secret")))
            assert response.status_code == (422 if path == "/generate" else 400)
            assert message_of(path, response) == "no secrets in the prompt"
        assert served.post("/v1/completions", {"prompt": "my secret"}).json()["error"]["code"] == "content_filter"
        assert served.post("/v1/completions", {"prompt": "count:"}).status_code == 200


def test_a_filter_refuses_answers_before_anybody_sees_them() -> None:
    with serving(check=refuse_three) as served:
        body: dict[str, Any] = {"prompt": "count:", "max_tokens": 50}
        choice = served.post("/v1/completions", body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("", "content_filter")
        text = served.post("/v1/completions", {**body, "stream": True}).text
        assert "one" not in text
        assert "content_filter" in text
        assert text.endswith("data: [DONE]\n\n")
        fine = served.post("/v1/completions", {"prompt": "forever", "max_tokens": 5}).json()["choices"][0]
        assert fine["finish_reason"] == "length"
        assert fine["text"].startswith("la")


def test_lines_that_pass_a_filter_are_streamed_as_they_come() -> None:
    seen: list[str] = []

    def check(text: str, which: str) -> str | None:
        if which == "answer":
            seen.append(text)
        return "bad" if "bad" in text else None

    with serving(Scripted(lambda prompt: "good\nfine\nbad\nworse\n"), check=check) as served:
        text = served.post("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 50}).text
        assert "good" in text
        assert "fine" in text
        assert "bad" not in text
        assert "worse" not in text
        assert seen == ["good\n", "good\nfine\n", "good\nfine\nbad\n"]
        for path, body in (
            ("/v1/completions", {"max_tokens": 50}),
            ("/infill", {"input_prefix": "", "input_suffix": ""}),
        ):
            assert "good" not in served.post(path, {"prompt": "x", **body}).text  # whole: none of it
        until(served.is_idle)


def test_the_log_has_a_line_a_request_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llama.serve"), serving() as served:
        served.post("/v1/completions", {"prompt": "a private thing", "max_tokens": 3}, headers={"X-Request-Id": "r1"})
        until(lambda: caplog.records)
    [record] = [r for r in caplog.records if r.name == "llama.serve"]
    told = json.loads(JSONLines().format(record))
    assert (told["id"], told["status"], told["path"]) == ("r1", 200, "/v1/completions")
    assert told["completion_tokens"] == 3
    assert told["first_token"] > 0
    assert "private" not in json.dumps(told)


def test_prompts_are_logged_only_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llama.serve"), serving(log_prompts=True) as served:
        served.post("/v1/completions", {"prompt": "a private thing", "max_tokens": 3})
        until(lambda: caplog.records)
    assert "a private thing" in caplog.text


def test_metrics_have_vllms_names() -> None:
    with serving() as served, served.client() as http:
        text = "a beginning that both prompts share, as a file that is edited does: "
        for more in "ab":
            http.post("/v1/completions", json={"prompt": text + more, "max_tokens": 50})
        http.post("/v1/completions", json={"prompt": 5})
        found = http.get("/metrics").text
        values = {
            line.rpartition(" ")[0].split("{")[0] + "".join(line.partition("finished_reason=")[1:])[:22]: float(
                line.rpartition(" ")[2]
            )
            for line in found.splitlines()
            if not line.startswith("#") and "_bucket" not in line
        }
        read = values["codellama_prompt_tokens_total"]
        assert values["codellama_prefix_cache_queries_total"] == read
        assert 0.3 * read < values["codellama_prefix_cache_hits_total"] < 0.5 * read
        written = values["codellama_generation_tokens_total"]
        assert values["codellama_inter_token_latency_seconds_count"] == written - 2
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
            assert values[f"codellama_{name}_seconds_count"] == 2
        assert values["codellama_num_requests_running"] == 0
        assert values["codellama_kv_cache_usage_perc"] == 0
        assert 'codellama_request_success_total{finished_reason="stop",model_name="codellama-test"} 2.0' in found
        assert 'codellama_request_failure_total{err="validation",model_name="codellama-test"} 1.0' in found


def test_traces_have_a_span_a_phase_and_honour_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(tracer=provider.get_tracer("test")) as served:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        served.post("/v1/completions", {"prompt": "count:", "max_tokens": 50}, headers={"traceparent": parent})
        served.post("/v1/completions", {"prompt": "count:", "stream": True})
        with served.client() as http:
            http.get("/health")
        until(lambda: len(exporter.get_finished_spans()) >= 8)
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["queue", "prefill", "decode", "llm_request"] * 2
    root = spans[3]
    assert f"{root.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
    assert {span.parent.span_id for span in spans[:3]} == {root.context.span_id}
    assert root.attributes["gen_ai.usage.input_tokens"] == len(served.llama.ids("count:"))
    ends = [(span.start_time, span.end_time) for span in spans[:3]]
    assert all(start <= end for start, end in ends)
    assert root.start_time <= ends[0][0]
    assert ends[2][1] <= root.end_time
    assert spans[7].parent is None


def test_the_page_and_its_files(served: Served, tmp_path: Any) -> None:
    for name, text in (("index.html", "<!doctype html>hello"), ("page.js", "let x"), ("page.css", "a{}")):
        (tmp_path / name).write_text(text)
    with serving(page=tmp_path) as own, own.client() as http:
        index = http.get("/")
        assert "hello" in index.text
        assert "default-src 'self'" in index.headers["content-security-policy"]
        assert http.get("/page.js").headers["content-type"].startswith("text/javascript")
        assert http.get("/page.css").headers["content-type"].startswith("text/css")
        assert http.get("/page.js?name=/etc/passwd&path=/etc/passwd").text == "let x"
        assert http.head("/").status_code == 200
        assert http.post("/", json={"inputs": "count:"}).json()[0]["generated_text"]
    with serving(page=tmp_path / "none") as bare, bare.client() as http:
        assert http.get("/").status_code == 405
        assert http.get("/page.js").status_code == 404
