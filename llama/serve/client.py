"""A client of OpenAI's API for `codellama complete` and `chat --server URL`.

It is made of the standard library, so that it starts at once. It speaks to llama/serve, and to any other server of that
API.
"""

from __future__ import annotations

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
        models = self.get("/v1/models").get("data") or [{}]
        self.model = str(models[0].get("id", ""))
        self._longest = models[0].get("max_model_len")

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
        with answer:
            try:
                for line in answer:
                    data = line.strip().removeprefix(b"data: ")
                    if not line.startswith(b"data: ") or data == b"[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ValueError(_message(event) or f"{self.url} ended with an error")
                    yield event
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                raise ValueError(f"{self.url} broke off in the middle of an answer ({error})") from None

    def context(self) -> int | None:
        """Tokens that it has room for, where it says so."""
        if isinstance(self._longest, int):
            return self._longest
        try:
            found = self.get("/props").get("default_generation_settings", {}).get("n_ctx")
        except ValueError:
            return None
        return found if isinstance(found, int) else None

    def length(self, messages: Sequence[Mapping[str, Any]]) -> int | None:
        """Tokens of a dialog, where the server can say so."""
        try:
            return self.tokens(str(self.post("/apply-template", {"messages": list(messages)})["prompt"]))
        except (ValueError, KeyError):
            return None

    def tokens(self, text: str) -> int | None:
        """Of a text, the mark at its beginning included, where the server can say so."""
        try:
            return len(self.post("/tokenize", {"content": text})["tokens"]) + 1
        except (ValueError, KeyError, TypeError):
            return None

    def _read(self, answer: http.client.HTTPResponse) -> dict[str, Any]:
        try:
            found = json.load(answer)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{self.url} is no server of OpenAI's API: its answer is no JSON object")
        return found

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=600)
            return answer
        except urllib.error.HTTPError as error:
            with error:
                told = error.read()
            try:
                reason = _message(json.loads(told))
            except ValueError:
                reason = ""
            key = f"; put the server's key into the environment variable {KEY}" if error.code == 401 else ""
            raise ValueError(f"{self.url} refuses it ({reason or error.reason}){key}") from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            reason = str(error.reason if isinstance(error, urllib.error.URLError) else error)
            raise ValueError(f"{self.url} can't be reached ({reason}): start `codellama serve`, or look to the address"
                             ) from None  # fmt: skip


def _message(found: Any) -> str:
    """The sentence in an error of OpenAI's shape, or of TGI's."""
    error = found.get("error", "") if isinstance(found, dict) else ""
    return str(error.get("message", "") if isinstance(error, dict) else error)
