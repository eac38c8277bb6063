"""A client of OpenAI's API for `codellama complete` and `chat --server URL`.

It is made of the standard library, so that it starts at once. It speaks to llama/serve, and to any other server of that
API.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from typing import Any

KEY = "CODELLAMA_API_KEY"
"""The environment variable with the key of a server that wants one."""


class Server:
    """A server's address. Raises ValueError, in one sentence, for whatever doesn't come back as it should."""

    def __init__(self, url: str) -> None:
        """`url` may have a path, as OpenAI's clients have it: http://127.0.0.1:8000 or http://127.0.0.1:8000/v1."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server {url!r} is no address: write it as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        models = self.get("/v1/models").get("data")
        first = models[0] if isinstance(models, list) and models and isinstance(models[0], dict) else {}
        self.model, self._longest = str(first.get("id", "")), first.get("max_model_len")

    def get(self, path: str) -> dict[str, Any]:
        with self._open(path) as answer:
            return self._read(answer)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with self._open(path, body) as answer:
            return self._read(answer)

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer. Whoever closes the generator ends the request."""
        answer = self._open(path, {"model": self.model, "stream": True, **body})
        return self._events(answer)

    def _events(self, answer: http.client.HTTPResponse) -> Generator[dict[str, Any], None, None]:
        broken = f"{self.url} broke off in the middle of an answer"
        with answer:
            lines, ended = iter(answer), False
            while True:
                try:
                    line = next(lines, b"")
                except (OSError, http.client.HTTPException) as error:
                    raise ValueError(f"{broken} ({str(error) or type(error).__name__})") from None
                data = line.strip().removeprefix(b"data:").strip()
                if not line or data == b"[DONE]":
                    break
                if not line.startswith(b"data:"):
                    continue
                event = _parsed(data)
                if event is None:
                    raise ValueError(f"{broken}: a part of it is no JSON object")
                if event.get("error"):
                    raise ValueError(f"{self.url} failed: {_message(event) or 'it gave no reason'}")
                choices = event.get("choices") or ()
                ended = ended or any(choice.get("finish_reason") for choice in choices)
                yield event
            if not (line or ended):  # some servers end without [DONE]
                raise ValueError(f"{broken}: start it again, and ask once more")

    def context(self) -> int | None:
        """Tokens that it has room for, where it says so."""
        if isinstance(self._longest, int):
            return self._longest
        try:
            found = self.get("/props").get("default_generation_settings", {}).get("n_ctx")
        except ValueError:
            return None
        return found if isinstance(found, int) else None

    def length(self, messages: Sequence[Mapping[str, Any]], begun: str = "") -> int | None:
        """Tokens of a dialog and the beginning of its answer, where the server can say so."""
        try:
            found = self.post("/apply-template", dialog(messages, begun))
            if isinstance(tokens := found.get("tokens"), list):
                return len(tokens)
            return len(self.post("/tokenize", {"content": found["prompt"], "add_special": True})["tokens"])
        except (ValueError, KeyError, TypeError):
            return None

    def _read(self, answer: http.client.HTTPResponse) -> dict[str, Any]:
        try:
            found = _parsed(answer.read())
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{self.url} broke off in the middle of an answer ({error})") from None
        if found is None:
            raise ValueError(f"{self.url} is no server of OpenAI's API: its answer is no JSON object")
        return found

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY, ""):
            if not (key.isascii() and key.isprintable()):
                raise ValueError(f"the key in {KEY} has characters that no key has: give letters, digits and signs")
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=600)
            return answer
        except urllib.error.HTTPError as error:
            told = b""
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                told = error.read()
            reason = _message(_parsed(told))
            key = f"; put the server's key into the environment variable {KEY}" if error.code == 401 else ""
            raise ValueError(f"{self.url} refuses it ({reason or error.reason}){key}") from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            found = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = found.strerror if isinstance(found, OSError) and found.strerror else str(found)
            remedy = "start `codellama serve`, or correct the address"
            raise ValueError(f"{self.url} can't be reached ({reason}): {remedy}") from None


def dialog(messages: Sequence[Mapping[str, Any]], begun: str) -> dict[str, Any]:
    """The fields of a dialog, with an answer to go on with as vLLM wants it."""
    if not begun:
        return {"messages": list(messages)}
    more = [*messages, {"role": "assistant", "content": begun}]
    return {"messages": more, "continue_final_message": True, "add_generation_prompt": False}


def _parsed(data: bytes) -> dict[str, Any] | None:
    """A JSON object; None for all else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _message(found: Any) -> str:
    """The sentence in an error of OpenAI's shape, or of TGI's."""
    error = found.get("error", "") if isinstance(found, dict) else ""
    return str(error.get("message", "") if isinstance(error, dict) else error)
