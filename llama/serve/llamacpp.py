"""The API of llama.cpp's server: /infill, /completion, /tokenize, /detokenize, /apply-template, /props and /health.

/infill is what llama.vscode and llama.vim use. Their `prompt` is the part of the cursor's line that is written already,
and their extra context stands before <PRE>. `n_predict` 0 reads the prompt into the cache, so that a later request with
the same beginning starts at once.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from llama.serve.assemble import Assembled, Parts
from llama.serve.bodies import Body, Ids, Strings, bias_of, top_k_of
from llama.serve.errors import LLAMACPP, Described, described
from llama.serve.openai_api import ChatMessage, chat_prompt
from llama.serve.replies import EventStream, reply, sse, unless_gone
from llama.serve.service import ANSWERS, Ask, Call, Piece, Service, spelled

Part = str | Annotated[int, Field(ge=0, lt=2**31, strict=True)]


class Options(Body):
    """What /completion and /infill share."""

    n_predict: Annotated[int, Field(ge=-2, lt=2**31)] = -1
    n_cmpl: Annotated[int, Field(ge=1, le=ANSWERS)] = 1
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = -1
    stop: Strings = Field(default_factory=list)
    stream: bool = False
    logit_bias: Any = None
    ignore_eos: bool = False
    n_probs: Annotated[int, Field(ge=0, le=20)] = 0
    return_tokens: bool = False
    cache_prompt: bool = True
    n_indent: Annotated[int, Field(ge=0)] = 0
    t_max_predict_ms: float = 0.0
    timings_per_token: bool = False
    response_fields: list[str] = Field(default_factory=list)
    grammar: str = ""
    json_schema: dict[str, Any] | None = None
    id_slot: int = -1

    def ask(self, prompt: Assembled) -> Ask:
        sampling = {
            "temperature": max(0.0, self.temperature), "top_k": top_k_of(self.top_k), "top_p": self.top_p,
            "min_p": self.min_p, "repetition_penalty": self.repeat_penalty, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "logit_bias": _bias(self.logit_bias),
        }  # fmt: skip
        limit = None if self.n_predict < 0 else max(1, self.n_predict)
        return Ask(
            [prompt], limit, sampling, None if self.seed < 0 else self.seed, self.stop, n=self.n_cmpl,
            logprobs=self.n_probs or None, reuse=self.cache_prompt, ignore_eos=self.ignore_eos,
            grammar=self.wanted_grammar(),
        )  # fmt: skip

    def wanted_grammar(self) -> dict[str, Any] | None:
        if self.json_schema is not None:
            return {"json_schema": self.json_schema}
        return {"gbnf": self.grammar} if self.grammar else None


class CompletionBody(Options):
    prompt: str | list[Part]


class Extra(Body):
    filename: str = ""
    text: str


class InfillBody(Options):
    input_prefix: str
    input_suffix: str
    input_extra: list[Extra] = Field(default_factory=list)
    prompt: str = ""


class TokenizeBody(Body):
    content: str | None = None
    prompt: str | None = None
    """vLLM's word for it, as `inputs` is TGI's."""
    inputs: str | None = None
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeBody(Body):
    tokens: Ids


class TemplateBody(Body):
    messages: list[ChatMessage]
    continue_final_message: bool = False
    """As /v1/chat/completions takes it."""
    add_generation_prompt: bool = True


class Writing:
    """One request of this API: its pieces are cut where a line is not indented enough or the time is over."""

    def __init__(self, service: Service, body: Options, prompt: Assembled) -> None:
        self.service, self.body, self.prompt, self.ask = service, body, prompt, body.ask(prompt)
        self.limited: set[int] = set()
        """Answers that were cut."""

    async def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        seen: dict[int, str] = {}
        shown: dict[int, int] = {}
        async for piece in call.pieces():
            i = piece.index
            if i in self.limited:
                continue
            if self.body.n_predict == 0:  # it is read, and nothing is wanted of it
                piece.text, piece.tokens, piece.logprobs, piece.top = "", [], [], []
            seen[i] = seen.get(i, "") + piece.text
            kept = indented(seen[i], self.body.n_indent)
            timing = call.stream.timings[i]
            spent = 1e3 * (time.monotonic() - timing.first) if timing.first else 0.0
            late = 0 < self.body.t_max_predict_ms < spent and "\n" in seen[i]
            if late or len(kept) < len(seen[i]):
                call.stream.leave(i)
                piece.finish_reason = "length"
                self.limited.add(i)
            elif self.body.n_indent and not piece.finish_reason:
                kept = _begun_lines(kept)
            piece.text = kept[shown.get(i, 0) :]
            shown[i] = max(len(kept), shown.get(i, 0))
            yield piece

    async def collect(self, http: HTTPRequest) -> tuple[Call, list[Piece]]:
        call = await self.service.call(http, self.ask)
        found = [Piece(i, "", []) for i in range(self.body.n_cmpl)]
        async for piece in self.pieces(call):
            found[piece.index].add(piece)
        return call, found

    def end(self, call: Call, piece: Piece, content: str) -> dict[str, Any]:
        """The last object of an answer: `piece` holds all of it, and `content` is what a client hasn't got yet."""
        request, body = call.requests[piece.index], self.body
        word = _stopping_word(self.service, request.answer, body.stop) if request.stop_strings.found else ""
        kinds = {"stop": "word" if word else "eos", "length": "limit"}
        settings = {**body.model_dump(include=set(Options.model_fields)), "n_ctx": self.service.max_seq_len}
        found = {
            "index": piece.index, "content": content, "tokens": piece.tokens if body.return_tokens else [],
            "id_slot": body.id_slot, "stop": True, "model": self.service.model_name,
            "tokens_predicted": len(piece.tokens), "tokens_evaluated": call.prompt_tokens,
            "generation_settings": settings, "prompt": self.prompt.text, "has_new_line": "\n" in piece.text,
            "truncated": self.prompt.cut > 0, "stop_type": kinds.get(str(piece.finish_reason), "none"),
            "stopping_word": word, "tokens_cached": call.prompt_tokens + len(piece.tokens),
            "timings": _timings(call, piece),
        }  # fmt: skip
        if piece.finish_reason == "content_filter":
            found["error"] = "the answer was refused by this server's filter"
        if body.n_probs:
            found["completion_probabilities"] = self._probs(piece)
        return _only(found, body.response_fields)

    def part(self, call: Call, piece: Piece, written: int) -> dict[str, Any]:
        found = {
            "index": piece.index, "content": piece.text, "tokens": piece.tokens, "stop": False,
            "id_slot": self.body.id_slot, "tokens_predicted": written, "tokens_evaluated": call.prompt_tokens,
        }  # fmt: skip
        if self.body.n_probs:
            found["completion_probabilities"] = self._probs(piece)
        if self.body.timings_per_token:
            found["timings"] = _timings(call, piece)
        return found

    def _probs(self, piece: Piece) -> list[dict[str, Any]]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            text, data = spelled(self.service.tokenizer, token)
            return {"id": token, "token": text, "bytes": list(data), "logprob": logprob}

        tops = piece.top or [[]] * len(piece.tokens)
        return [
            {**told(token, own), "top_logprobs": [told(i, value) for i, value in top]}
            for token, own, top in zip(piece.tokens, piece.logprobs, tops, strict=False)
        ]


