"""`codellama complete` and `chat` with `--server URL`: the commands as processes, the servers on real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scripted_llama import Scripted
from servers import Served, serving

from llama.prompts import Prompt, dialog

QUESTION = "Write add"
Ran = subprocess.CompletedProcess[str]


def command(*words: str, told: str = "", key: str = "") -> Ran:
    own = {name: value for name, value in os.environ.items() if name != "CODELLAMA_API_KEY"}
    own |= {"CODELLAMA_API_KEY": key} if key else {}
    return subprocess.run(
        [sys.executable, "-m", "llama", *words], input=told, capture_output=True, text=True, timeout=60, env=own,
        check=False,
    )  # fmt: skip


@contextmanager
def raw(*answers: bytes) -> Iterator[str]:
    """A server that sends one of `answers` on each connection, whatever is asked, and closes it."""
    listening = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        for answer in answers:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def said(ran: Ran) -> str:
    """What a command that failed has said: one sentence."""
    assert ran.returncode == 1, ran
    assert "Traceback" not in ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# --- complete --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_complete_writes_what_the_same_model_here_would(embedded: Served, temperature: float) -> None:
    prompt = "def area(width, height):\n    "
    events = embedded.llama.stream([prompt], 24, temperature, 0.9, seed=7)
    here = "".join(event.text for event in events)
    words = ["--temperature", str(temperature), "--seed", "7", "--max_gen_len", "24", "--server", embedded.url]
    ran = command("complete", prompt, *words)
    assert (ran.stdout, ran.stderr, ran.returncode) == (f"{prompt}{here}\n", "", 0)


@pytest.mark.slow
def test_complete_by_a_server_and_without_one_print_the_same(embedded: Served) -> None:
    words = ["complete", "-", "--temperature", "0", "--max_gen_len", "12", "--no_echo"]
    here = command(*words, told="import ")
    assert here.returncode == 0
    assert command(*words, "--server", f"{embedded.url}/v1/", told="import ").stdout == here.stdout


# --- chat ------------------------------------------------------------------------------------------------------------


def test_an_answer_that_was_cut_goes_on_by_a_server(embedded: Served) -> None:
    """As vLLM has it: the last message is the assistant's, and the new text follows its own."""
    tokenizer, cut = embedded.llama.tokenizer, 9
    prompt = dialog(tokenizer, [{"role": "user", "content": QUESTION}])

    def answer(ids: list[int], most: int) -> str:
        events = embedded.llama.stream([Prompt(ids, prompt.stop, len(ids) > len(prompt.tokens))], most, 0.0)
        return "".join(event.text for event in events)

    begun = answer(prompt.tokens, cut)
    following = answer([*prompt.tokens, *tokenizer.encode(begun, False, False)], cut)
    assert begun + following == answer(prompt.tokens, 2 * cut), "the text alone gave the tokens back"
    words = ["--temperature", "0", "--max_gen_len", str(cut), "--server", embedded.url]
    ran = command("chat", *words, told=f"{QUESTION}\n/continue\n/stats\n/exit\n")
    assert ran.returncode == 0
    assert ran.stdout == f"{begun}\n{following}\n"
    notes = ran.stderr.splitlines()
    assert notes[0] == notes[1] == f"cut after {cut} tokens: /continue goes on"
    used = len(prompt.tokens) + len(tokenizer.encode(begun, False, False)) + cut
    assert notes[2].startswith(f"2 messages; context {used} of 512 tokens; {2 * cut} tokens written, ")
    assert len(notes) == 3


