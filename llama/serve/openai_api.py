"""OpenAI's API: completions, chat completions, models; and Mistral's and DeepSeek's endpoints for infilling.

`suffix` is real infilling. What vLLM's users send besides (top_k, min_p, repetition_penalty, ignore_eos, guided_choice
and so on) is understood, and `debug` returns the ids of prompts and answers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from llama.serve.assemble import Assembled, Assembler, Parts
from llama.serve.bodies import Body, Ids, Prompts, Strings, bias_of, each_prompt, top_k_of
from llama.serve.errors import OPENAI, described
from llama.serve.replies import DONE, MARK, EventStream, Template, reply, sse, unless_gone
from llama.serve.service import ANSWERS, Ask, Call, Piece, Service, spelled

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Answers = Annotated[int, Field(ge=1, le=ANSWERS)]
FINGERPRINT = "codellama"


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: each chunk says what has been used so far."""


class Wishes(Body):
    """What completions and chat completions share."""

    model: str = ""
    max_tokens: Count | None = None
    temperature: Number = 1.0
    top_p: Number = 1.0
    n: Answers = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Strings = Field(default_factory=list)
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: dict[str, Number] | None = None
    seed: int | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: Number = 0.0
    repetition_penalty: Number = 1.0
    stop_token_ids: Ids = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: Count = 0
    return_token_ids: bool = False
    debug: bool = False
    response_format: dict[str, Any] | None = None
    grammar: str | None = None
    guided_choice: list[str] | None = None
    guided_regex: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None

    def ask(self, prompts: list[Assembled], limit: int | None, **more: Any) -> Ask:
        sampling = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": top_k_of(self.top_k), "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "logit_bias": bias_of(self.logit_bias),
        }  # fmt: skip
        return Ask(
            prompts, limit, sampling, self.seed, self.ends, n=self.n, ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens, grammar=self.wanted_grammar(), **more,
        )  # fmt: skip

    @property
    def ends(self) -> list[str | int]:
        return [*self.stop, *self.stop_token_ids]

    def wanted_grammar(self) -> dict[str, Any] | None:
        """The language that the answer must be of, in the words of `compile_grammar`. ValueError for two of them."""
        inner = self.structured_outputs or {}
        found = {
            "choice": self.guided_choice or inner.get("choice"), "regex": self.guided_regex or inner.get("regex"),
            "json_schema": self.guided_json or inner.get("json"),
            "gbnf": self.guided_grammar or self.grammar or inner.get("grammar"),
        }  # fmt: skip
        kind = (self.response_format or {}).get("type", "text")
        if kind == "json_object":
            found["json_object"] = True
        elif kind == "json_schema":
            given = (self.response_format or {}).get("json_schema")
            schema = given.get("schema") if isinstance(given, dict) else None
            if schema is None:
                raise ValueError("response_format has no json_schema.schema: give the schema there")
            found["json_schema"] = schema
        elif kind != "text":
            raise ValueError(f"response_format is {kind!r:.40}; there are text, json_object and json_schema")
        grammar = {name: value for name, value in found.items() if value}
        if len(grammar) > 1:
            raise ValueError(f"the answer's form is given by {', '.join(grammar)}; give one of them")
        if "gbnf" in grammar and "::=" not in str(grammar["gbnf"]):
            text = str(grammar.pop("gbnf"))
            return {"lark" if "start:" in text else "regex": text}
        return grammar or None


class CompletionBody(Wishes):
    prompt: Prompts
    suffix: str | None = None
    max_tokens: Count | None = 16
    best_of: Answers | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    suffix_first: bool | None = None
    """SPM order. Ours, as is `heal`: token healing."""
    heal: bool | None = None


class FimBody(CompletionBody):
    prompt: str
    suffix: str | None = ""


class ChatMessage(Body):
    role: str
    content: str | list[dict[str, Any]] = ""
    tool_calls: list[Any] | None = None

    def plain(self) -> dict[str, str]:
        """ValueError for what is not text."""
        if self.tool_calls:
            raise ValueError("tool calls are not supported: send messages of text")
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        for part in self.content:
            if part.get("type") not in ("text", "input_text") or not isinstance(part.get("text"), str):
                raise ValueError(f"a message has a part of type {part.get('type')!r:.40}; only text is supported")
        return {"role": self.role, "content": "".join(part["text"] for part in self.content)}