def indented(text: str, n_indent: int) -> str:
    """The text up to the first of its lines, after the one that it begins in, with less than so much white space."""
    at = text.find("\n") if n_indent else -1
    while at >= 0:
        end = text.find("\n", at + 1)
        line = text[at + 1 : len(text) if end < 0 else end]
        if line.strip() and len(line) - len(line.lstrip()) < n_indent:
            return text[:at]
        at = end
    return text


def _begun_lines(text: str) -> str:
    """Without a last line of which nothing but white space has come: how far it is indented isn't known yet."""
    stripped = text.rstrip()
    at = text.find("\n", len(stripped))
    return text if at < 0 else text[:at]


def routes(service: Service) -> APIRouter:
    router, assembler, tokenizer = APIRouter(), service.assembler, service.tokenizer

    async def answered(http: HTTPRequest, body: Options, prompt: Assembled) -> Response:
        writing = Writing(service, body, prompt)
        if not body.stream:
            call, pieces = await unless_gone(http, writing.collect(http))
            found = [writing.end(call, piece, piece.text) for piece in pieces]
            return reply(found[0] if body.n_cmpl == 1 else found)
        call = await service.call(http, writing.ask)

        async def parts() -> AsyncGenerator[bytes, None]:
            whole = [Piece(i, "", []) for i in range(body.n_cmpl)]
            try:
                async for piece in writing.pieces(call):
                    own = whole[piece.index]
                    own.add(piece)
                    if piece.text or piece.tokens:
                        yield sse(writing.part(call, piece, len(own.tokens)))
                    if piece.finish_reason:
                        yield sse(writing.end(call, own, ""))
            except Exception as error:
                yield sse(LLAMACPP.body(described(error)))

        return EventStream(parts(), call)

    @router.post("/completion")
    @router.post("/completions", include_in_schema=False)
    async def completion(body: CompletionBody, http: HTTPRequest) -> Response:
        """A text, ids, or a list of both."""
        told: dict[str, Any] = {"stop": body.stop, "heal": False if body.wanted_grammar() else None}
        if isinstance(body.prompt, str):
            prompt = assembler.complete(body.prompt, max(0, body.n_predict), **told)
        else:
            ids: list[int] = []
            for i, part in enumerate(body.prompt):
                text = isinstance(part, str)
                first = tokenizer.encode(str(part), True, False) if text and i == 0 else None
                ids += first or (tokenizer.encode_infilling(str(part)) if text else [int(part)])
            prompt = assembler.complete(ids)
        return await answered(http, body, prompt)

    @router.post("/infill")
    async def infill(body: InfillBody, http: HTTPRequest) -> Response:
        extra = "".join(
            f"# {one.filename}\n{one.text}\n" if one.filename else f"{one.text}\n" for one in body.input_extra
        )
        parts = Parts(body.input_prefix, body.input_suffix, body.prompt)
        heal = False if body.wanted_grammar() else None
        prompt = assembler.infill(parts, max(0, body.n_predict), extra=extra, stop=body.stop, heal=heal)
        return await answered(http, body, prompt)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        given = [text for text in (body.content, body.prompt, body.inputs) if text is not None]
        if len(given) != 1:
            raise ValueError("give the text as `content`")
        ids = tokenizer.encode(given[0], body.add_special, False)
        # An incomplete character is the list of its bytes.
        pieces = [
            {"id": i, "piece": list(data) if (data := tokenizer.byte_of(i)) else spelled(tokenizer, i)[0]} for i in ids
        ]
        found: dict[str, Any] = {"tokens": pieces if body.with_pieces else ids}
        return reply({**found, "count": len(ids), "max_model_len": service.max_seq_len})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        wrong = [i for i in body.tokens if i >= tokenizer.n_words]
        if wrong:
            raise ValueError(f"tokens has {wrong[0]}; ids are 0 to {tokenizer.n_words - 1}")
        text = tokenizer.decode(body.tokens)
        return reply({"content": text, "prompt": text})

    @router.post("/apply-template")
    async def apply_template(body: TemplateBody) -> Response:
        prompt = chat_prompt(assembler, body.messages, body.continue_final_message, body.add_generation_prompt)
        return reply({"prompt": _rendered(service, prompt.prompt.tokens), "tokens": prompt.prompt.tokens})

    @router.get("/props")
    async def props() -> Response:
        defaults = Options().model_dump()
        return reply({
            "default_generation_settings": {"n_ctx": service.max_seq_len, "params": defaults},
            "total_slots": service.engine.rows, "model_path": service.facts.path or service.model_name,
            "model_alias": service.model_name, "chat_template": "", "modalities": {"vision": False, "audio": False},
            "build_info": f"codellama {service.facts.version}", "can_infill": tokenizer.can_infill,
        })  # fmt: skip

    @router.get("/health")
    async def health() -> Response:
        """Whether the process does its work: 503 once it can't any more."""
        if service.engine.lost is not None:
            error = Described("unavailable", 503, str(service.engine.lost))
            return reply(LLAMACPP.body(error), 503)
        return reply({"status": "ok"})

    @router.get("/health/ready")
    async def ready() -> Response:
        """Whether it takes requests: 503 while it starts and while it drains."""
        if not service.engine.is_ready:
            why = "shutting down" if service.engine.draining else "Loading model"
            return reply(LLAMACPP.body(Described("unavailable", 503, why)), 503)
        return reply({"status": "ok"})

    return router


