"""Hugging Face's and Ollama's own clients, and what TGI, llama.cpp and Ollama answer besides."""

from __future__ import annotations

import json
from typing import Any

import httpx
import ollama
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, HfHubHTTPError, OverloadedError, ValidationError
from scripted_llama import Scripted
from servers import Served, serving, until

from llama.generation import Llama

ANSWER = "one two three four five six"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


# --- TGI ---


def test_inference_client_generates(served: Served) -> None:
    hf = InferenceClient(served.url)
    assert hf.text_generation("count:", max_new_tokens=50) == ANSWER
    assert "".join(hf.text_generation("count:", max_new_tokens=50, stream=True)) == ANSWER
    told = hf.text_generation("count:", max_new_tokens=50, details=True, decoder_input_details=True)
    assert told.details is not None
    assert told.details.finish_reason == "eos_token"
    assert "".join(token.text for token in told.details.tokens) == ANSWER
    assert [token.id for token in told.details.prefill] == served.llama.ids("count:")
    assert told.details.generated_tokens == len(told.details.tokens)
    last = [*hf.text_generation("count:", max_new_tokens=50, details=True, stream=True)][-1]
    assert last.generated_text == ANSWER
    assert last.details is not None
    assert last.details.finish_reason == "eos_token"
    assert hf.text_generation("count:", max_new_tokens=50, stop=["three"], details=True).details.finish_reason == (  # type: ignore[union-attr]
        "stop_sequence"
    )
    assert hf.text_generation("count:", max_new_tokens=50, return_full_text=True) == "count:" + ANSWER


def test_inference_client_chats(served: Served) -> None:
    hf = InferenceClient(base_url=served.url)
    messages = [{"role": "user", "content": "count"}]
    assert hf.chat_completion(messages, max_tokens=50).choices[0].message.content == ANSWER
    parts = hf.chat_completion(messages, max_tokens=50, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == ANSWER


def test_inference_client_knows_the_errors() -> None:
    llama = Scripted(rows=1)
    with serving(llama, engine={"max_queue": 0}) as served:
        hf = InferenceClient(served.url)
        with pytest.raises(ValidationError):
            hf.text_generation("x", temperature=-1.0)
        llama.model.breaks = True
        with pytest.raises(GenerationError):
            hf.text_generation("x")
        llama.model.breaks, llama.model.seconds = False, 0.02  # so that the first answer is under way
        with served.client() as http, http.stream("POST", "/generate_stream", json={"inputs": "forever"}) as stream:
            next(stream.iter_lines())
            with pytest.raises((OverloadedError, HfHubHTTPError)):
                hf.text_generation("x")


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({}, 422, "validation"),
        ({"inputs": 5}, 422, "validation"),
        ({"inputs": "x", "parameters": {"temperature": 0}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"top_p": 2}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"watermark": True}}, 422, "validation"),
        ({"inputs": "word " * 600}, 422, "validation"),
    ],
)
def test_tgi_errors(served: Served, body: Any, status: int, kind: str) -> None:
    for path in ("/generate", "/generate_stream", "/"):
        response = served.post(path, body)
        assert response.status_code == status
        assert set(response.json()) == {"error", "error_type"}
        assert response.json()["error_type"] == kind


def test_tgi_compat_and_info(served: Served) -> None:
    parameters = {"max_new_tokens": 50}
    assert served.post("/", {"inputs": "count:", "parameters": parameters}).json() == [{"generated_text": ANSWER}]
    stream = events(served.post("/", {"inputs": "count:", "parameters": parameters, "stream": True}))
    assert stream[-1]["generated_text"] == ANSWER
    assert [event["index"] for event in stream] == list(range(1, len(stream) + 1))
    with served.client() as http:
        info = http.get("/info").json()
    assert info["model_id"] == "codellama-test"
    assert info["max_input_length"] == info["max_input_tokens"] == 511


def test_tgi_timing_headers_and_top_tokens(embedded: Served) -> None:
    response = embedded.post(
        "/generate", {"inputs": "def f(", "parameters": {"max_new_tokens": 4, "details": True, "top_n_tokens": 3}}
    )
    for name in ("compute-type", "total-time", "queue-time", "inference-time", "time-per-token", "generated-tokens"):
        assert f"x-{name}" in response.headers
    details = response.json()["details"]
    assert [len(top) for top in details["top_tokens"]] == [3] * 4
    assert [top[0]["id"] for top in details["top_tokens"]] == [token["id"] for token in details["tokens"]]  # greedy
    assert details["seed"] is None
    llama: Llama = embedded.llama
    assert response.json()["generated_text"] == llama.text_completion(["def f("], 0.0, max_gen_len=4)[0]["generation"]
    best = embedded.post(
        "/generate", {"inputs": "def f(", "parameters": {"max_new_tokens": 4, "details": True, "best_of": 3,
                                                          "do_sample": True, "seed": 3}}
    ).json()["details"]  # fmt: skip
    assert len(best["best_of_sequences"]) == 2
    assert best["seed"] is not None


# --- llama.cpp ---


def test_infill_is_infilling(embedded: Served) -> None:
    llama: Llama = embedded.llama
    prefix, suffix = "def f(a):\n    x = ", "\n    return x\n"
    own = llama.text_infilling([prefix], [suffix], 0.0, max_gen_len=12)[0]["generation"]
    body = {"input_prefix": prefix, "input_suffix": suffix, "n_predict": 12, "temperature": 0, "return_tokens": True}
    found = embedded.post("/infill", body).json()
    assert found["content"] == own
    assert found["stop"] is True
    assert found["stop_type"] in ("limit", "eos")
    assert len(found["tokens"]) == found["tokens_predicted"]
    parts = events(embedded.post("/infill", {**body, "stream": True}))
    assert "".join(part["content"] for part in parts) == own
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]


