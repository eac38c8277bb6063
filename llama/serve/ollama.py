"""Ollama's API: /api/generate, /api/chat, /api/tags and /api/version, in lines of JSON.

What twinny and many editors speak by default. `suffix` infills, a raw template is understood, and `raw` is what this
server does anyway: a prompt is no dialog unless it has a `system` message.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from llama.serve.assemble import Assembled, Parts
from llama.serve.bodies import Body, Strings, top_k_of
from llama.serve.errors import OLLAMA, described
from llama.serve.openai_api import ChatMessage
from llama.serve.replies import EventStream, ndjson, reply, unless_gone
from llama.serve.service import Ask, Call, Piece, Service


class Options(Body):
    num_predict: Annotated[int, Field(ge=-2, lt=2**31)] = -1
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    seed: int | None = None
    stop: Strings = Field(default_factory=list)
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Wishes(Body):
    model: str = ""
    stream: bool = True
    options: Options = Options()
    format: Literal["json", ""] | dict[str, Any] | None = None

    def ask(self, prompt: Assembled) -> Ask:
        given = self.options
        sampling = {
            "temperature": given.temperature, "top_k": top_k_of(given.top_k), "top_p": given.top_p,
            "min_p": given.min_p, "repetition_penalty": given.repeat_penalty,
            "presence_penalty": given.presence_penalty, "frequency_penalty": given.frequency_penalty,
        }  # fmt: skip
        limit = None if given.num_predict < 0 else given.num_predict
        return Ask([prompt], limit, sampling, given.seed, given.stop, grammar=self.wanted_grammar())

    def wanted_grammar(self) -> dict[str, Any] | None:
        if not self.format:
            return None
        return {"json_object": True} if self.format == "json" else {"json_schema": self.format}


class GenerateBody(Wishes):
    prompt: str = ""
    suffix: str = ""
    system: str = ""
    raw: bool = False
    images: list[str] = Field(default_factory=list)


class ChatTurn(ChatMessage):
    images: list[str] = Field(default_factory=list)


class ChatBody(Wishes):
    messages: list[ChatTurn] = Field(default_factory=list)
    tools: list[Any] = Field(default_factory=list)


class ShowBody(Body):
    model: str = ""
    name: str = ""


Form = Callable[[str], dict[str, Any]]
"""A text, to the field that carries it."""


def routes(service: Service) -> APIRouter:
    router, assembler = APIRouter(), service.assembler

    def head() -> dict[str, Any]:
        return {
            "model": service.model_name,
            "created_at": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z"),
        }

    async def answered(http: HTTPRequest, body: Wishes, prompt: Assembled, form: Form) -> Response:
        begun = time.monotonic()
        ask = body.ask(prompt)
        if not body.stream:
            call, [piece] = await unless_gone(http, service.collect(http, ask))
            return reply({**head(), **form(piece.text), **_ending(call, piece, begun)})
        call = await service.call(http, ask)

        async def lines() -> AsyncGenerator[bytes, None]:
            whole = Piece(0, "", [])
            try:
                async for piece in call.pieces():
                    whole.add(piece)
                    if piece.text:
                        yield ndjson({**head(), **form(piece.text), "done": False})
                yield ndjson({**head(), **form(""), **_ending(call, whole, begun)})
            except Exception as error:
                yield ndjson(OLLAMA.body(described(error)))

        return EventStream(lines(), call, "application/x-ndjson")

    def loaded(form: Form) -> Response:
        return reply({**head(), **form(""), "done": True, "done_reason": "load"})

    @router.post("/api/generate")
    async def generate(body: GenerateBody, http: HTTPRequest) -> Response:
        if body.images:
            raise ValueError("images are not supported by this model: send text")
        if not (body.prompt or body.suffix):
            return loaded(_response)
        limit, heal = max(0, body.options.num_predict), False if body.wanted_grammar() else None
        if body.suffix:
            prompt = assembler.infill(Parts(body.prompt, body.suffix), limit, stop=body.options.stop, heal=heal)
        elif body.system and not body.raw:
            turns = [{"role": "system", "content": body.system}, {"role": "user", "content": body.prompt}]
            prompt = assembler.chat(turns)
        else:
            prompt = assembler.complete(body.prompt, limit, stop=body.options.stop, heal=heal)
        return await answered(http, body, prompt, _response)

    @router.post("/api/chat")
    async def chat(body: ChatBody, http: HTTPRequest) -> Response:
        if body.tools or any(turn.images for turn in body.messages):
            raise ValueError("tools and images are not supported by this model: send text alone")
        if not body.messages:
            return loaded(_message)
        return await answered(http, body, assembler.chat([turn.plain() for turn in body.messages]), _message)

    @router.get("/api/tags")
    async def tags() -> Response:
        return reply({"models": [_described(service)]})

    @router.get("/api/ps")
    async def ps() -> Response:
        more = {"expires_at": "2318-01-01T00:00:00Z", "size_vram": 0, "context_length": service.max_seq_len}
        return reply({"models": [{**_described(service), **more}]})

    @router.post("/api/show")
    async def show(body: ShowBody) -> Response:
        capabilities = ["completion", *(["insert"] if service.tokenizer.can_infill else [])]
        facts = {
            "general.architecture": "llama", "general.parameter_count": service.facts.parameters,
            "llama.context_length": service.max_seq_len,
        }  # fmt: skip
        return reply({
            "details": _described(service)["details"], "model_info": facts, "capabilities": capabilities,
            "template": "{{ .Prompt }}", "modelfile": "", "parameters": "",
        })  # fmt: skip

    @router.get("/api/version")
    async def version() -> Response:
        return reply({"version": service.facts.version})

    return router


def _response(text: str) -> dict[str, Any]:
    return {"response": text}


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def _ending(call: Call, piece: Piece, begun: float) -> dict[str, Any]:
    """Durations are in nanoseconds."""
    timing = call.stream.timings[0]
    return {
        "done": True, "done_reason": str(piece.finish_reason), "total_duration": _ns(time.monotonic() - begun),
        "load_duration": 0, "prompt_eval_count": call.prompt_tokens, "prompt_eval_duration": _ns(timing.prefill),
        "eval_count": call.completion_tokens, "eval_duration": _ns(timing.decode),
    }  # fmt: skip


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)


def _described(service: Service) -> dict[str, Any]:
    facts = service.facts
    return {
        "name": service.model_name, "model": service.model_name, "modified_at": "2026-01-01T00:00:00Z",
        "size": facts.weights, "digest": "", "details": {
            "parent_model": "", "format": "torch", "family": "llama", "families": ["llama"],
            "parameter_size": f"{facts.parameters / 1e9:.1f}B" if facts.parameters >= 1e8 else
            f"{facts.parameters / 1e6:.1f}M", "quantization_level": facts.quantization or facts.dtype,
        },
    }  # fmt: skip