class ChatBody(Wishes):
    messages: list[ChatMessage]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    continue_final_message: bool = False
    """The last message is the beginning of the answer, and the answer goes on with it. vLLM's word, and its rule that
    `add_generation_prompt` must be false then."""
    add_generation_prompt: bool = True

    def prompt(self, assembler: Assembler) -> Assembled:
        """ValueError for roles in another order, and for what is no text."""
        return chat_prompt(assembler, self.messages, self.continue_final_message, self.add_generation_prompt)


def chat_prompt(assembler: Assembler, messages: Sequence[ChatMessage], goes_on: bool, opens: bool) -> Assembled:
    """ValueError where a client asks to go on with an answer and to open another one, or for neither."""
    if goes_on == opens:
        remedy = "to go on with a begun answer give the first as true and the second as false; else leave both out"
        raise ValueError(f"continue_final_message and add_generation_prompt are both {str(opens).lower()}: {remedy}")
    return assembler.chat([message.plain() for message in messages], goes_on=goes_on)


def routes(service: Service) -> APIRouter:
    """OpenAI's endpoints, and those of others that clients of infilling use."""
    router = APIRouter()
    models = {
        "id": service.model_name, "object": "model", "created": int(time.time()), "owned_by": "codellama",
        "max_model_len": service.max_seq_len, "can_infill": service.tokenizer.can_infill,
    }  # fmt: skip

    @router.get("/v1/models")
    async def list_models() -> Response:
        return reply({"object": "list", "data": [models]})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != service.model_name:
            message = f"the model {name!r:.80} does not exist; this server has {service.model_name!r}"
            return reply({"error": {"message": message, "type": "not_found_error", "param": "model",
                                    "code": "model_not_found"}}, 404)  # fmt: skip
        return reply(models)

    @router.post("/v1/completions")
    @router.post("/beta/completions", include_in_schema=False)
    async def completions(body: CompletionBody, http: HTTPRequest) -> Response:
        return await answered(http, service, Completions(service, body))

    @router.post("/v1/fim/completions")
    @router.post("/fim/completions", include_in_schema=False)
    async def fim(body: FimBody, http: HTTPRequest) -> Response:
        return await answered(http, service, Fim(service, body))

    @router.post("/v1/chat/completions")
    @router.post("/chat/completions", include_in_schema=False)
    async def chat(body: ChatBody, http: HTTPRequest) -> Response:
        return await answered(http, service, Chat(service, body))

    return router


async def answered(http: HTTPRequest, service: Service, form: Completions | Chat) -> Response:
    """Whole, or as a stream of chunks."""
    body = form.body
    if not body.stream:
        call, pieces = await unless_gone(http, service.collect(http, form.ask))
        return reply(form.whole(call, pieces))
    call, counts = await service.call(http, form.ask), body.stream_options.continuous_usage_stats
    templates: dict[int, Template] = {}

    async def chunks() -> AsyncGenerator[bytes, None]:
        written = 0
        try:
            for first in form.opening(call):
                yield sse({**first, "usage": usage(call, 0)} if counts else first)
            async for piece in call.pieces():
                written += len(piece.tokens)
                if counts:
                    yield sse({**form.chunk(call, piece), "usage": usage(call, written)})
                elif piece.finish_reason or not form.is_plain(piece.index):
                    yield sse(form.chunk(call, piece))
                else:
                    made = templates.get(piece.index)
                    if made is None:
                        made = Template(sse(form.chunk(call, Piece(piece.index, MARK, []))))
                        templates[piece.index] = made
                    yield made(piece.text)
            if body.stream_options.include_usage:
                yield sse({**form.head, "choices": [], "usage": usage(call)})
        except Exception as error:
            yield sse(OPENAI.body(described(error)))
            return
        yield DONE

    return EventStream(chunks(), call)


def usage(call: Call, written: int | None = None) -> dict[str, Any]:
    """What a call has used at its end, or once so many tokens were sent."""
    read, written = call.prompt_tokens, call.completion_tokens if written is None else written
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": call.cached_tokens},
    }  # fmt: skip


