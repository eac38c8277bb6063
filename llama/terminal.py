"""What a user types: lines with history and completion at a terminal, plain lines through a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama.verbs import decoded

QUOTES = '"""'


def is_terminal() -> bool:
    """Whether a person reads and types here."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def is_open(text: str) -> bool:
    """Whether a text begins with triple quotes that have not ended yet."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


class Lines:
    """Messages from standard input that is no terminal: a line each, or all lines between triple quotes."""

    def read(self) -> str | None:
        text = ""
        for line in sys.stdin.buffer:
            text += decoded(line, "standard input", "utf-8")[0]
            if not is_open(text):
                return text
        return text or None


class Terminal:
    """Messages from a terminal, by prompt_toolkit: editing, history, completion of commands and paths. A pasted text of
    several lines is one message, and so are lines between triple quotes; Alt-Enter begins a line."""

    def __init__(self, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        history: History = InMemoryHistory()
        place = history_file()
        if place is not None:
            history = FileHistory(str(place))
        self._session: PromptSession[str] = PromptSession(
            history=history,
            key_bindings=keys,
            completer=completer(commands),
            complete_while_typing=False,
            enable_history_search=True,
            multiline=Condition(lambda: is_open(self._session.default_buffer.text)),
            prompt_continuation="  ",
        )

    def read(self) -> str | None:
        while True:
            try:
                return self._session.prompt("> ")
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("(Ctrl-D or /exit ends)", file=sys.stderr)


def history_file() -> Path | None:
    """Where lines are kept between conversations, readable by the user alone; None where that can't be."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "codellama"
    path = folder / "chat_history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return path
    except OSError:
        return None


def completer(commands: Sequence[str]) -> Any:
    """Completes commands at the beginning of a line, and paths after /file, /save and /load."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            command, space, rest = text.partition(" ")
            if space and command in ("/file", "/save", "/load"):
                yield from paths.get_completions(Document(rest, len(rest)), complete_event)
            elif text.startswith("/") and not space:
                yield from (Completion(word, -len(text)) for word in commands if word.startswith(text))

    return Commands()