def test_what_goes_on_and_what_does_not(served: Served) -> None:
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "one two"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    body = {"messages": turns, "debug": True, **goes_on}
    found = served.post("/v1/chat/completions", body).json()
    tokenizer = served.llama.tokenizer
    ids = dialog(tokenizer, turns[:1]).tokens + tokenizer.encode("one two", False, False)  # type: ignore[arg-type]
    assert found["debug"]["prompts"][0]["ids"] == ids
    assert served.post("/apply-template", {"messages": turns, **goes_on}).json()["tokens"] == ids
    for wrong, sentence in (
        ({"add_generation_prompt": True}, "are both true"),
        ({"continue_final_message": False}, "are both false"),
        ({"messages": turns[:1]}, "role assistant"),
        ({"messages": [turns[0], {"role": "assistant", "content": "[/INST]"}]}, "special tags"),
        ({"messages": turns[1:]}, "roles"),
    ):
        refused = served.post("/v1/chat/completions", {**body, **wrong})
        assert refused.status_code == 400
        assert sentence in refused.json()["error"]["message"]


def test_the_oldest_turns_are_left_out_where_a_servers_context_is_full() -> None:
    with serving(Scripted(slots=128)) as served:
        questions = "".join(f"question {i}: what is the sum of {i} and {i}?\n" for i in range(5))
        ran = command("chat", "--max_gen_len", "16", "--server", served.url, told=questions)
        assert ran.returncode == 0
        assert ran.stdout.splitlines() == ["one two three four five six"] * 5
        notes = [line for line in ran.stderr.splitlines() if "left out" in line]
        assert notes
        assert set(notes) == {"the context is full: the oldest 2 messages are left out from now on"}
        long = command("chat", "--server", served.url, told="word " * 200 + "\nshort\n")
        assert "shorten it" in long.stderr
        assert long.stdout == "one two three four five six\n", "and the chat goes on"


# --- what goes wrong: one sentence each -----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["complete", "chat"])
def test_no_server_no_address_no_api(verb: str) -> None:
    first = ["x"] if verb == "complete" else []
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    refused = said(command(verb, *first, "--server", nobody))
    assert f"{nobody} can't be reached (Connection refused)" in refused
    assert "http://127.0.0.1:8000" in said(command(verb, *first, "--server", "localhost:8000"))
    page = b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>"
    with raw(page) as url:
        assert "no server of OpenAI's API" in said(command(verb, *first, "--server", url))


def test_a_key_that_is_missing() -> None:
    with serving(keys=["secret"]) as served:
        sentence = said(command("complete", "x", "--server", served.url))
        assert "API key is missing or wrong" in sentence
        assert "CODELLAMA_API_KEY" in sentence
        assert "CODELLAMA_API_KEY" in said(command("chat", "--server", served.url, key="wrong"))
        assert command("chat", "--server", served.url, key="secret", told="x").stdout.startswith("one two")


MODELS = b'HTTP/1.0 200 OK\r\n\r\n{"data": [{"id": "m", "max_model_len": 512}]}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
EVENT = b'data: {"choices": [{"index": 0, "text": "one", "delta": {"content": "one"}}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (HEAD + b"Connection: close\r\n\r\n" + EVENT, "broke off in the middle"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(EVENT), EVENT), "broke off in the middle"),
        (HEAD + b"\r\n" + EVENT + b"data: {nonsense\n\n", "no JSON object"),
        (HEAD + b"\r\n" + EVENT + b'data: {"error": {"message": "out of memory"}}\n\n', "failed: out of memory"),
    ],
)
def test_a_server_that_goes_away_in_the_middle(answer: bytes, sentence: str) -> None:
    with raw(MODELS, answer) as url:
        ran = command("complete", "x", "--server", url)
        assert sentence in said(ran)
        assert ran.stdout == "xone"


def test_a_chat_goes_on_after_a_server_has_gone_away() -> None:
    nothing, answer = b"HTTP/1.0 404 Not Found\r\n\r\n", HEAD + b"Connection: close\r\n\r\n" + EVENT
    with raw(MODELS, nothing, answer, nothing, nothing) as url:  # the length is asked for first
        ran = command("chat", "--server", url, told="x\ny\n")
    assert ran.returncode == 0, "the chat goes on: the server may come back"
    assert "Traceback" not in ran.stderr
    assert "broke off in the middle" in ran.stderr.splitlines()[0]
    assert len(ran.stderr.splitlines()) == 2
    assert ran.stdout.startswith("one\n")