class Completions:
    """The form of /v1/completions: an object of choices with a text."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, service: Service, body: CompletionBody) -> None:
        """ValueError for wishes that contradict each other."""
        self.service, self.body = service, body
        best_of = body.best_of or body.n
        if best_of < body.n or (best_of > body.n and body.stream):
            raise ValueError(f"best_of is {best_of} with n {body.n}; give at least n, and n where it streams")
        limit, assembler = 16 if body.max_tokens is None else body.max_tokens, service.assembler
        told: dict[str, Any] = {"heal": False if body.wanted_grammar() else body.heal, "stop": body.ends}
        self.prompts: list[Assembled] = []
        for given in each_prompt(body.prompt):
            if body.suffix is None or (body.suffix == "" and not isinstance(body, FimBody)):
                made = assembler.complete(given, limit, keep=body.truncate_prompt_tokens, **told)
            elif isinstance(given, str):
                made = assembler.infill(Parts(given, body.suffix, suffix_first=body.suffix_first), limit, **told)
            else:
                raise ValueError("suffix needs a prompt of text; this one is of ids")
            self.prompts.append(made)
        self.ask = body.ask(
            self.prompts, limit, best_of=best_of, logprobs=body.logprobs, score=body.echo and body.logprobs is not None
        )
        self.head = _head(service, self.prefix, self.chunk_kind)
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()

    def whole(self, call: Call, pieces: Sequence[Piece]) -> dict[str, Any]:
        choices = [self._choice(call, piece, True) for piece in pieces]
        head = {**self.head, "object": self.kind}
        return {**head, "choices": choices, "usage": usage(call), **self._debug(pieces)}

    def opening(self, call: Call) -> list[dict[str, Any]]:
        """The chunks before the first piece."""
        ids = self._debug(())
        return [{**self.head, "choices": [], **ids}] if ids else []

    def chunk(self, call: Call, piece: Piece) -> dict[str, Any]:
        """An echoed prompt comes with the first piece, since its log-probabilities are known then."""
        is_first = piece.index not in self._begun
        self._begun.add(piece.index)
        return {**self.head, "choices": [self._choice(call, piece, is_first)]}

    def is_plain(self, index: int) -> bool:
        """Whether the chunks of an answer differ in their text alone from now on."""
        begun = index in self._begun or not self.body.echo
        return begun and self.body.logprobs is None and not (self.body.debug or self.body.return_token_ids)

    def _prompt(self, index: int) -> Assembled:
        return self.prompts[index // self.body.n]

    def _debug(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        if not self.body.debug:
            return {}
        tokenizer = self.service.tokenizer
        told = [
            {"ids": one.prompt.tokens, "pieces": [tokenizer.token_piece(i) for i in one.prompt.tokens],
             "healed": one.healed, "cut": one.cut}
            for one in self.prompts
        ]  # fmt: skip
        return {"debug": {"prompts": told, "answers": [piece.tokens for piece in pieces]}}

    def _choice(self, call: Call, piece: Piece, is_first: bool) -> dict[str, Any]:
        echoes = self.body.echo and is_first
        prompt = self._prompt(piece.index)
        numbers = None
        if self.body.logprobs is not None:
            numbers = self._logprobs(call, piece, echoes, prompt)
        form = self._form(piece.index, (prompt.text if echoes else "") + piece.text, piece.finish_reason, numbers)
        if self.body.debug or self.body.return_token_ids:
            form["token_ids"] = piece.tokens
            if is_first:
                form["prompt_token_ids"] = prompt.prompt.tokens
        return form

    def _form(self, index: int, text: str, reason: str | None, numbers: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": numbers, "finish_reason": reason}

    def _logprobs(self, call: Call, piece: Piece, echoes: bool, prompt: Assembled) -> dict[str, Any]:
        """The older shape: parallel lists. Of an echoed prompt's tokens the alternatives are not known."""
        tokenizer, tokens = self.service.tokenizer, piece.tokens
        values: list[float | None] = list(piece.logprobs)
        top: list[Mapping[str, float] | None] = [
            {spelled(tokenizer, i)[0]: value for i, value in [*others, (token, own)]}
            for token, own, others in zip(tokens, piece.logprobs, piece.top or [[]] * len(tokens), strict=False)
        ]
        offset = self._offsets.setdefault(piece.index, len(prompt.text) - len(prompt.healed))
        if echoes:
            request = call.scored(piece.index)
            read = request.prompt.tokens
            tokens, values = [*read, *tokens], [*request.prompt_logprobs, *values]
            top, offset = [*[None] * len(read), *top], 0
        texts = [spelled(tokenizer, token)[0] for token in tokens]
        offsets = []
        for token, text in zip(tokens, texts, strict=True):
            offsets.append(offset)
            control = tokenizer.sp_model.is_control(token)
            offset += 0 if control else len(text) if not tokenizer.byte_of(token) else 1
        self._offsets[piece.index] = offset
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


