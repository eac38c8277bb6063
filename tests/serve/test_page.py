"""The page in a real Chromium, against the stand-in of page_server.py: what a person does with mouse and keyboard, what
the server gets to see of it, and what a model must not be able to do to the page."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve.page_server import PAGE, Failure, PageServer

TAB, ENTER, ESC = "\ue004", "\ue007", "\ue00c"
SHIFT, CONTROL = "\ue008", "\ue009"
END, HOME, LEFT, RIGHT = "\ue010", "\ue011", "\ue012", "\ue014"

TABS = ["complete", "infill", "chat", "tokens"]
ATTACK = ["</script><script>window.hit=1</script>", "<img src=x onerror=window.hit=1>", "<b id=hit>b</b>"]


class Page:
    """The open page in words: what is read by id, what is done by keys."""

    def __init__(self, driver: Any, server: PageServer) -> None:
        self.driver, self.server, self.script = driver, server, server.script

    def open(self, tab: str) -> Page:
        """With nothing remembered."""
        self.driver.get("about:blank")  # the page saves when it is left
        self.cdp("Storage.clearDataForOrigin", origin=self.server.url, storageTypes="all")
        self.driver.get(f"{self.server.url}#{tab}")
        self.js("sessionStorage.clear()")
        self.wait(lambda: self.state() == "ready" or bool(self.script.key))
        return self

    def cdp(self, command: str, **values: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, values)

    def js(self, code: str, *values: Any) -> Any:
        return self.driver.execute_script(code, *values)

    def state(self) -> str:
        return str(self("#connection").get_attribute("data-state"))

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def __call__(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """As it stands in the document, spaces included."""
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector))

    def value(self, selector: str) -> str:
        return str(self(selector).get_property("value"))

    def keys(self, *keys: str) -> None:
        """To whatever has the focus. A modifier holds for the keys after it."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def write(self, selector: str, text: str, left: int = 0) -> None:
        """Text in place of what a field holds, and the cursor so many characters before its end."""
        self.js(
            "const [field, text, left] = arguments; field.focus(); field.value = text;"
            "field.setSelectionRange(text.length - left, text.length - left);"
            "field.dispatchEvent(new Event('input', {bubbles: true}))",
            self(selector),
            text,
            left,
        )

    def suggest(self, text: str, left: int = 0) -> None:
        """Asks for ghost text at once, without the pause of one who types."""
        self.write("#complete-text", text, left)
        self.keys(CONTROL, ENTER)

    def button(self, words: str, inside: str = "body") -> Any:
        found = [one for one in self.all(f"{inside} button") if one.is_displayed() and one.text.strip() == words]
        assert found, f"there is no button {words!r}"
        return found[-1]

    def focus(self) -> str:
        return str(self.driver.switch_to.active_element.get_attribute("id"))

    def wait(self, condition: Callable[[], Any], seconds: float = 5.0) -> Any:
        """Until it holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if got := condition():
                return got
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s; alert: {[one.text for one in self.all('.trouble')]}")

    def idle(self, tab: str) -> None:
        self.wait(lambda: self(f"#{tab}-run").text != "Stop")

    def run(self, tab: str) -> None:
        self(f"#{tab}-run").click()
        self.idle(tab)

    def ghost(self) -> str:
        return self.text(".ghost")

    def trouble(self, tab: str) -> str:
        return str(self.wait(lambda: self.text(f"#{tab} .trouble")))

    def say(self, text: str) -> None:
        """One message of a chat, and its whole answer."""
        self.write("#chat-input", text)
        self.keys(ENTER)
        self.idle("chat")

    def messages(self) -> list[str]:
        return [str(self.js("return arguments[0].textContent", one)) for one in self.all("#chat-log .body")]


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with PageServer() as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tested with `pip install selenium`")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("the page is tested in Chromium, after `apt-get install chromium chromium-driver`")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    running.set_window_size(1200, 800)
    yield running
    running.quit()


@pytest.fixture
def page(browser: Any, server: PageServer) -> Iterator[Page]:
    """A fresh page. After the test: nothing broke its Content-Security-Policy, and no script failed."""
    server.reset()
    browser.get_log("browser")
    page = Page(browser, server)
    yield page
    page.cdp("Emulation.clearDeviceMetricsOverride")
    page.cdp("Emulation.setEmulatedMedia", features=[])
    said = [line["message"] for line in browser.get_log("browser") if line["source"] != "network"]
    assert said == []


# --- the files -------------------------------------------------------------------------------------------------------


def test_nothing_comes_from_another_host_and_no_text_becomes_markup() -> None:
    """The script has no way to parse markup or to run text; the page names no address but its own files."""
    html, script, style = ((PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "page.js", "page.css"))
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in script
    assert re.findall(r"https?://[^'\" ]+", html + script + style) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script>|url\(|@import", html + style)


# --- Complete --------------------------------------------------------------------------------------------------------


def test_ghost_text_comes_while_one_types_and_tab_accepts_it(page: Page) -> None:
    page.script.usual = ["return", " a", " + b"]
    page.open("complete")
    page("#complete-text").send_keys("def add(a, b):\n")
    page.wait(lambda: page.ghost().endswith("+ b"))
    page.idle("complete")
    assert page.value("#complete-text") == "def add(a, b):\n    ", "ghost text is not in the field"
    (asked,) = page.server.asked("/v1/completions")
    assert asked["prompt"] == "def add(a, b):\n    "
    assert asked["stream"] is True
    assert "suffix" not in asked
    assert re.fullmatch(
        r"Continued · 3 tokens · [\d.,]+ tokens/s · context 22 of 4,096", page.text("#complete .status")
    )
    page.keys(TAB)
    assert page.value("#complete-text") == "def add(a, b):\n    return a + b"
    assert page.focus() == "complete-text"
    assert page.ghost() == ""
    page.keys(CONTROL, "z")
    assert page.value("#complete-text") == "def add(a, b):\n    ", "Undo takes an accepted suggestion back"


def test_escape_dismisses_and_tab_then_moves_on(page: Page) -> None:
    page.open("complete")
    page.suggest("x = ")
    page.wait(lambda: page.ghost() == "pass")
    page.keys(ESC)
    assert page.ghost() == ""
    page.keys(TAB)
    assert page.value("#complete-text") == "x = "
    assert page.focus() == "complete-run", "the editor is no trap for the keyboard"


def test_infills_where_text_follows_the_cursor(page: Page) -> None:
    page.script.usual = ["sum(", "xs)"]
    page.open("complete")
    page.suggest("total = \nprint(total)\n", left=14)
    page.wait(lambda: page.ghost() == "sum(xs)")
    (asked,) = page.server.asked("/v1/completions")
    assert (asked["prompt"], asked["suffix"]) == ("total = ", "\nprint(total)\n")
    assert page.text("#complete-mirror") == "total = sum(xs)\nprint(total)\n "
    page.idle("complete")
    assert page.text("#complete .status").startswith("Infilled")
    page("#complete-accept").click()
    assert page.value("#complete-text") == "total = sum(xs)\nprint(total)\n"
    assert page.focus() == "complete-text"


def test_typing_what_is_suggested_keeps_the_rest(page: Page) -> None:
    page.script.usual = ["return", " value"]
    page.open("complete")
    page.suggest("    ")
    assert page.server.asked("/v1/completions") == [], "an empty text is no prompt"
    page.suggest("if x:\n    ")
    page.wait(lambda: page.ghost() == "return value")
    page.idle("complete")
    page.keys("ret")
    assert page.ghost() == "urn value"
    page.keys(CONTROL, RIGHT)
    assert page.value("#complete-text") == "if x:\n    return"
    assert page.ghost() == " value"
    assert len(page.server.asked("/v1/completions")) == 1, "none of this asks again"
    page.keys("s")
    assert page.ghost() == ""
    page.suggest("if x:")
    page.wait(lambda: page.ghost())
    page.keys(HOME)
    page.wait(lambda: page.ghost() == "")


@pytest.mark.parametrize(
    ("scope", "kept"), [("line", "\n    a = 1"), ("block", "\n    a = 1\n    b = 2"), ("all", None)]
)
def test_a_suggestion_ends_where_it_was_asked_to(page: Page, scope: str, kept: str | None) -> None:
    """The rest is not waited for: the request is broken off."""
    page.script.usual = ["\n    a", " = 1", "\n    b = 2", "\n", "\n", *["c = 3\n"] * 40]
    page.script.pause = 0.0 if kept is None else 0.02
    page.open("complete")
    page.js(
        "const s = arguments[0]; s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        page("#complete-scope"),
        scope,
    )
    page.suggest("def f():")
    page.wait(lambda: page("#complete-run").text == "Suggest" and page.ghost())
    assert page.ghost() == (kept if kept else "".join(page.script.usual))
    if kept:
        page.wait(lambda: page.server.aborted == 1)


def test_a_new_line_keeps_the_indentation(page: Page) -> None:
    page.open("complete")
    page("#complete-typing").click()
    page("#complete-text").send_keys("for x in y:" + ENTER + "print(x)" + ENTER)
    assert page.value("#complete-text") == "for x in y:\n    print(x)\n    "


# --- Infill ----------------------------------------------------------------------------------------------------------


def test_marks_are_filled_one_after_the_other(page: Page) -> None:
    page.script.answers = [["lo", "w"], ["high"]]
    page.open("infill")
    page.write("#infill-text", "a = <FILL_ME>\nb = <FILL_ME>\n")
    page.keys(CONTROL, ENTER)
    page.idle("infill")
    assert page.text("#infill-result") == "a = low\nb = high\n"
    assert [page.js("return arguments[0].textContent", one) for one in page.all(".fill")] == ["low", "high"]
    assert re.fullmatch(r"3 tokens · [\d.,]+ tokens/s · context 13 of 4,096", page.text("#infill .status"))
    first, second = page.server.asked("/v1/completions")
    assert (first["prompt"], first["suffix"]) == ("a = ", "\nb = \n")
    assert (second["prompt"], second["suffix"]) == ("a = low\nb = ", "\n")
    page.button("Edit result").click()
    assert page.value("#infill-text") == "a = low\nb = high\n"


def test_infill_without_a_mark_says_what_to_do(page: Page) -> None:
    page.open("infill")
    page.write("#infill-text", "a = 1")
    page("#infill-run").click()
    assert page.text("#infill .status") == "Put <FILL_ME> where code is missing."
    page("#infill-mark").click()
    assert page.value("#infill-text") == "a = 1<FILL_ME>"
    page.run("infill")
    assert "suffix" not in page.server.asked("/v1/completions")[0], "where nothing follows, the model continues"
    assert page.text("#infill-result") == "a = 1pass"


# --- Chat ------------------------------------------------------------------------------------------------------------

ANSWER = ["Use `sum`", ":\n\n", "```py", "thon\n", "sum(xs)\n", "```\n", "Done."]


def test_chat_streams_and_shows_code_with_a_copy_button(page: Page) -> None:
    page.script.usual = ANSWER
    page.open("chat")
    page("summary").click()
    page("#chat-system").send_keys("Be brief.")
    page("#chat-input").send_keys("How do", SHIFT + ENTER + SHIFT, "I add?" + ENTER)
    page.idle("chat")
    (asked,) = page.server.asked("/v1/chat/completions")
    assert [(m["role"], m["content"]) for m in asked["messages"]] == [
        ("system", "Be brief."),
        ("user", "How do\nI add?"),
    ]
    assert page.text(".answer .block code") == "sum(xs)"
    assert page.text(".answer .block-bar span") == "python"
    assert page.text(".answer .prose code") == "sum"
    assert re.search(r"7 tokens · [\d.,]+ tokens/s", page.text(".answer .note"))
    assert page.text("#chat-context .words") == "context 29 of 4,096 tokens"
    page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    page.button("Copy", ".block").click()
    page.wait(lambda: page.text(".block button") == "Copied")
    assert page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == "sum(xs)"
    page.say("And then?")
    roles = [m["role"] for m in page.server.asked("/v1/chat/completions")[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_stop_aborts_the_request_and_keeps_what_came(page: Page) -> None:
    page.script.usual = ["word "] * 200
    page.script.pause = 0.02
    page.open("chat")
    page.write("#chat-input", "Talk.")
    page.keys(ENTER)
    page.wait(lambda: page.messages()[1:] and page.messages()[1].count("word") >= 3)
    page("#chat-run").click()
    page.wait(lambda: page.server.aborted == 1, 2)
    assert "stopped" in page.text(".answer .note")
    assert 3 <= page.messages()[1].count("word") < 100
    assert page("#chat-run").text == "Send"


def test_stop_before_the_first_token_takes_the_answer_away(page: Page) -> None:
    page.script.pause = 1.0
    page.open("chat")
    page.write("#chat-input", "Talk.")
    page.keys(ENTER)
    page.wait(lambda: page("#chat-run").text == "Stop")
    page.keys(ESC)
    page.idle("chat")
    assert page.messages() == ["Talk."]
    assert page.text("#chat .trouble") == "", "to stop is no error"


def test_edit_and_resend_drops_what_followed(page: Page) -> None:
    page.script.answers = [["one"], ["two"], ["three"]]
    page.open("chat")
    page.say("first")
    page.say("second")
    assert page.messages() == ["first", "one", "second", "two"]
    page.button("Edit", "#chat-log li:first-child").click()
    page.keys(ESC)
    assert page.messages() == ["first", "one", "second", "two"], "Esc leaves all as it was"
    page.keys(ENTER)  # the focus is on Edit again
    page.keys("!")
    page.keys(ENTER)
    page.idle("chat")
    assert page.messages() == ["first!", "three"]
    assert [m["content"] for m in page.server.asked("/v1/chat/completions")[-1]["messages"]] == ["first!"]


def test_an_edit_goes_on_while_an_answer_comes(page: Page) -> None:
    page.open("chat")
    page.say("first")
    page.script.usual, page.script.pause = ["word "] * 15, 0.02
    page.write("#chat-input", "second")
    page.keys(ENTER)
    page.button("Edit", "#chat-log li:first-child").click()
    page.keys(" one")
    page.idle("chat")
    page.keys(" more")
    assert page.value("#chat-log textarea") == "first one more"
    assert page.messages()[-1].count("word") == 15


def test_retry_asks_the_same_again(page: Page) -> None:
    page.script.answers = [["one"], ["two"]]
    page.open("chat")
    page.say("hello")
    page.button("Retry").click()
    page.wait(lambda: page.messages() == ["hello", "two"])
    first, second = page.server.asked("/v1/chat/completions")
    assert first["messages"] == second["messages"]


def test_an_answer_cut_by_max_tokens_says_so(page: Page) -> None:
    page.script.finish = "length"
    page.open("chat")
    page.say("hello")
    assert "ended at max tokens" in page.text(".answer .note")


# --- Tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True], ids=["", "with <s>"])
def test_tokens_have_colours_ids_and_alternatives(page: Page, bos: bool) -> None:
    page.script.usual, page.script.bos = [" 2", "\n", "<b>"], bos
    page.open("tokens")
    page.write("#tokens-text", "return n %")
    page.keys(CONTROL, ENTER)
    page.idle("tokens")
    (asked,) = page.server.asked("/v1/completions")
    assert (asked["echo"], asked["logprobs"], asked["max_tokens"]) == (True, 5, 24)
    prompt = [page.js("return arguments[0].textContent", one) for one in page.all("#tokens-prompt .token")]
    assert prompt == ["<s>"] * bos + ["retu", "rn n", " %"]
    assert [page.js("return arguments[0].textContent", one) for one in page.all("#tokens-answer .token")] == [
        " 2",
        "↵\n",
        "<b>",
    ]
    shades = [one.get_attribute("class") for one in page.all(".token")]
    assert shades[0] == "token none"
    assert all(re.fullmatch(r"token p[0-5]", shade) for shade in shades[1:])
    assert re.match(r"\d \+ 3 tokens · perplexity [\d.]+", page.text("#tokens .status"))
    page.js("arguments[0].focus()", page("#tokens-prompt .token"))
    page.keys(RIGHT)
    last = "rn n" if not bos else "retu"
    assert page.text("#tokens-detail .big") == last.replace(" ", "␣")
    facts = page.text("#tokens-detail dl")
    assert f"id{sum(map(ord, last))}probability" in facts
    rows = [page.js("return arguments[0].textContent", one) for one in page.all("#tokens-detail tr")]
    assert len(rows) == 5
    assert any(row.startswith("<img␣src=x>") for row in rows)
    page.keys(END)
    page.keys(TAB)
    assert page.text("#tokens-detail .big") == "␣2", "Tab goes from the prompt to the answer"


def test_a_pointer_over_a_token_shows_it(page: Page) -> None:
    page.open("tokens")
    page.write("#tokens-text", "abcdefgh")
    page.run("tokens")
    from selenium.webdriver import ActionChains

    ActionChains(page.driver).move_to_element(page.all("#tokens-prompt .token")[1]).perform()
    page.wait(lambda: page.all("#tokens-detail .big") and page.text("#tokens-detail .big") == "efgh")


# --- settings, and what is remembered --------------------------------------------------------------------------------


def test_settings_reach_the_request(page: Page) -> None:
    page.script.models = ["small", "large"]
    page.open("chat")
    page("#open-settings").click()
    for name, value in {"temperature": "0.7", "top_p": "0.5", "max_tokens": "9", "seed": "3"}.items():
        page(f"#set-{name}").send_keys(CONTROL + "a" + CONTROL + value + TAB)
    page("#set-stop").send_keys("\\n\\n" + ENTER + "END" + TAB)
    page("#set-model").send_keys("large" + TAB)
    page("#set-temperature").send_keys(CONTROL + "a" + CONTROL + "7" + ENTER)
    assert page("#settings").is_displayed(), "what is out of range is not taken, and the browser says so"
    page.keys(ESC)
    assert not page("#settings").is_displayed()
    page.say("hello")
    asked = page.server.asked("/v1/chat/completions")[0]
    wanted = {"temperature": 0.7, "top_p": 0.5, "max_tokens": 9, "seed": 3, "stop": ["\n\n", "END"], "model": "large"}
    assert {name: asked[name] for name in wanted} == wanted


def test_conversation_and_drafts_survive_a_reload_until_cleared(page: Page) -> None:
    page.open("chat")
    page.say("hello")
    page.write("#chat-input", "draft")
    page("#tab-infill").click()
    page.write("#infill-text", "a<FILL_ME>")
    page.driver.refresh()
    assert page("#infill").is_displayed(), "the same tab is open"
    assert page.value("#infill-text") == "a<FILL_ME>"
    page("#tab-chat").click()
    assert page.messages() == ["hello", "pass"]
    assert page.value("#chat-input") == "draft"
    page("#open-settings").click()
    page("#clear").click()
    assert page("#clear").text == "Really clear? Click again"
    page("#clear").click()
    assert page.messages() == []
    page.driver.refresh()
    assert page.messages() == []
    assert page.value("#infill-text") == page.value("#chat-input") == ""


def test_a_damaged_memory_is_ignored(page: Page) -> None:
    page.open("chat")
    for stored in ("nonsense", "null", '{"chat": {"messages": [1, {"role": 2}]}, "drafts": [], "tab": "x"}'):
        page.driver.get(page.server.url + "health")  # of the same origin, without the page, which saves when it is left
        page.js("localStorage.setItem('codellama.page', arguments[0])", stored)
        page.driver.get(page.server.url)
        assert page("#complete").is_displayed()
    page("#tab-chat").click()
    page.say("hello")
    assert page.messages() == ["hello", "pass"]


# --- errors ----------------------------------------------------------------------------------------------------------

REFUSALS = [
    (
        Failure(429, {"error": {"message": "full"}}, {"Retry-After": "3"}),
        "its queue is full. It asks to wait 3 seconds.",
    ),
    (Failure(429, {"error": "Model is overloaded", "error_type": "overloaded"}), "its queue is full."),
    (Failure(503, {"error": {"message": "draining"}}), "The server is not ready: draining"),
    (Failure(400, {"error": {"message": "max_tokens is too large"}}), "refused the request: max_tokens is too large"),
    (Failure(422, {"detail": [{"msg": "no prompt", "loc": []}]}), "refused the request: no prompt"),
    (Failure(413, None), "larger than the server accepts"),
    (Failure(500, b"<html>Oops</html>"), "The server failed (500)."),
]


def test_a_refusal_is_said_in_words_and_can_be_retried(page: Page) -> None:
    page.script.failures = [failure for failure, _ in REFUSALS]
    page.open("chat")
    page.say("hello")
    for _, words in REFUSALS:
        assert words in page.trouble("chat")
        assert page.messages() == ["hello"]
        page.button("Try again", "#chat").click()
        page.idle("chat")
    assert page.messages() == ["hello", "pass"]
    assert page.text("#chat .trouble") == ""


def test_an_error_can_be_retried_in_every_tab(page: Page) -> None:
    page.open("complete")
    for tab in TABS:
        page(f"#tab-{tab}").click()
        page.script.failures = [Failure(500, {"error": {"message": "out of memory"}})]
        page.write("#chat-input" if tab == "chat" else f"#{tab}-text", "x = <FILL_ME>")
        page.run(tab)
        assert "out of memory" in page.trouble(tab)
        page.button("Try again", f"#{tab}").click()
        page.idle(tab)
        assert page.text(f"#{tab} .trouble") == ""
        assert "pass" in page.text(f"#{tab}")


def test_an_answer_that_breaks_off_is_no_answer(page: Page) -> None:
    page.script.usual, page.script.break_after = ["a", "b", "c"], 2
    page.open("chat")
    page.say("hello")
    assert "broke off" in page.trouble("chat")
    assert page.messages() == ["hello", "ab"]
    assert page.text(".answer .note").startswith("incomplete")
    page.script.break_after, page.script.error_after = None, 1
    page.button("Try again", "#chat").click()
    page.wait(lambda: "the model ran out of memory" in page.trouble("chat"))
    assert page.messages() == ["hello", "a"]


def test_a_missing_key_is_asked_for_and_kept_for_the_session_alone(page: Page) -> None:
    page.script.key = "secret"
    page.open("chat")
    page.wait(lambda: page.text("#connection-text") == "API key needed")
    page.say("hello")
    assert "asks for an API key" in page.trouble("chat")
    page.button("Enter the key").click()
    assert page.focus() == "set-key"
    page.keys("wrong" + ENTER)
    page.button("Try again").click()
    page.wait(lambda: "does not accept this API key" in page.text("#chat .trouble"))
    page.button("Enter the key").click()
    page.keys("secret" + ENTER)
    page.wait(lambda: page.state() == "ready")
    page.button("Try again").click()
    page.wait(lambda: page.messages() == ["hello", "pass"])
    assert "secret" not in page.js("return JSON.stringify(localStorage)")
    assert "secret" in page.js("return JSON.stringify(sessionStorage)")
    page.js("sessionStorage.clear()")


def test_a_server_that_went_away_is_noticed_and_so_is_its_return(page: Page) -> None:
    with PageServer() as other:
        port = other.server_address[1]
        there = Page(page.driver, other).open("chat")
    there.say("hello")
    assert "does not answer" in there.trouble("chat")
    there.wait(lambda: there.text("#connection-text") == "No server")
    with PageServer(port):
        there.button("Try again").click()
        there.wait(lambda: there.messages() == ["hello", "pass"])
        there.wait(lambda: there.state() == "ready")
        there.driver.get("about:blank")


# --- what a model must not do ----------------------------------------------------------------------------------------


def test_model_text_stays_text(page: Page) -> None:
    """Markup in answers, in fences, in names of languages, in tokens, in error messages and in the model's name."""
    page.script.models = ["<img src=x onerror=window.hit=1>"]
    page.script.usual = ATTACK
    page.open("complete")
    whole = "".join(ATTACK)
    page.suggest("x = ")
    page.wait(lambda: page.ghost() == whole)
    page.idle("complete")
    page.keys(TAB)
    page("#tab-infill").click()
    page.write("#infill-text", "x = <FILL_ME>;")
    page.run("infill")
    assert page.text("#infill-result") == f"x = {whole};"
    page("#tab-chat").click()
    page.script.usual = [*ATTACK, "\n```<img src=x onerror=window.hit=1>\n", *ATTACK, "\n```\n`<b id=hit>`"]
    page.say("<img src=x onerror=window.hit=1>")
    assert page.text(".answer .block code") == whole
    page.script.failures = [Failure(400, {"error": {"message": whole}})]
    page.say("again")
    assert whole in page.trouble("chat")
    page("#tab-tokens").click()
    page.script.usual = ATTACK
    page.write("#tokens-text", whole)
    page.run("tokens")
    page.js("arguments[0].focus()", page("#tokens-answer .token"))
    assert page.text("#tokens-detail .big") == ATTACK[0]
    page("#open-settings").click()
    assert page.text("#connection-text") == page.script.models[0]
    page.driver.refresh()
    page("#tab-chat").click()
    assert page.text(".answer .block code") == whole
    assert page.js("return [typeof window.hit, document.images.length, document.scripts.length]") == ["undefined", 0, 1]
    assert page.all("#hit, b") == []


