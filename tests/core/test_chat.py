"""`codellama chat` as typed: each act of a conversation, by lines in this process, and at a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from torch import Tensor

from llama import Llama, Message, Transformer
from llama.prompts import dialog

READY = "<ready>"
"""Where a terminal is asked to mark pasted text, which each prompt does."""
CUT = "cut after 8 tokens: /continue goes on"


def scripted_chat(llama: Llama, questions: list[str], system: str | None = None) -> list[str]:
    """The answers that a chat must give: each turn from the whole conversation, nothing remembered."""
    messages: list[Message] = [Message(role="system", content=system)] if system else []
    said = []
    for question in questions:
        messages.append(Message(role="user", content=question))
        (result,) = llama.chat_completion([messages], 0, max_gen_len=8, reuse=False)
        said.append(result["generation"]["content"])
        messages.append(Message(role="assistant", content=said[-1]))
    return said


def test_chat_answers_turn_by_turn(codellama: Run, tiny_llama: Llama) -> None:
    expected = scripted_chat(tiny_llama, ["Hi", "And?"])
    for last in ("", "/exit\nAgain\n", "quit\n"):
        code, out, err = codellama("chat", stdin=f"Hi\n\n  And?  \n{last}")
        assert (code, out) == (0, "".join(f"{said}\n" for said in expected))
        assert err == "cut after 8 tokens: /continue goes on\n" * 2


def test_chat_reset_forgets_all_but_the_system_message(codellama: Run, tiny_llama: Llama) -> None:
    first, second = scripted_chat(tiny_llama, ["Hi", "And?"], "Brief.")
    (fresh,) = scripted_chat(tiny_llama, ["And?"], "Brief.")
    assert fresh != second
    code, out, _ = codellama("chat", "--system", "Brief.", stdin="Hi\n/reset\nAnd?\n/reset\nHi\nAnd?\n")
    assert (code, out) == (0, f"{first}\n{fresh}\n{first}\n{second}\n")


def test_a_system_message_that_looks_like_a_value_stays_text(codellama: Run, tiny_llama: Llama) -> None:
    for system in ("brief,kind", "[x]", "1.50"):
        (said,) = scripted_chat(tiny_llama, ["Hi"], system)
        assert codellama("chat", "--system", system, stdin="Hi\n/exit\n")[1] == f"{said}\n"


def test_chat_reads_of_a_turn_only_what_is_new(
    codellama: Run, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [Message(role="user", content=text) for text in ("Hi, who are you?", "And?")]
    (said,) = scripted_chat(tiny_llama, [messages[0]["content"]])
    messages.insert(1, Message(role="assistant", content=said))
    first, second = (len(dialog(tiny_llama.tokenizer, messages[:n]).tokens) for n in (1, 3))
    read: list[int] = []
    original: Callable[..., Tensor] = Transformer.hidden

    def hidden(self: Transformer, tokens: Tensor, *args: Any) -> Tensor:
        read.append(tokens.shape[1])
        return original(self, tokens, *args)

    monkeypatch.setattr(Transformer, "hidden", hidden)
    codellama("chat", stdin="Hi, who are you?\nAnd?\n")
    prompts = [tokens for tokens in read if tokens > 1]
    assert len(prompts) == 2
    assert prompts[0] == first
    assert prompts[1] < second - first  # nor what was said


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    codellama: Run, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the model computes. What was said so far is part of the conversation."""
    (whole,) = scripted_chat(tiny_llama, ["Hi"])
    original = Transformer.hidden
    passes: list[int] = []

    def hidden(self: Transformer, *args: Any) -> Tensor:
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "hidden", hidden)
        code, out, err = codellama("chat", stdin="Hi\nAnd?\n")
    said, rest = out.split(" [stopped]\n")
    assert (code, err) == (0, "cut after 8 tokens: /continue goes on\n")
    assert whole.startswith(said)
    assert 0 < len(said) < len(whole)
    history = [
        Message(role="user", content="Hi"),
        Message(role="assistant", content=said),
        Message(role="user", content="And?"),
    ]
    (result,) = tiny_llama.chat_completion([history], 0, max_gen_len=8)
    assert rest == f"{result['generation']['content']}\n"