def _rendered(service: Service, ids: list[int]) -> str:
    """Ids as a text in which control pieces and marks can be seen."""
    found, plain = "", list[int]()
    for token in [*ids, service.tokenizer.bos_id]:
        if service.tokenizer.sp_model.is_control(token) or token == service.tokenizer.step_id:
            found += service.tokenizer.decode(plain) if plain else ""
            found, plain = found + service.tokenizer.token_piece(token), []
        else:
            plain.append(token)
    return found.removesuffix(service.tokenizer.token_piece(service.tokenizer.bos_id))


def _bias(given: Any) -> dict[int, float] | None:
    """An object, or a list of pairs; false for never."""
    if not isinstance(given, list):
        return bias_of(given if isinstance(given, Mapping) else None)
    found = {}
    for pair in given:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int)):
            raise ValueError(f"logit_bias has {pair!r:.80}; give pairs of a token's id and a number")
        found[pair[0]] = -1e9 if pair[1] is False else pair[1]
    return found


def _stopping_word(service: Service, answer: list[int], stop: list[str]) -> str:
    text = service.tokenizer.decode_infilling(answer)
    found = [(text.find(word) + len(word), text.find(word), word) for word in stop if word in text]
    return min(found)[2] if found else ""


def _timings(call: Call, piece: Piece) -> dict[str, Any]:
    timing, request = call.stream.timings[piece.index], call.requests[piece.index]
    cached = max(0, request.reused)
    read, written = len(request.prompt.tokens) - cached, len(piece.tokens)
    prompt_ms, predicted_ms = 1e3 * timing.prefill, 1e3 * timing.decode
    return {
        "cache_n": cached, "prompt_n": read, "prompt_ms": prompt_ms, "prompt_per_token_ms": prompt_ms / max(1, read),
        "prompt_per_second": 1e3 * read / prompt_ms if prompt_ms else 0.0, "predicted_n": written,
        "predicted_ms": predicted_ms, "predicted_per_token_ms": predicted_ms / max(1, written),
        "predicted_per_second": 1e3 * written / predicted_ms if predicted_ms else 0.0,
    }  # fmt: skip


def _only(found: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """`response_fields`: paths of what is wanted, such as generation_settings/n_predict."""
    if not fields:
        return found
    chosen: dict[str, Any] = {}
    for path in fields:
        value: Any = found
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            chosen[path.rpartition("/")[2]] = value
    return chosen