class Fim(Completions):
    """Mistral's form of infilling: a chat's choices. DeepSeek's clients read `text`, so that is there as well."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "fim"

    def whole(self, call: Call, pieces: Sequence[Piece]) -> dict[str, Any]:
        found = super().whole(call, pieces)
        for choice in found["choices"]:
            choice["message"] = {"role": "assistant", "content": choice["text"]}
        return found

    def chunk(self, call: Call, piece: Piece) -> dict[str, Any]:
        found = super().chunk(call, piece)
        for choice in found["choices"]:
            choice["delta"] = {"content": choice["text"]}
        return found


class Chat:
    """The form of /v1/chat/completions: choices with a message, or with what a chunk adds to it."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        """ValueError for what can't be asked of this model: tools, images, roles in another order."""
        self.service, self.body = service, body
        if body.tools or body.functions or body.tool_choice not in (None, "none", "auto"):
            raise ValueError("tools are not supported by this model: leave tools and tool_choice out")
        prompt = body.prompt(service.assembler)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self.ask = body.ask([prompt], limit, logprobs=body.top_logprobs if body.logprobs else None)
        self.head = _head(service, "chatcmpl", "chat.completion.chunk")
        self._prompt = prompt

    def whole(self, call: Call, pieces: Sequence[Piece]) -> dict[str, Any]:
        choices = []
        for piece in pieces:
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append({"index": piece.index, "message": message, **self._rest(piece)})
        found = {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(call)}
        if self.body.debug:
            found["debug"] = self._debug([piece.tokens for piece in pieces])
        return {**found, **self._ids()}

    def opening(self, call: Call) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        rows = range(len(call.requests))
        choices = [{"index": i, "delta": first, "logprobs": None, "finish_reason": None} for i in rows]
        debug = {"debug": self._debug([])} if self.body.debug else {}
        return [{**self.head, "choices": choices, **debug, **self._ids()}]

    def chunk(self, call: Call, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        return {**self.head, "choices": [{"index": piece.index, "delta": delta, **self._rest(piece)}]}

    def is_plain(self, index: int) -> bool:
        return not (self.body.logprobs or self.body.debug or self.body.return_token_ids)

    def _debug(self, answers: list[list[int]]) -> dict[str, Any]:
        ids = self._prompt.prompt.tokens
        pieces = [self.service.tokenizer.token_piece(i) for i in ids]
        return {"prompts": [{"ids": ids, "pieces": pieces, "healed": "", "cut": 0}], "answers": answers}

    def _ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompt.prompt.tokens} if self.body.return_token_ids else {}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        rest: dict[str, Any] = {"logprobs": None, "finish_reason": piece.finish_reason}
        if self.body.logprobs:
            tops = piece.top or [[]] * len(piece.tokens)
            rest["logprobs"] = {
                "content": [
                    {**self._number(token, own), "top_logprobs": [self._number(i, value) for i, value in top]}
                    for token, own, top in zip(piece.tokens, piece.logprobs, tops, strict=False)
                ],
                "refusal": None,
            }
        if self.body.debug or self.body.return_token_ids:
            rest["token_ids"] = piece.tokens
        return rest

    def _number(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = spelled(self.service.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}


def _head(service: Service, prefix: str, kind: Literal["text_completion"] | str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.model_name,
        "system_fingerprint": FINGERPRINT,
    }  # fmt: skip