def lines_of(codellama: Run, script: str, *words: str) -> tuple[list[str], list[str]]:
    code, out, err = codellama("chat", *words, stdin=script)
    assert code == 0
    return out.splitlines(), [line for line in err.splitlines() if line != CUT]


def test_a_block_in_triple_quotes_is_one_message(codellama: Run, tiny_llama: Llama) -> None:
    code = "def f(x):\n    return x\n\n\nprint(f(1))"
    (said,) = scripted_chat(tiny_llama, [code])
    for script in (f'"""\n{code}\n"""\n', f'"""{code}"""\n', f'"""{code}\n'):  # the last one is never closed
        assert codellama("chat", stdin=script)[1] == f"{said}\n"


def test_a_message_may_be_longer_than_a_line_of_a_terminal(codellama: Run) -> None:
    """4,095 characters are all that a terminal gives a program that reads whole lines."""
    long = "a b " * 1500
    code, _, err = codellama("chat", "--max_seq_len", "8192", stdin=f"{long}\n/stats\n")
    assert code == 0
    used = re.search(r"context ([\d,]+) of 8,192 tokens", err)
    assert used is not None
    assert int(used[1].replace(",", "")) > 3000


def test_undo_and_retry(codellama: Run, tiny_llama: Llama) -> None:
    first, second = scripted_chat(tiny_llama, ["Hi", "And?"])
    out, err = lines_of(codellama, "Hi\nWrong\n/undo\nAnd?\n")
    assert "\n".join([out[0], *out[2:]]) == "\n".join([first, second])
    assert err == ["taken back: Wrong"]
    drawn = "/set temperature 2\n"
    out, _ = lines_of(codellama, f"{drawn}Hi\n/retry\n/retry\n/set seed 1\n/undo\nHi\n")
    assert len(set(out[:3])) == 3  # another seed each time
    assert out[3] == out[0]
    assert lines_of(codellama, "/undo\n/retry\n")[1] == [
        "there is nothing to take back",
        "there is no message to answer",
    ]


def test_continue_goes_on_with_a_cut_answer(codellama: Run, tiny_llama: Llama) -> None:
    """As if it had not been cut."""
    question: list[Message] = [Message(role="user", content="Hi")]
    (whole,) = tiny_llama.chat_completion([question], 0, max_gen_len=24)
    code, out, err = codellama("chat", stdin="Hi\n/continue\n/continue\n")
    assert (code, out.replace("\n", "")) == (0, whole["generation"]["content"].replace("\n", ""))
    assert err.count(CUT) == 3
    assert lines_of(codellama, "/continue\n")[1] == ["there is no answer to go on with"]


def test_settings_can_be_set_and_seen(codellama: Run) -> None:
    _, err = lines_of(codellama, "/set\n/set temperature 0.5\n/set top_k 3\n/set top_k none\n/set max_gen_len 7\n")
    assert err[0] == "temperature 0.0  top_p 0.95  top_k None  max_gen_len 8  seed 1"
    assert err[1].startswith("temperature 0.5 ")
    assert ["top_k 3" in line for line in err] == [False, False, True, False, False]
    _, err = lines_of(codellama, "/set temprature 1\n/set temperature hot\n/set temperature\n/set top_p 2\n")
    assert err == [
        "there is no temprature; did you mean temperature? (there are temperature, top_p, top_k, max_gen_len, seed)",
        "temperature: it is 'hot'; give a number, at least 0 and at most 100",
        "give a value as well: /set temperature 0.0",
        "top_p: it is 2; give a number, at least 0 and at most 1",
    ]


def test_a_system_message_can_be_changed(codellama: Run, tiny_llama: Llama) -> None:
    (with_it,) = scripted_chat(tiny_llama, ["Hi"], "Brief.")
    (without,) = scripted_chat(tiny_llama, ["Hi"])
    out, _ = lines_of(codellama, "/system Brief.\nHi\n/reset\nHi\n/system\n/reset\nHi\n")
    assert "\n".join(out) == "\n".join([with_it, with_it, without])


