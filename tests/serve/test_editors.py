"""What editors send, as they send it, and that they can read what comes back. Each request was recorded from the client
that the test is named after (../shared/facts/serving.md)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from servers import Served

from llama import prompts

PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n"
CODELLAMA = f"<PRE> {PREFIX} <SUF>{SUFFIX} <MID>"
ANSWER = "one two three four five six"


@pytest.fixture(autouse=True)
def seen(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that reach the loop."""
    found: list[list[int]] = []
    join = served.engine.loop.join

    def noting(request: Any) -> None:
        found.append(list(request.prompt.tokens))
        join(request)

    monkeypatch.setattr(served.engine.loop, "join", noting)
    return found


def expected(served: Served, prefix: str = PREFIX, suffix: str = SUFFIX) -> list[int]:
    return prompts.infilling(served.llama.tokenizer, prefix, suffix).tokens


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_continue_with_an_openai_provider(served: Served, seen: list[list[int]]) -> None:
    body = {
        "model": "codellama-7b", "prompt": CODELLAMA, "max_tokens": 4096, "temperature": 0.01, "top_p": None,
        "frequency_penalty": None, "presence_penalty": None, "stream": True,
        "stop": ["<PRE>", "<SUF>", "<MID>", "<EOT>", "/src/", "#- coding: utf-8", "```", "\nfunction", "\nclass",
                 "\nmodule", "\nexport", "\nimport"],
    }  # fmt: skip
    response = served.post("/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks(response.text)) == ANSWER
    assert response.text.endswith("data: [DONE]\n\n")
    assert seen == [expected(served)]


def test_continue_with_mistrals_endpoint(served: Served, seen: list[list[int]]) -> None:
    body = {"model": "x", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 200, "temperature": 0.01, "top_p": 0.9,
            "stop": ["\n\n\n\n"], "stream": True}  # fmt: skip
    found = chunks(served.post("/v1/fim/completions", body).text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in found) == ANSWER
    whole = served.post("/v1/fim/completions", {**body, "stream": False}).json()
    assert whole["choices"][0]["message"]["content"] == ANSWER
    assert seen == [expected(served)] * 2


def test_continue_with_deepseeks_endpoint(served: Served, seen: list[list[int]]) -> None:
    body = {"model": "x", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 200, "stream": True, "echo": False}
    found = chunks(served.post("/beta/completions", body).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == ANSWER
    assert seen == [expected(served)]


def test_continue_with_llama_cpp(served: Served, seen: list[list[int]]) -> None:
    body = {"model": "x", "prompt": CODELLAMA, "stream": True, "n_predict": 200, "stop": ["<EOT>"], "top_k": 100,
            "top_p": 0.9, "min_p": 0.0, "mirostat": 0, "frequency_penalty": 0, "presence_penalty": 0}  # fmt: skip
    found = chunks(served.post("/completion", body).text)
    assert "".join(chunk["content"] for chunk in found) == ANSWER
    assert found[-1]["stop"] is True
    assert seen == [expected(served)]


def test_continue_with_tgi(served: Served, seen: list[list[int]]) -> None:
    with served.client() as http:
        info = http.get("/info").json()
    assert info["model_id"]
    assert isinstance(info["max_input_length"], int)
    parameters = {"max_new_tokens": 200, "best_of": 1, "temperature": 0.01, "top_p": None, "presence_penalty": 0}
    body = {"inputs": CODELLAMA, "parameters": {**parameters, "stop": ["<PRE>", "<SUF>", "<MID>", "<EOT>"]}}
    found = chunks(served.post("/generate_stream", body).text)
    assert "".join(event["token"]["text"] for event in found) == ANSWER
    assert seen == [expected(served)]


def test_llama_vscode_and_llama_vim(served: Served, seen: list[list[int]]) -> None:
    body = {
        "id_slot": 0, "input_prefix": "def add(a, b):\n", "input_suffix": SUFFIX,
        "input_extra": [{"filename": "util.py", "text": "def sub(a, b): ..."}], "prompt": "    return ",
        "n_predict": 128, "n_cmpl": 1, "top_k": 40, "top_p": 0.99, "stream": False,
        "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "n_indent": 0, "t_max_prompt_ms": 500,
        "t_max_predict_ms": 2500, "response_fields": ["content", "timings/prompt_n", "generation_settings/n_ctx"],
    }  # fmt: skip
    warm = served.post("/infill", {**body, "n_predict": 0, "response_fields": [""]})
    assert warm.status_code == 200
    found = served.post("/infill", body).json()
    assert found["content"] == ANSWER
    assert found["n_ctx"] == 512
    tokenizer = served.llama.tokenizer
    extra = tokenizer.encode("# util.py\ndef sub(a, b): ...\n", False, False)
    middle = tokenizer.encode_infilling("    return ")
    whole = expected(served, "def add(a, b):\n")
    assert seen == [[whole[0], *extra, *whole[1:], *middle]] * 2
    with served.client() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/v1/models").json()["data"][0]["id"]
        assert http.get("/props").json()["total_slots"] == 4


def test_tabby_with_openai_completion(served: Served, seen: list[list[int]]) -> None:
    body = {"model": "codellama", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 64, "temperature": 0.1,
            "stream": True, "presence_penalty": 0.0}  # fmt: skip
    found = chunks(served.post("/v1/completions", body).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == ANSWER
    assert found[-1]["choices"][0]["finish_reason"] == "stop"
    served.post("/v1/completions", {**body, "prompt": CODELLAMA, "suffix": None})
    assert seen == [expected(served)] * 2


def test_tabby_with_llama_cpp(served: Served, seen: list[list[int]]) -> None:
    body = {"seed": 1234, "prompt": CODELLAMA, "n_predict": 64, "temperature": 0.1, "stream": True, "penalty_last_n": 0,
            "presence_penalty": 0.0}  # fmt: skip
    found = chunks(served.post("/completion", body).text)
    assert "".join(chunk["content"] for chunk in found) == ANSWER
    assert found[-1]["stop"] is True
    assert seen == [expected(served)]


def test_twinny(served: Served, seen: list[list[int]]) -> None:
    header = "# Language: Python (python)\n# File uri: file:///a.py (python)\n"
    prompt = f"<PRE>{header} \n{PREFIX} <SUF> {SUFFIX} <MID>"
    body = {"model": "codellama:7b-code", "prompt": prompt, "stream": True, "keep_alive": "5m",
            "options": {"temperature": 0.2, "num_predict": 512, "stop": ["<EOT>"]}}  # fmt: skip
    response = served.post("/api/generate", body)
    found = [json.loads(line) for line in response.text.splitlines()]
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert "".join(part["response"] for part in found) == ANSWER
    assert found[-1]["done"] is True
    assert seen == [expected(served, f"{header} \n{PREFIX}")]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_llm_vscode(served: Served, seen: list[list[int]], path: str) -> None:
    text = "<PRE> " + PREFIX + " <SUF>" + SUFFIX + " <MID>"
    if path == "/generate":
        parameters = {"max_new_tokens": 60, "temperature": 0.2, "do_sample": True, "top_p": 0.95,
                      "return_full_text": False, "stop": ["<EOT>"]}  # fmt: skip
        found = served.post(path, {"inputs": text, "parameters": parameters}).json()["generated_text"]
    else:
        body = {"model": "x", "prompt": text, "max_tokens": 60, "temperature": 0.2, "top_p": 0.95, "stream": False}
        found = served.post(path, body).json()["choices"][0]["text"]
    assert found == ANSWER
    assert "<EOT>" not in found
    assert seen == [expected(served)]


def test_ollama_clients_infill_by_suffix(served: Served, seen: list[list[int]]) -> None:
    body = {"model": "x", "prompt": PREFIX, "suffix": SUFFIX, "options": {"num_predict": 60}, "stream": False}
    assert served.post("/api/generate", body).json()["response"] == ANSWER
    assert seen == [expected(served)]


def test_minuet(served: Served, seen: list[list[int]]) -> None:
    """Not recorded: made from the documents of minuet-ai.nvim."""
    body = {"model": "codellama-7b", "prompt": PREFIX, "suffix": SUFFIX, "stream": True, "max_tokens": 56, "top_p": 0.9}
    found = chunks(served.post("/v1/completions", body).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == ANSWER
    assert seen == [expected(served)]


def test_aider(served: Served) -> None:
    turns = [("system", "Act as an expert."), ("user", "files"), ("assistant", "Ok."), ("user", "count")]
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"model": "codellama", "messages": messages, "temperature": 0, "stream": True}
    found = chunks(served.post("/v1/chat/completions", body).text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found) == ANSWER


def test_a_cursor_inside_a_word_is_healed_in_all_of_them(served: Served, seen: list[list[int]]) -> None:
    prefix = "def add(a, b):\n    ret"
    text = f"<PRE> {prefix} <SUF>{SUFFIX} <MID>"
    for path, body in (
        ("/v1/completions", {"prompt": prefix, "suffix": SUFFIX}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": f"{prefix}<FILL_ME>{SUFFIX}"}),
        ("/infill", {"input_prefix": prefix, "input_suffix": SUFFIX}),
        ("/api/generate", {"prompt": text, "stream": False}),
        ("/generate", {"inputs": text}),
    ):
        assert served.post(path, body).status_code == 200
    whole = expected(served, prefix)
    at = whole.index(served.llama.tokenizer.suffix_id) - 1
    assert seen == [whole[:at] + whole[at + 1 :]] * 6
