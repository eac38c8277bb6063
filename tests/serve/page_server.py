"""A stand-in for the server, for tests of the page: the same API from the standard library, with scripted answers. It
keeps every request it got, counts those that the page broke off, and serves the page's three files under the strictest
Content-Security-Policy that the page must live with."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "llama" / "serve" / "page"
FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@dataclass
class Failure:
    """What the next requests of inference are answered with."""

    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Script:
    """What the stand-in says and how. A test changes it between two actions in the page."""

    answers: list[list[str]] = field(default_factory=list)
    """The pieces of the next answers, first in first out; `usual` once they are used up."""
    usual: list[str] = field(default_factory=lambda: ["pass"])
    pause: float = 0.0
    """Seconds before each piece."""
    failures: list[Failure] = field(default_factory=list)
    """Answers to the next requests of inference, before any answer."""
    break_after: int | None = None
    """The stream ends after so many pieces, as when a server dies."""
    error_after: int | None = None
    """An error is sent within the stream after so many pieces."""
    finish: str = "stop"
    key: str = ""
    """If given, every route but /health wants it."""
    health: int = 200
    context: int = 4096
    models: list[str] = field(default_factory=lambda: ["CodeLlama-7b-Instruct"])
    counts: bool = True
    """Whether each chunk says what was used so far, or the last one alone."""
    bos: bool = False
    """Whether <s> is the first of the echoed tokens."""


class PageServer(ThreadingHTTPServer):
    """Use as a context manager; `url` is where it listens, on a free port or the one given."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Answers)
        self.script = Script()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.aborted = 0
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies of all requests to a path."""
        return [body for name, body in self.requests if name == path]

    def reset(self) -> None:
        self.script, self.requests, self.aborted = Script(), [], 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error here."""

    def __enter__(self) -> PageServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Answers(BaseHTTPRequestHandler):
    server: PageServer

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        script = self.server.script
        path = self.path.split("?")[0]
        if path in FILES:
            file = PAGE / FILES[path]
            self.reply(200, file.read_bytes(), TYPES[file.suffix], {"Content-Security-Policy": POLICY})
        elif path == "/health":
            self.reply(script.health, {"status": "ok"})
        elif not self.allowed():
            self.refuse_key()
        elif path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in script.models]})
        elif path == "/props":
            settings = {"n_ctx": script.context}
            self.reply(200, {"default_generation_settings": settings, "model_path": "/models/CodeLlama-7b-Instruct"})
        else:
            self.reply(404, {"error": {"message": f"There is no {path}"}})

    def do_POST(self) -> None:
        script = self.server.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        if not self.allowed():
            self.refuse_key()
        elif self.path == "/tokenize":
            self.reply(200, {"tokens": tokenize(body["content"], body.get("with_pieces", False))})
        elif script.failures:
            failure = script.failures.pop(0)
            self.reply(failure.status, failure.body, headers=failure.headers)
        else:
            self.stream(body, script.answers.pop(0) if script.answers else script.usual)

    def allowed(self) -> bool:
        key = self.server.script.key
        return not key or self.headers.get("Authorization") == f"Bearer {key}"

    def refuse_key(self) -> None:
        self.reply(401, {"error": {"message": "Invalid API key", "type": "authentication_error"}})

    def reply(
        self, status: int, body: Any, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, body: dict[str, Any], pieces: list[str]) -> None:
        script = self.server.script
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.wfile.write(b": a comment, which keeps the connection open\r\n\r\n")
            for number, event in enumerate(events(body, pieces, script)):
                if number == script.break_after:
                    return
                if number == script.error_after:
                    event = {"error": {"message": "the model ran out of memory"}}
                time.sleep(script.pause)
                self.wfile.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.aborted += 1


def tokenize(text: str, with_pieces: bool = False) -> list[Any]:
    """Pieces of at most four characters; an id is the sum of a piece's code points."""
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    ids = [sum(map(ord, piece)) for piece in pieces]
    return [{"id": i, "piece": piece} for i, piece in zip(ids, pieces, strict=True)] if with_pieces else ids


def events(body: dict[str, Any], pieces: list[str], script: Script) -> Iterator[dict[str, Any]]:
    """The chunks of one answer, a piece each; then why it ended, and what it used."""
    chat = "messages" in body
    read = sum(len(m["content"]) for m in body["messages"]) if chat else len(body["prompt"])
    shown = pieces[: body["max_tokens"]]

    def usage(wrote: int) -> dict[str, int]:
        return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}

    if body.get("echo"):
        first = ["<s>"] * script.bos + [one["piece"] for one in tokenize(body["prompt"], True)]
        choice = {"index": 0, "text": body["prompt"], "finish_reason": None, "logprobs": logprobs(first, True)}
        yield {"choices": [choice]}
    for wrote, piece in enumerate(shown, start=1):
        said: dict[str, Any] = {"delta": {"content": piece}} if chat else {"text": piece}
        if body.get("logprobs") and not chat:
            said["logprobs"] = logprobs([piece], False)
        if body.get("return_token_ids"):
            said["token_ids"] = tokenize(piece)[:1]
        event: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": None, **said}]}
        if script.counts and body.get("stream_options", {}).get("continuous_usage_stats"):
            event["usage"] = usage(wrote)
        yield event
    end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
    yield {"choices": [{"index": 0, "finish_reason": script.finish, **end}]}
    if body.get("stream_options", {}).get("include_usage"):
        yield {"choices": [], "usage": usage(len(shown))}


SHARES = [0.97, 0.7, 0.45, 0.2, 0.05, 0.004]


def logprobs(pieces: list[str], begins: bool) -> dict[str, Any]:
    """Probabilities that depend on a piece alone, with four alternatives; none for the first token of a text."""
    own, top = [], []
    for piece in pieces:
        share = SHARES[sum(map(ord, piece)) % len(SHARES)]
        left = 1 - share
        others = {" return": left * 0.5, "\n": left * 0.25, " x": left * 0.15, "<img src=x>": left * 0.06, piece: share}
        own.append(math.log(share))
        top.append({text: math.log(p) for text, p in others.items()})
    if begins and own:
        return {"tokens": pieces, "token_logprobs": [None, *own[1:]], "top_logprobs": [None, *top[1:]]}
    return {"tokens": pieces, "token_logprobs": own, "top_logprobs": top}


if __name__ == "__main__":
    with PageServer(8123) as server:
        server.script.usual = ["    return", " n", " if", " n", " <", " 2", "\n", "    else", " f(n", " - 1)", "\n\n"]
        server.script.pause = 0.05
        print(server.url)
        server.thread.join()
