"""The class of Inference Endpoints, called as Hugging Face's toolkit does: found by its name in a `handler.py`, made
with the repository's folder, and called with a request's JSON, whose answer becomes JSON again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from typing import Any

import pytest

from llama.generation import EMBEDDED, Llama


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("repository")
    for file in EMBEDDED.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    (folder / "handler.py").write_text("from llama.serve.handler import EndpointHandler\n")
    spec = importlib.util.spec_from_file_location("custom_handler", folder / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.EndpointHandler(str(folder), max_seq_len=256)
    sys.modules.pop("custom_handler", None)


def ask(handler: Any, inputs: Any, **parameters: Any) -> Any:
    body = json.loads(json.dumps({"inputs": inputs, "parameters": parameters} if parameters else {"inputs": inputs}))
    return json.loads(json.dumps(handler(body)))


def test_it_writes_what_the_llama_does(handler: Any) -> None:
    llama: Llama = handler.llama
    expected = llama.text_completion(["def f("], 0.0, max_gen_len=12)[0]["generation"]
    assert ask(handler, "def f(", max_new_tokens=12) == [{"generated_text": expected}]
    assert ask(handler, "def f(", max_new_tokens=12, return_full_text=True)[0]["generated_text"] == "def f(" + expected
    assert ask(handler, ["def f(", "def f("], max_new_tokens=12) == [[{"generated_text": expected}]] * 2
    talk: Any = [{"role": "user", "content": "Write add"}]
    said = llama.chat_completion([talk], 0.0, max_gen_len=12)[0]["generation"]["content"]
    assert ask(handler, talk, max_new_tokens=12) == [{"generated_text": said}]
    filled = llama.text_infilling(["x = "], ["\ny = 2\n"], 0.0, max_gen_len=12)[0]["generation"]
    for text in ("x = <FILL_ME>\ny = 2\n", "<PRE> x =  <SUF>\ny = 2\n <MID>"):
        assert ask(handler, text, max_new_tokens=12) == [{"generated_text": filled}]


def test_a_seed_repeats_a_draw_and_details_say_how_it_ended(handler: Any) -> None:
    more = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95, "seed": 5, "details": True}
    first, again = ask(handler, "import ", **more), ask(handler, "import ", **more)
    assert first == again
    assert first[0]["details"]["seed"] == 5
    assert first[0]["details"]["finish_reason"] in ("length", "eos_token")
    plain = ask(handler, "def f(", max_new_tokens=12)[0]["generated_text"]
    stopped = ask(handler, "def f(", max_new_tokens=12, stop=[plain[2:4]], details=True)[0]
    assert stopped["generated_text"] == plain[: plain.index(plain[2:4])]
    assert stopped["details"]["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "give a text"),
        ({"inputs": 5}, "give a text"),
        ({"inputs": []}, "give a text"),
        ({"inputs": "x", "parameters": {"temperature": 0}}, "temperature"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, "best_of"),
        ({"inputs": "x", "parameters": 5}, "parameters"),
        ({"inputs": "x " * 600}, "256"),
        ({"inputs": [{"role": "assistant", "content": "x"}]}, "roles"),
    ],
)
def test_what_it_can_not_do_is_one_sentence(handler: Any, body: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        handler(body)
    assert "\n" not in str(refused.value)
