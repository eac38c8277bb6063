"""Structured output over HTTP: each API's own words for a grammar, whole and streamed."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from servers import Served

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "answer"}], "max_tokens": 60, "temperature": 0}
TEXT: dict[str, Any] = {"prompt": "x = ", "max_tokens": 60, "temperature": 0}
DATE = r"\d{4}-\d{2}-\d{2}"


def test_without_the_library_it_names_the_pip_command(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    response = served.post("/v1/completions", {**TEXT, "guided_regex": "a"})
    assert response.status_code == 400
    assert "pip install 'codellama[grammar]'" in response.json()["error"]["message"]


TGI = {"max_new_tokens": 60, "grammar": {"type": "json", "value": SCHEMA}}
RESPONSE = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/chat/completions", {**CHAT, "response_format": RESPONSE}, "message.content"),
        ("/v1/completions", {**TEXT, "guided_json": SCHEMA}, "text"),
        ("/v1/completions", {**TEXT, "structured_outputs": {"json": SCHEMA}}, "text"),
        ("/completion", {"prompt": "x = ", "n_predict": 60, "json_schema": SCHEMA}, "content"),
        ("/api/generate", {"prompt": "x = ", "format": SCHEMA, "stream": False}, "response"),
        ("/generate", {"inputs": "x = ", "parameters": TGI}, "generated_text"),
    ],
)
def test_a_schema_in_each_apis_words(embedded: Served, path: str, body: dict[str, Any], place: str) -> None:
    pytest.importorskip("llguidance")
    found = embedded.post(path, body).json()
    value: Any = found["choices"][0] if "choices" in found else found
    for name in place.split("."):
        value = value[name]
    answer = json.loads(value)
    assert answer["name"] in ("a", "b")
    assert 0 <= answer["n"] <= 99


def test_choices_expressions_and_rules(embedded: Served) -> None:
    pytest.importorskip("llguidance")

    def text(**more: Any) -> str:
        return str(embedded.post("/v1/completions", {**TEXT, **more}).json()["choices"][0]["text"])

    assert text(guided_choice=["left", "right"]) in ("left", "right")
    assert re.fullmatch(DATE, text(guided_regex=DATE))
    assert re.fullmatch(DATE, text(grammar=DATE))
    assert text(grammar='root ::= "yes" | "no"') in ("yes", "no")
    assert text(grammar='start: "yes" | "no"') in ("yes", "no")
    assert text(response_format={"type": "json_object"}).startswith("{")


def test_it_streams(embedded: Served) -> None:
    pytest.importorskip("llguidance")
    body = {**TEXT, "guided_regex": DATE, "stream": True, "n": 3, "temperature": 1.0, "seed": 4}
    texts = ["", "", ""]
    for line in embedded.post("/v1/completions", body).text.splitlines():
        if line.startswith("data: {"):
            [choice] = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    assert all(re.fullmatch(DATE, text) for text in texts)


@pytest.mark.parametrize(
    "more",
    [
        {"guided_regex": "("},
        {"guided_regex": "a", "guided_choice": ["b"]},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        {"grammar": "root ::= undefined"},
        {"guided_choice": []},
    ],
)
def test_what_is_no_grammar_is_a_400(embedded: Served, more: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    response = embedded.post("/v1/completions", {**TEXT, **more})
    assert response.status_code == (200 if more == {"guided_choice": []} else 400), response.text
