"""The API of Hugging Face's Text Generation Inference: /generate, /generate_stream, / and /info.

Every token is an event of a stream. The last event has the whole text and why it ended. A token that ends an answer
has no text here: ` <EOT>` and `</s>` are nothing that a client wants to see.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from llama.serve.assemble import Assembled
from llama.serve.bodies import Body, Strings, top_k_of
from llama.serve.errors import TGI, described
from llama.serve.replies import EventStream, reply, sse, unless_gone
from llama.serve.service import STOPS, Ask, Call, Piece, Service, likelihood, spelled

MOST_TOP = 20
MOST_BEST_OF = 8


class Parameters(Body):
    best_of: Annotated[int, Field(ge=1, le=MOST_BEST_OF)] = 1
    decoder_input_details: bool = False
    details: bool = False
    do_sample: bool = False
    frequency_penalty: float = 0.0
    grammar: dict[str, Any] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    return_full_text: bool = False
    seed: int | None = None
    stop: Strings = Field(default_factory=list)
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    watermark: bool = False

    @property
    def samples(self) -> bool:
        return self.do_sample or any(x is not None for x in (self.temperature, self.top_k, self.top_p))


class GenerateBody(Body):
    inputs: str
    parameters: Parameters = Parameters()


class CompatBody(GenerateBody):
    stream: bool = False


class Generation:
    """One request of this API, and the forms of its answers."""

    def __init__(self, service: Service, body: GenerateBody, streams: bool) -> None:
        """ValueError for wishes that can't be met."""
        self.service, self.body, given = service, body, body.parameters
        if given.typical_p not in (None, 1.0) or given.watermark:
            raise ValueError("typical_p and watermark are not supported: leave them out")
        if streams and (given.best_of > 1 or given.decoder_input_details):
            raise ValueError("best_of and decoder_input_details can't be streamed: use /generate")
        if given.best_of > 1 and not given.samples:
            raise ValueError("best_of needs sampling: set do_sample, or a temperature")
        stop = given.stop
        limit = given.max_new_tokens
        grammar = None if given.grammar is None else _grammar(given.grammar)
        self.prompt: Assembled = service.assembler.complete(
            body.inputs, limit or 0, keep=given.truncate, stop=stop, heal=False if grammar else None
        )
        sampling = {
            "temperature": (given.temperature or 1.0) if given.samples else 0.0,
            "top_p": 1.0 if given.top_p is None else given.top_p, "top_k": top_k_of(given.top_k),
            "repetition_penalty": given.repetition_penalty, "frequency_penalty": given.frequency_penalty,
        }  # fmt: skip
        self.details = given.details or given.decoder_input_details
        self.ask = Ask(
            [self.prompt], limit, sampling, given.seed, stop, n=given.best_of, grammar=grammar,
            logprobs=given.top_n_tokens, score=given.decoder_input_details,
        )  # fmt: skip

    def whole(self, call: Call, pieces: list[Piece]) -> dict[str, Any]:
        pieces = sorted(pieces, key=likelihood, reverse=True)
        best = pieces[0]
        found: dict[str, Any] = {"generated_text": self._text(best.text)}
        if self.details:
            found["details"] = {**self._ending(call, best), **self._tokens(best), "prefill": self._prefill(call)}
            if self.ask.n > 1:
                rest = pieces[1:]
                found["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(one.text), **self._ending(call, one), **self._tokens(one)}
                    for one in rest
                ]
        return found

    def events(self, call: Call, piece: Piece, before: Piece) -> list[dict[str, Any]]:
        """One for each token of a piece; the text of several stands with the first. `before` holds what has come, and
        the piece already."""
        tokens = self._tokens(piece)
        each = [
            {"token": {**token, "text": piece.text if i == 0 else ""}, "top_tokens": top}
            for i, (token, top) in enumerate(zip(tokens["tokens"], tokens["top_tokens"], strict=True))
        ]
        if not each:
            end = self.service.tokenizer.eos_id
            each = [
                {"token": {"id": end, "text": piece.text, "logprob": 0.0, "special": not piece.text}, "top_tokens": []}
            ]
        written = len(before.tokens) - len(piece.tokens)
        found = [
            {"index": written + i + 1, **one, "generated_text": None, "details": None} for i, one in enumerate(each)
        ]
        if piece.finish_reason:
            details = {**self._ending(call, before), "input_length": call.prompt_tokens}
            found[-1] |= {"generated_text": self._text(before.text), "details": details}
        return found

    def _text(self, text: str) -> str:
        return self.prompt.text + text if self.body.parameters.return_full_text else text

    def _ending(self, call: Call, piece: Piece) -> dict[str, Any]:
        request = call.requests[piece.index]
        reason = {"stop": "eos_token"}.get(str(piece.finish_reason), str(piece.finish_reason))
        if reason == "eos_token" and request.stop_strings.found:
            reason = "stop_sequence"
        seed = request.sampling.seed if request.sampling.temperature else None
        return {"finish_reason": reason, "generated_tokens": len(piece.tokens), "seed": seed}

    def _tokens(self, piece: Piece) -> dict[str, Any]:
        found = [self._token(i, value) for i, value in zip(piece.tokens, piece.logprobs, strict=True)]
        tops = piece.top or [[]] * len(found)
        return {"tokens": found, "top_tokens": [[self._token(i, value) for i, value in top] for top in tops]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = spelled(self.service.tokenizer, token)[0]
        special = self.service.tokenizer.sp_model.is_control(token)
        return {"id": token, "text": "" if special else text, "logprob": logprob, "special": special}

    def _prefill(self, call: Call) -> list[dict[str, Any]]:
        if not self.body.parameters.decoder_input_details:
            return []
        request = call.requests[0]
        pairs = zip(request.prompt.tokens, request.prompt_logprobs, strict=True)
        return [{"id": i, "text": spelled(self.service.tokenizer, i)[0], "logprob": value} for i, value in pairs]


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def whole(http: HTTPRequest, body: GenerateBody, as_list: bool) -> Response:
        begun = time.monotonic()
        form = Generation(service, body, False)
        call, pieces = await unless_gone(http, service.collect(http, form.ask))
        found = form.whole(call, pieces)
        return reply([found] if as_list else found, headers=_timing(service, call, body, begun))

    async def streamed(http: HTTPRequest, body: GenerateBody) -> Response:
        form = Generation(service, body, True)
        call = await service.call(http, form.ask)

        async def events() -> AsyncGenerator[bytes, None]:
            before = Piece(0, "", [])
            try:
                async for piece in call.pieces():
                    before.add(piece)
                    for event in form.events(call, piece, before):
                        yield sse(event)
            except Exception as error:
                yield sse(TGI.body(described(error)))

        return EventStream(events(), call)

    @router.post("/generate")
    async def generate(body: GenerateBody, http: HTTPRequest) -> Response:
        return await whole(http, body, False)

    @router.post("/generate_stream")
    async def generate_stream(body: GenerateBody, http: HTTPRequest) -> Response:
        return await streamed(http, body)

    @router.post("/")
    async def compat(body: CompatBody, http: HTTPRequest) -> Response:
        return await streamed(http, body) if body.stream else await whole(http, body, True)

    @router.get("/info")
    async def info() -> Response:
        engine, facts = service.engine, service.facts
        most = service.max_seq_len
        return reply({
            "model_id": service.model_name, "model_sha": None, "model_dtype": facts.dtype, "model_pipeline_tag": None,
            "model_device_type": facts.device, "max_concurrent_requests": engine.rows + engine.max_queue,
            "max_best_of": MOST_BEST_OF, "max_stop_sequences": STOPS, "max_input_tokens": most - 1,
            "max_input_length": most - 1, "max_total_tokens": most, "max_client_batch_size": 1,
            "validation_workers": 1, "router": "codellama", "version": facts.version, "sha": None,
            "docker_label": None,
        })  # fmt: skip

    return router


def _grammar(given: dict[str, Any]) -> dict[str, Any]:
    kind = given.get("type")
    if kind not in ("json", "regex", "json_schema") or "value" not in given:
        raise ValueError(f"grammar is {given!r:.80}; give a type, json or regex, and a value")
    value = given["value"]
    if kind == "json_schema":
        value = value.get("schema") if isinstance(value, dict) else value
    return {"regex" if kind == "regex" else "json_schema": value}


def _timing(service: Service, call: Call, body: GenerateBody, begun: float) -> dict[str, str]:
    """TGI's headers, in milliseconds."""
    timing, written = call.stream.timings[0], max(1, call.completion_tokens)
    total = time.monotonic() - begun
    seconds = {
        "total": total, "validation": timing.joined - begun, "queue": timing.queue,
        "inference": total - timing.queue, "time-per-token": (total - timing.queue) / written,
    }  # fmt: skip
    found = {f"x-{k}-time" if k != "time-per-token" else f"x-{k}": str(round(1e3 * s)) for k, s in seconds.items()}
    return found | {
        "x-compute-type": service.facts.device, "x-compute-characters": str(len(body.inputs)),
        "x-prompt-tokens": str(call.prompt_tokens), "x-generated-tokens": str(call.completion_tokens),
    }  # fmt: skip
