"""The class that Hugging Face's Inference Endpoints look for in a repository's `handler.py`.

An endpoint with a custom handler calls `EndpointHandler(path)` once with the repository's folder, and then the object
with each request's JSON. So a repository with weights needs a `handler.py` of one line, and `codellama[serve]` in its
`requirements.txt`:

    from llama.serve.handler import EndpointHandler

The parameters are those of Text Generation Inference. One request is answered at a time; for a server that computes
several side by side, run `codellama serve` in a container of your own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from typing_extensions import Unpack

from llama.front import load
from llama.options import Loading
from llama.requests import Request
from llama.sampling import Sampling
from llama.serve.assemble import Assembled, Assembler
from llama.serve.bodies import top_k_of
from llama.serve.tgi import Parameters


class EndpointHandler:
    """Answers {"inputs": text, "parameters": {...}} with [{"generated_text": ...}].

    `inputs` may be a list of texts, or a list of messages with a role and a content. A text may be infilled: with
    `<FILL_ME>`, or in the form `<PRE> prefix <SUF>suffix <MID>`. With `details`, an answer says how it ended.
    """

    def __init__(self, path: str = "", **loading: Unpack[Loading]) -> None:
        """`path` is a checkpoint's folder ("": the embedded checkpoint). What `llama.load` takes may be given by a
        class of your own that calls this one."""
        given: dict[str, Any] = {"max_batch_size": 1, "max_seq_len": None, **loading}
        self.llama = load(path or None, **given)
        self.assembler = Assembler(self.llama.tokenizer, self.llama.model.args.max_seq_len)

    def __call__(self, data: Mapping[str, Any]) -> list[Any]:
        """ValueError, which the endpoint sends as a 400, for what can't be answered."""
        inputs = data.get("inputs")
        parameters = _parameters(data.get("parameters") or {})
        if isinstance(inputs, list) and all(isinstance(one, str) for one in inputs) and inputs:
            return [[self._answer(self._completion(one, parameters), parameters)] for one in inputs]
        if isinstance(inputs, list) and all(isinstance(one, Mapping) for one in inputs) and inputs:
            return [self._answer(self.assembler.chat(inputs), parameters)]
        if not isinstance(inputs, str):
            raise ValueError(f"inputs is {inputs!r:.60}; give a text, a list of texts, or a list of messages")
        return [self._answer(self._completion(inputs, parameters), parameters)]

    def _completion(self, text: str, parameters: Parameters) -> Assembled:
        limit = parameters.max_new_tokens or 0
        return self.assembler.complete(text, limit, keep=parameters.truncate, stop=parameters.stop)

    def _answer(self, assembled: Assembled, parameters: Parameters) -> dict[str, Any]:
        prompt, seed = assembled.prompt, parameters.seed
        room = self.llama.model.args.max_seq_len - len(prompt.tokens)
        sampling = Sampling(
            temperature=(parameters.temperature or 1.0) if parameters.samples else 0.0,
            top_p=1.0 if parameters.top_p is None else parameters.top_p, top_k=top_k_of(parameters.top_k),
            repetition_penalty=parameters.repetition_penalty, frequency_penalty=parameters.frequency_penalty,
            seed=random.getrandbits(62) if seed is None else seed % 2**63,
        )  # fmt: skip
        limit = max(0, room if parameters.max_new_tokens is None else min(room, parameters.max_new_tokens))
        request = Request(
            self.llama.tokenizer, prompt, limit, sampling, parameters.stop, lookup=self.llama.lookup,
            allowed=assembled.allowed,
        )  # fmt: skip
        text, tokens, reason = "", 0, ""
        for event in self.llama.loop.run([request]):
            text, tokens, reason = text + event.text, tokens + len(event.tokens), str(event.finish_reason or reason)
        text = text[len(assembled.healed) :]
        found: dict[str, Any] = {"generated_text": assembled.text + text if parameters.return_full_text else text}
        if parameters.details:
            stopped = "stop_sequence" if request.stop_strings.found else "eos_token"
            ended = stopped if reason == "stop" else reason
            told = sampling.seed if sampling.temperature else None
            found["details"] = {"finish_reason": ended, "generated_tokens": tokens, "seed": told}
        return found


def _parameters(given: Any) -> Parameters:
    try:
        found = Parameters.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise ValueError(f"{where}: {first['msg']}") from None
    asked = {
        "best_of": found.best_of > 1, "decoder_input_details": found.decoder_input_details,
        "grammar": found.grammar is not None, "top_n_tokens": found.top_n_tokens > 0, "watermark": found.watermark,
        "typical_p": found.typical_p not in (None, 1.0),
    }  # fmt: skip
    refused = [name for name, is_asked in asked.items() if is_asked]
    if refused:
        raise ValueError(f"{', '.join(refused)}: not supported by this endpoint; leave it out")
    return found
