"""What HTTP costs: `python tests/serve/cost_per_token.py` prints the processor time that a server takes for each token
of 8 streams, beside that of the same loop without a server. The model is a stand-in without weights, and the clients
are another process, so that neither is counted. Processor time, since others may use the machine."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scripted_llama import Scripted
from servers import serving

from llama.prompts import Prompt
from llama.requests import Request
from llama.sampling import Sampling

ROWS, TOKENS, ROUNDS, STEP = 8, 150, 3, 0.02
CHAT = {"messages": [{"role": "user", "content": "forever"}]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "forever"}),
    "chat": ("/v1/chat/completions", CHAT),
    "chat, usage in each chunk": (
        "/v1/chat/completions",
        {**CHAT, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "one request with 8 answers": ("/v1/completions", {"prompt": "forever", "n": ROWS}),
    "logprobs": ("/v1/completions", {"prompt": "forever", "logprobs": 3}),
    "generate_stream": ("/generate_stream", {"inputs": "forever", "parameters": {"max_new_tokens": TOKENS}}),
    "api/generate": ("/api/generate", {"prompt": "forever", "options": {"num_predict": TOKENS, "temperature": 0}}),
}


def ask(url: str, path: str, body: dict[str, Any], streams: int) -> None:
    """The clients' process: sends all requests, and reads until all have ended."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    sockets = [socket.create_connection((host, int(port))) for _ in range(streams)]
    for one in sockets:
        one.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    for one in sockets:
        got = b""
        while more := one.recv(1 << 20):
            got += more
        assert b" 200 " in got.split(b"\r\n")[0], got[:500]


def scripted() -> Scripted:
    llama = Scripted(rows=ROWS, slots=TOKENS + 100)
    llama.model.say = lambda prompt: "la " * 4 * TOKENS
    llama.model.seconds = STEP
    return llama


def bare() -> float:
    """Seconds of the loop alone."""
    llama = scripted()
    prompt = llama.ids("forever")
    greedy, asked = Sampling(temperature=0), Prompt(prompt, frozenset())
    told = [Request(llama.tokenizer, asked, TOKENS, greedy, row=i) for i in range(ROWS)]
    begun = time.process_time()
    assert sum(len(event.tokens) for event in llama.loop.run(told)) == ROWS * TOKENS
    return time.process_time() - begun


def cost(path: str, body: dict[str, Any]) -> float:
    body = {"stream": True, "max_tokens": TOKENS, "temperature": 0, **body}
    with serving(scripted()) as served:
        begun = time.process_time()
        streams = ROWS // body.get("n", 1)
        words = [sys.executable, __file__, "ask", served.url, path, json.dumps(body), str(streams)]
        subprocess.run(words, check=True)
        spent = time.process_time() - begun
        with served.client() as http:
            written = re.findall(r"generation_tokens_total.* (\d+)", http.get("/metrics").text)
        assert written == [str(ROWS * TOKENS)], written
        return spent


def main() -> None:
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(CASES)
    tokens = ROWS * TOKENS
    plain = min(bare() for _ in range(ROUNDS))
    print(f"{'the loop alone':28} {1e6 * plain / tokens:7.1f} µs a token")
    for name in chosen:
        more = min(cost(*CASES[name]) for _ in range(ROUNDS)) - plain
        print(f"{name:28} {1e6 * more / tokens:+7.1f} µs a token, {1e3 * more / TOKENS:.2f} ms a step of {ROWS} rows")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if sys.argv[1:2] == ["ask"]:
        ask(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