def test_n_predict_0_warms_the_cache(embedded: Served) -> None:
    body = {"input_prefix": "import os\nimport sys\n\n\ndef list_files(folder):\n" * 3, "input_suffix": "\n\nmain()\n"}
    first = embedded.post("/infill", {**body, "n_predict": 0, "samplers": [], "cache_prompt": True}).json()
    assert (first["content"], first["tokens_predicted"]) == ("", 0)
    again = embedded.post("/infill", {**body, "n_predict": 4}).json()
    assert again["timings"]["cache_n"] >= first["tokens_evaluated"] - 1
    assert again["timings"]["prompt_n"] == 1


def test_infill_stops_where_the_indentation_ends_and_the_time_is_over() -> None:
    def say(prompt: str) -> str:
        return "a = 1\n    b = 2\n\n    c = 3\nd = 4\n" + "e = 5\n" * 20

    with serving(Scripted(say)) as served:
        body = {"input_prefix": "def f():\n    ", "input_suffix": "", "n_indent": 4, "n_predict": 100}
        found = served.post("/infill", body).json()
        assert found["content"] == "a = 1\n    b = 2\n\n    c = 3"
        assert found["stop_type"] == "limit"
        until(served.is_idle)
        served.model.seconds = 0.01
        late = served.post("/infill", {**body, "n_indent": 0, "t_max_predict_ms": 50}).json()
        assert 0 < late["tokens_predicted"] < 60
        fields = served.post("/infill", {**body, "response_fields": ["content", "generation_settings/n_predict"]})
        assert set(fields.json()) == {"content", "n_predict"}


def test_completion_of_llama_cpp(served: Served) -> None:
    found = served.post("/completion", {"prompt": "count:", "n_predict": 50, "stop": [" five"]}).json()
    assert found["content"] == "one two three four"
    assert (found["stop_type"], found["stopping_word"]) == ("word", " five")
    ids = served.llama.ids("count:")
    for prompt in (ids, ["count:"], [*ids[:1], "count:"]):
        assert served.post("/completion", {"prompt": prompt, "n_predict": 50}).json()["stop_type"] == "eos"
    several = served.post("/completions", {"prompt": "count:", "n_predict": 3, "n_cmpl": 2, "n_probs": 2}).json()
    assert [one["index"] for one in several] == [0, 1]
    assert len(several[0]["completion_probabilities"]) == 3


def test_tokens_there_and_back(served: Served) -> None:
    text = "def f(x):\n    return 'é☺漢' "
    found = served.post("/tokenize", {"content": text}).json()
    assert found["tokens"] == served.llama.tokenizer.encode(text, False, False)
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json()["content"] == text
    pieces = served.post("/tokenize", {"content": text, "with_pieces": True, "add_special": True}).json()["tokens"]
    assert pieces[0] == {"id": 1, "piece": "<s>"}
    data = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces[1:])
    assert data.decode() == " " + text
    assert served.post("/detokenize", {"tokens": [10**6]}).status_code == 400
    rendered = served.post("/apply-template", {"messages": [{"role": "user", "content": "hi"}]}).json()
    assert rendered["prompt"] == "<s>[INST] hi [/INST]"


def test_llama_cpp_errors(served: Served) -> None:
    for path, body in (("/infill", {"input_prefix": 1}), ("/completion", {}), ("/tokenize", {}), ("/completion", [])):
        response = served.post(path, body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert set(error) == {"code", "message", "type"}
        assert (error["code"], error["type"]) == (400, "invalid_request_error")


# --- Ollama ---


def test_ollama_client(served: Served) -> None:
    client = ollama.Client(host=served.url)
    assert client.generate("codellama", "count:").response == ANSWER
    parts = list(client.generate("codellama", "count:", stream=True))
    assert "".join(part.response or "" for part in parts) == ANSWER
    assert parts[-1].done
    assert parts[-1].done_reason == "stop"
    assert parts[-1].eval_count is not None
    assert client.chat("codellama", [{"role": "user", "content": "count"}]).message.content == ANSWER
    chat = client.chat("codellama", [{"role": "user", "content": "count"}], stream=True)
    assert "".join(part.message.content or "" for part in chat) == ANSWER
    assert client.list().models[0].model == "codellama-test"
    assert client.show("codellama").capabilities == ["completion", "insert"]
    short = client.generate("codellama", "count:", options={"num_predict": 2, "stop": ["zzz"], "temperature": 0})
    assert (short.done_reason, short.eval_count) == ("length", 2)
    with pytest.raises(ollama.ResponseError, match="images"):
        client.generate("codellama", "x", images=["aGk="])
    assert served.post("/api/generate", {"model": "codellama"}).json()["done_reason"] == "load"
    assert served.post("/api/generate", {"prompt": 5}).json().keys() == {"error"}


def test_ollama_infills(embedded: Served) -> None:
    llama: Llama = embedded.llama
    prefix, suffix = "def f(a):\n    x = ", "\n    return x\n"
    own = llama.text_infilling([prefix], [suffix], 0.0, max_gen_len=12)[0]["generation"]
    client = ollama.Client(host=embedded.url)
    options = {"temperature": 0, "num_predict": 12}
    assert client.generate("codellama", prefix, suffix=suffix, options=options).response == own
