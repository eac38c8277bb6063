"""A server that answers like OpenAI's and computes nothing: `python load_trivial.py GAP DELAY` prints its port.

Its answers have `max_tokens` events, the first after DELAY seconds, the others GAP seconds apart. A model's name that
begins with "breaks-" says what goes wrong: 429, 500, cut, close, garbage, error, silence.
"""

from __future__ import annotations

import asyncio
import json
import sys

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def plain(status: int, found: object) -> bytes:
    body = json.dumps(found).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            size = next(
                (int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0
            )
            body = await reader.readexactly(size)
            await answer(head.split()[1], body, writer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def answer(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    if path == "/v1/models":
        writer.write(plain(200, {"data": [{"id": "trivial"}]}))
        return
    try:
        asked = json.loads(body)
        prompt = asked["messages"][0]["content"] if "chat" in path else asked["prompt"]
        words = prompt.split() if isinstance(prompt, str) else [int(token) for token in prompt]
        n = int(asked["max_tokens"])
        model = str(asked["model"])
        assert 0 <= n < 10_000
    except Exception:
        writer.write(plain(400, {"error": {"message": "nonsense"}}))
        return
    kind = model.removeprefix("breaks-") if model.startswith("breaks-") else ""
    if kind.isdecimal():
        writer.write(plain(int(kind), {"error": {"message": kind}}))
        return
    if kind == "close":
        writer.close()
        return
    begin = asyncio.get_running_loop().time() + DELAY
    key, value = ("delta", {"content": "x "}) if "chat" in path else ("text", "x ")
    writer.write(HEAD)
    if key == "delta":
        writer.write(chunk(b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'))
    for i in range(n):
        pause = begin + i * GAP - asyncio.get_running_loop().time()
        if pause > 0:
            await asyncio.sleep(pause)
        if i == 2 and kind == "cut":
            writer.write(b"0\r\n\r\n")
            return
        if i == 2 and kind == "silence":
            await asyncio.sleep(3600)
        wrong = {"garbage": b"data: {]\n\n", "error": b'data: {"error": {"message": "no"}}\n\n'}.get(kind, b"")
        last = "length" if i == n - 1 else None
        event = json.dumps({"choices": [{key: value, "finish_reason": last}]}).encode()
        writer.write(chunk(wrong if i == 2 and wrong else b"data: " + event + b"\n\n"))
        await writer.drain()
    usage = {"prompt_tokens": 2 * len(words), "completion_tokens": n, "prompt_tokens_details": {"cached_tokens": 3}}
    end = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
    writer.write(chunk(end[:25]) + chunk(end[25:]) + b"0\r\n\r\n")


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    GAP, DELAY = map(float, sys.argv[1:])
    asyncio.run(main())
