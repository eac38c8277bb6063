"""The page in a real Chromium against the server itself: what test_page.py plays with a stand-in holds there, too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from servers import Served

from serve.test_page import CONTROL, ENTER, ESC, Page
from serve.test_page import browser as browser  # the fixture


@pytest.fixture
def page(browser: Any, embedded: Served) -> Iterator[Page]:
    """After the test: nothing broke the server's own Content-Security-Policy, and no script failed."""
    browser.get_log("browser")
    stand_in: Any = SimpleNamespace(url=embedded.url, script=SimpleNamespace(key=""))
    yield Page(browser, stand_in)
    assert [line["message"] for line in browser.get_log("browser")] == []


def test_each_tab_works_with_the_server_itself(page: Page, embedded: Served) -> None:
    llama = embedded.llama
    page.open("complete")
    page("#open-settings").click()
    for name, value in (("set-temperature", "0"), ("set-max_tokens", "12")):
        page.js(
            "const [field, value] = arguments; field.value = value;"
            "for (const one of ['input', 'change']) field.dispatchEvent(new Event(one, {bubbles: true}))",
            page(f"#{name}"),
            value,
        )
    page.keys(ESC)
    prompt = "def add(a, b):\n    "
    page.suggest(prompt)
    page.idle("complete")
    expected = llama.text_completion([prompt], 0.0, max_gen_len=12)[0]["generation"]
    assert page.ghost()
    assert expected.startswith(page.ghost().rstrip("\n")), "a suggestion may end with its line or block"
    status = page.text("#complete .status")
    assert re.search(r"Continued · \d+ tokens · [\d.,]+ tokens/s · context \d+ of 512", status)

    page("#tab-chat").click()
    page.write("#chat-input", "Write add")
    page.keys(ENTER)
    page.idle("chat")
    said = llama.chat_completion([[{"role": "user", "content": "Write add"}]], 0.0, max_gen_len=12)[0]["generation"]
    assert page.messages()[0] == "Write add"
    assert re.sub(r"\W", "", page.messages()[1]) == re.sub(r"\W", "", said["content"])
    assert re.search(r"12 tokens · [\d.,]+ tokens/s", page.text(".answer .note"))
    assert re.fullmatch(r"context \d+ of 512 tokens", page.text("#chat-context .words"))

    page("#tab-tokens").click()
    page.write("#tokens-text", "for x in range(")
    page.keys(CONTROL, ENTER)
    page.idle("tokens")
    ids = llama.tokenizer.encode("for x in range(", True, False)
    drawn = page.all("#tokens-prompt .token")
    assert len(drawn) == len(ids)
    page.js("arguments[0].focus()", page.all("#tokens-answer .token")[0])
    best = next(iter(llama.stream(["for x in range("], 1, 0.0))).tokens[0]
    assert str(best) in page.text("#tokens-detail dl")
    assert len(page.all("#tokens-detail tr")) >= 5, "the alternatives"

    page("#tab-infill").click()
    page.write("#infill-text", "def add(a, b):\n    <FILL_ME>\n")
    page.keys(CONTROL, ENTER)
    page.idle("infill")
    assert page.text("#infill-result").startswith("def add(a, b):\n    ")
    assert page.text("#infill .trouble") == ""
