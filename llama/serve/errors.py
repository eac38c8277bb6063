"""Errors: what went wrong, in the words of each API.

An error is described once (its kind, a status, a sentence), and each API has a shape for it. Which API a client speaks
follows from the path that it asked for, since most errors happen before anybody has looked at its body.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from llama.errors import LostRank, NotFinite, PromptTooLong, QueueFull
from llama.serve.engine import Draining, Expired
from llama.serve.service import Refused


@dataclass(frozen=True)
class Described:
    kind: str
    """validation, too_long, unauthorized, not_found, method, too_large, slow, overloaded, unavailable, timeout,
    generation, filtered or internal."""
    status: int
    message: str
    param: str | None = None


KINDS = {400: "validation", 401: "unauthorized", 404: "not_found", 405: "method", 408: "slow", 413: "too_large"}


def described(error: Exception) -> Described:
    """What an exception is to a client. Of one that is a defect of the server, it hears nothing but that."""
    text = str(error)
    if isinstance(error, QueueFull):
        return Described("overloaded", 429, text)
    if isinstance(error, (Draining, LostRank)):
        return Described("unavailable", 503, text)
    if isinstance(error, Expired):
        return Described("timeout", 504, text)
    if isinstance(error, NotFinite):
        return Described("generation", 500, text)
    if isinstance(error, Refused):
        return Described("filtered", 400, text, "prompt")
    if isinstance(error, PromptTooLong):
        return Described("too_long", 400, text, "prompt")
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return Described(KINDS.get(error.status_code, "validation"), error.status_code, str(error.detail))
    if isinstance(error, ValueError):
        first = text.partition(" ")[0]
        return Described("validation", 400, text, first if first.isidentifier() and "_" in first else None)
    return Described("internal", 500, f"the server failed ({type(error).__name__}); its log says more")


def _invalid(error: RequestValidationError) -> Described:
    """The first thing that is wrong with a body, and where."""
    first = error.errors()[0] if error.errors() else {"loc": ("body",), "msg": "it can't be read", "type": ""}
    if first.get("type") == "json_invalid":
        return Described("validation", 400, "the body is not JSON")
    union = re.compile(r"str|int|bool|dict|.*[\[(].*")  # pydantic's names for the ways of a union
    place = [str(part) for part in first["loc"][1:] if not union.fullmatch(str(part))]
    where, kinds = ".".join(place), sorted({str(one["msg"]) for one in error.errors()[:4]})
    message = "; ".join(kinds) if kinds else "it can't be read"
    if not where:
        return Described("validation", 400, f"the body is not what this endpoint takes ({message}): send a JSON object")
    return Described("validation", 400, f"{where}: {message}", place[0])


@dataclass(frozen=True)
class Shape:
    """How an API says it."""

    name: str
    body: Callable[[Described], dict[str, Any]]
    statuses: Mapping[str, int] = field(default_factory=dict)
    """Where they differ from the usual ones, by the kind."""

    def status(self, error: Described) -> int:
        return self.statuses.get(error.kind, error.status)


_OPENAI_TYPES = {
    "unauthorized": ("authentication_error", "invalid_api_key"),
    "not_found": ("not_found_error", "not_found"),
    "too_long": ("invalid_request_error", "context_length_exceeded"),
    "overloaded": ("rate_limit_error", "queue_full"),
    "unavailable": ("server_error", "shutting_down"),
    "timeout": ("server_error", "timeout"),
    "generation": ("server_error", "not_finite"),
    "internal": ("server_error", None),
    "filtered": ("invalid_request_error", "content_filter"),
}


def _openai(error: Described) -> dict[str, Any]:
    kind, code = _OPENAI_TYPES.get(error.kind, ("invalid_request_error", None))
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


_LLAMACPP_TYPES = {
    "unauthorized": "authentication_error",
    "not_found": "not_found_error",
    "too_long": "exceed_context_size_error",
    "overloaded": "unavailable_error",
    "unavailable": "unavailable_error",
    "timeout": "server_error",
    "generation": "server_error",
    "internal": "server_error",
}


def _tgi(error: Described) -> dict[str, Any]:
    kind = {"internal": "generation", "filtered": "validation", "too_long": "validation"}.get(error.kind, error.kind)
    return {"error": error.message, "error_type": kind}


OPENAI = Shape("openai", _openai)
TGI = Shape("tgi", _tgi, {"validation": 422, "too_long": 422, "filtered": 422, "generation": 424})
OLLAMA = Shape("ollama", lambda error: {"error": error.message})


def _llamacpp(error: Described) -> dict[str, Any]:
    kind = _LLAMACPP_TYPES.get(error.kind, "invalid_request_error")
    return {"error": {"code": error.status, "message": error.message, "type": kind}}


LLAMACPP = Shape("llama.cpp", _llamacpp)
_FIRST = {
    "generate": TGI, "generate_stream": TGI, "info": TGI, "": TGI, "api": OLLAMA,
    "infill": LLAMACPP, "completion": LLAMACPP, "completions": LLAMACPP, "tokenize": LLAMACPP,
    "detokenize": LLAMACPP, "apply-template": LLAMACPP, "props": LLAMACPP, "health": LLAMACPP,
}  # fmt: skip
"""The API of a path, by its first part; any other is OpenAI's."""


def shape_of(path: str) -> Shape:
    return _FIRST.get(path.strip("/").partition("/")[0], OPENAI)