def test_only_the_own_server_is_asked(page: Page) -> None:
    page.open("chat")
    page.say("hello")
    names = page.js("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert names
    assert all(name.startswith((page.server.url, "data:")) for name in names)


# --- screens, colours, keys ------------------------------------------------------------------------------------------


def test_a_phone_needs_no_sideways_scrolling(page: Page) -> None:
    page.cdp("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.script.models = ["a-model-with-a-name-that-is-much-too-long-for-so-small-a-screen"]
    page.script.usual = ["word" * 40, "\n```python\n", "x = 1 + 1" * 20, "\n```\n"]
    page.open("complete")
    for tab in TABS:
        page(f"#tab-{tab}").click()
        page.write("#chat-input" if tab == "chat" else f"#{tab}-text", f"{'long' * 40} <FILL_ME>")
        page.run(tab)
        page.script.failures = [Failure(400, {"error": {"message": "wide" * 40}})]
        page.say("again") if tab == "chat" else page.run(tab)
        page.trouble(tab)
        wide = page.js(
            "return [document.documentElement, document.body, document.querySelector('main')]"
            ".map((one) => one.scrollWidth - one.clientWidth)"
        )
        assert wide == [0, 0, 0], tab
        out = page.js(
            "return [...document.querySelectorAll('header *, section:not([hidden]) > *, .actions > *')]"
            ".filter((one) => one.offsetWidth && (one.getBoundingClientRect().right > 360"
            " || one.getBoundingClientRect().left < 0)).map((one) => one.outerHTML)"
        )
        assert [one for one in out if "quiet" not in one] == [], tab
        page.button("Close", f"#{tab}").click()
    page("#open-settings").click()
    assert page.js("return document.querySelector('dialog').scrollWidth") <= 360


CONTRAST = """
const channel = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => channel(v / 255))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (one) => {
  const colour = getComputedStyle(one).backgroundColor;
  return /, 0\\)$/.test(colour) ? ground(one.parentElement) : colour;
};
return arguments[0].map((selector) => {
  const one = document.querySelector(selector);
  const [low, high] = [light(getComputedStyle(one).color), light(ground(one))].sort((a, b) => a - b);
  return [selector, (high + 0.05) / (low + 0.05)];
});
"""
READ = [".lead label", ".ghost", ".primary", ".status", ".keys", "#connection-text", ".trouble", ".chip", "h1"]
READ += [f".legend .p{i}" for i in range(6)]


@pytest.mark.parametrize("system", ["light", "dark"])
def test_colours_follow_the_system_or_the_switch_and_can_be_read(page: Page, system: str) -> None:
    page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
    page.open("complete")
    page.script.failures = [Failure(500)]
    page.suggest("x")
    page.trouble("complete")

    def ground() -> int:
        return sum(map(int, re.findall(r"\d+", page.js("return getComputedStyle(document.body).backgroundColor"))[:3]))

    def check() -> None:
        page.js("document.body.append(document.createElement('hr'))")
        time.sleep(0.2)  # colours change over a tenth of a second
        weak = [(selector, ratio) for selector, ratio in page.js(CONTRAST, READ) if ratio < 4.5]
        assert weak == []

    assert (ground() > 600) == (system == "light")
    check()
    page("#theme").click()
    assert page("#theme").get_attribute("aria-label") == "Colours: light"
    assert ground() > 600
    page("#theme").click()
    assert ground() < 200
    check()
    page.driver.refresh()
    assert ground() < 200, "the choice survives a reload"


def test_all_of_it_by_keyboard(page: Page) -> None:
    page.script.usual = ["ok"]
    page.open("complete")
    page("#complete-text").click()
    seen = []
    for _ in range(5):
        page.keys(SHIFT, TAB)
        seen.append(page.focus())
    assert seen[2:] == ["open-settings", "theme", "tab-complete"]
    page.keys(RIGHT)
    assert (page.focus(), page("#infill").is_displayed()) == ("tab-infill", True)
    page.keys(RIGHT)
    assert page.focus() == "tab-chat"
    while page.focus() != "chat-input":
        page.keys(TAB)
        style = "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
        assert page.js(style) == "solid2px", "the focus can be seen"
    page.keys("hello" + ENTER)
    page.idle("chat")
    assert page.messages() == ["hello", "ok"]
    page.keys(SHIFT, TAB)
    assert page.js("return document.activeElement.textContent") == "Retry"
    page.keys(ENTER)
    page.idle("chat")
    assert page.focus() == "chat-input"
    page.js("document.getElementById('open-settings').focus()")
    page.keys(ENTER)
    assert page.js("return document.querySelector('dialog').open")
    page.keys(ESC)
    assert page.focus() == "open-settings", "the focus returns to where it was"


def test_everything_has_a_role_and_a_name(page: Page) -> None:
    """In the tree that a screen reader is given."""
    page.open("complete")
    page.script.usual = ANSWER
    for tab in TABS:
        page(f"#tab-{tab}").click()
        page.write("#chat-input" if tab == "chat" else f"#{tab}-text", "x = <FILL_ME>")
        page.run(tab)
        check_names(page)
    page("#open-settings").click()
    check_names(page)


def check_names(page: Page) -> None:
    roles = {
        "button",
        "textbox",
        "combobox",
        "spinbutton",
        "checkbox",
        "tab",
        "tabpanel",
        "option",
        "listbox",
        "dialog",
    }
    nodes = page.cdp("Accessibility.getFullAXTree")["nodes"]
    known = [
        (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"] and "role" in n
    ]
    bare = [role for role, name in known if role in roles and not name.strip()]
    assert bare == [], json.dumps(known)[:2000]
    assert ("heading", "Code Llama") in known or ("dialog", "Settings") in known