def test_a_conversation_is_saved_and_gone_on_with(codellama: Run, tiny_llama: Llama, tmp_path: Path) -> None:
    first, second = scripted_chat(tiny_llama, ["Hi", "And?"], "Brief.")
    path = tmp_path / "talk.json"
    _, err = lines_of(codellama, f"Hi\n/save {path}\n/save {path}\n", "--system", "Brief.")
    assert err == [f"{path}: written, 2 messages", f"{path}: replaced, 2 messages"]
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["system"] == "Brief."
    assert saved["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first}]
    for words, script in (((), f"/load {path}\nAnd?\n"), (("--talk", str(path)), "And?\n")):
        out, err = lines_of(codellama, script, *words)
        assert ("\n".join(out), err) == (second, [f"{path}: 2 messages"])


def test_a_file_goes_with_the_next_message(codellama: Run, tiny_llama: Llama, tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_text("x = 1\ny = 2\n", encoding="utf-8")
    (said,) = scripted_chat(tiny_llama, [f"Explain\n\n{path}:\n```\nx = 1\ny = 2\n```"])
    out, err = lines_of(codellama, f"/file {path}\nExplain\n")
    assert ("\n".join(out), err) == (said, [f"{path} (2 lines) goes with your next message"])


def test_what_cant_be_done_is_said_and_the_chat_goes_on(codellama: Run, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "list").write_text("[1]")
    script = f"/foo\n/hepl\n/file\n/file {tmp_path}\n/file {tmp_path}/latin\n/load {tmp_path}/list\n"
    out, err = lines_of(codellama, script + f"/load {tmp_path}/none\n/save\n/save /dev/null/x\n")
    assert out == []
    assert err == [
        "there is no /foo (/help lists what there is)",
        "there is no /hepl; did you mean /help? (/help lists what there is)",
        "give a file's name: /file PATH",
        f"{tmp_path} can't be read (Is a directory)",
        f"{tmp_path}/latin is not in utf-8 (byte 0xe9 at 3): save it as UTF-8, or for a file say what it is in: "
        "--encoding latin-1",
        f"{tmp_path}/list is no conversation: give a file that /save wrote",
        f"{tmp_path}/none can't be read (No such file or directory)",
        "give a file's name: /save talk.json",
        "/dev/null/x can't be written: there is no folder /dev/null",
    ]


def test_help_lists_every_act(codellama: Run) -> None:
    _, err = lines_of(codellama, "/help\n")
    told = [line.split()[0] for line in err[:-1]]
    assert told == sorted(told, key=told.index)
    assert {"/help", "/reset", "/undo", "/retry", "/continue", "/system", "/set", "/file", "/save", "/load"} <= set(
        told
    )


def test_a_full_context_drops_the_oldest_turns_and_says_so(
    codellama: Run, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model reads what a conversation without them would have it read."""
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    original = Llama.stream

    def stream(self: Llama, prompts: Any, *args: Any, **options: Any) -> Iterator[Any]:
        asked.append(prompts[0])
        return original(self, prompts, *args, **options)

    monkeypatch.setattr(Llama, "stream", stream)
    questions = [f"question {i} " + "word " * 12 for i in range(6)]
    _, err = lines_of(codellama, "\n".join(questions) + "\n/save talk.json\n", "--max_seq_len", "256")
    dropped = sum(int(line.split()[6]) for line in err if line.startswith("the context is full: the oldest "))
    messages = json.loads(Path("talk.json").read_text(encoding="utf-8"))["messages"]
    assert len(messages) == 12  # nothing of it is lost
    assert dropped in (2, 4, 6, 8)
    assert asked[-1] == dialog(tiny_llama.tokenizer, messages[dropped:-1])
    assert len(asked[-1].tokens) + 8 <= 256


def test_chat_goes_on_after_what_it_cant_answer(codellama: Run, tiny_llama: Llama) -> None:
    """Tags, and a message that is longer than the context."""
    (said,) = scripted_chat(tiny_llama, ["Hi"])
    long = "word " * 300
    out, err = lines_of(codellama, f"[INST]\n{long}\nHi\n", "--max_seq_len", "128")
    assert "\n".join(out) == said.rstrip("\n")
    assert err[0].startswith("Error: special tags are not allowed")
    assert re.fullmatch(r"the message has [\d,]+ tokens, but the context has room for 128: shorten it", err[1])


# --- at a terminal -------------------------------------------------------------------------------------------------


class Person:
    """Types into a pseudo-terminal, and reads what a terminal would show."""

    def __init__(self, words: list[str], home: Path) -> None:
        main, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        # Its history is its own, and it compiles nothing.
        own = {"XDG_STATE_HOME": str(home), "CODELLAMA_NO_KERNELS": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llama", *words],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, **own},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(child)
        self._terminal, self.shown = main, ""

    def enters(self, text: str) -> None:
        """Types as soon as there is a prompt."""
        self.sees(READY)
        self.types(text)

    def types(self, text: str) -> None:
        rest = text.encode()
        while rest:
            rest = rest[os.write(self._terminal, rest[:1000]) :]
            time.sleep(0.01)  # a terminal takes a few thousand at a time

    def sees(self, pattern: str, seconds: float = 60) -> str:
        """What was shown until the pattern came."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise AssertionError(f"no {pattern!r} in {self.shown!r}")
            try:
                new = os.read(self._terminal, 65536).decode(errors="replace")
            except OSError:  # the other side has ended
                raise AssertionError(f"no {pattern!r} before the end, in {self.shown!r}") from None
            if "\x1b[6n" in new:  # where is the cursor?
                self.types("\x1b[1;1R")
            new = new.replace("\x1b[?2004h", READY)
            self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", new)
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen

    def ends(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            os.close(self._terminal)


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Callable[..., Person]]:
    people = []

    def make(*words: str) -> Person:
        people.append(Person(list(words), tmp_path))
        return people[-1]

    yield make
    for one in people:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_a_conversation_at_a_terminal(person: Callable[..., Person], tmp_path: Path) -> None:
    """Pasted lines are one message, lines in triple quotes too; Ctrl-C stops an answer, and at the prompt says how to
    end; the history is there the next time, and readable by the user alone."""
    chat = person("chat", "--temperature", "0", "--max_gen_len", "6")
    chat.enters("\x1b[200~def f(x):\n    return x\n\x1b[201~\r")
    chat.sees(r"6 tokens, [\d,]+ a second; context \d+ of 2,048; cut after 6 tokens: /continue goes on")
    chat.enters('"""\rone\rtwo\r"""\r')
    chat.sees("6 tokens, ")
    chat.enters("/stats\r")
    chat.sees("4 messages; ")  # 2 exchanges, not 6
    chat.enters("\x1b[200~" + "word " * 1000 + "\x1b[201~\r")  # a terminal that reads lines takes 4,095 characters
    chat.sees(r"context \d,\d+ of 2,048")
    chat.enters("/undo\r")
    chat.enters(f"/save {tmp_path}/talk.json\r")
    chat.sees("talk.json: written, 4 messages")
    chat.enters("\x03")
    chat.sees(re.escape("(Ctrl-D or /exit ends)"))
    chat.enters("/set max_gen_len 1900\r")
    chat.enters("/set temperature 3\r")
    chat.enters("go\r")
    chat.sees("go.*\n.*\\w")
    chat.types("\x03")
    chat.sees(r"\[stopped\]")
    chat.enters("\x04")
    assert chat.ends() == 0
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["def f(x):\n    return x", "one\ntwo"]
    history = tmp_path / "codellama" / "chat_history"
    assert "+def f(x):" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    again = person("chat", "--max_gen_len", "2")
    again.enters("\x1b[A")
    again.sees("go")
    again.types("\x15quit\r")
    assert again.ends() == 0
