"""`codellama chat`: a conversation at a terminal, or line by line through a pipe.

Rank 0 reads what the user types and what files hold, and broadcasts it as an *act*: a command's name, its argument and
a file's contents. Every rank carries out the same acts, so every rank has the same conversation. What the model has
read of it stays in its cache, so each turn reads only what is new.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from typing_extensions import Unpack

from llama.arguments import Range
from llama.options import (
    AMOUNT,
    COUNT,
    SHARE,
    Amount,
    Loading,
    MaybeCount,
    MaybeExisting,
    MaybeTarget,
    MaybeText,
    Seed,
    Share,
    Stops,
    Temperature,
    nearest,
    number,
)
from llama.terminal import Lines, Terminal, is_terminal
from llama.verbs import cache_files, decoded, load_to_use, server_of
from llama.writers import Model, Remote, Sampled, Writer

if TYPE_CHECKING:
    from llama.prompts import Message

RANGES: dict[str, Range] = {
    "temperature": (float, "at least", 0, 100),
    "top_p": SHARE,
    "top_k": COUNT,
    "max_gen_len": AMOUNT,
    "seed": (int, "at least", 0, 2**63 - 1),
}
"""What /set changes."""


class Reader(Protocol):
    """Where messages come from."""

    def read(self) -> str | None:
        """The next message or command; None at the end."""


class Chat:
    """A conversation: the same on every rank."""

    def __init__(self, writer: Writer, sampled: Sampled, system: str | None) -> None:
        self.writer, self.sampled, self.system = writer, sampled, system
        self.messages: list[Message] = []
        """User and assistant in turn."""
        self.dropped = 0
        """So many of the oldest messages are no longer read, since the context is full."""
        self.files = ""
        """Contents of files, to go with the next message."""
        self.cut = False
        """Whether the last answer was cut, so that /continue may go on."""
        self.used, self.written, self.seconds, self.tries = 0, 0, 0.0, 0
        self.shows_figures = is_terminal()

    # Acts: what a user can do. Their docstrings are the help. --------------------------------------------------------

    def say(self, argument: str, contents: str) -> None:
        """Sends a message."""
        content = f"{argument}\n\n{self.files}".strip() if self.files else argument
        self.files, self.tries = "", 0
        self._ask([*self.messages, {"role": "user", "content": content}])

    def help(self, argument: str, contents: str) -> None:
        """These commands."""
        told = [(name, (act.__doc__ or "").strip()) for name, act in ACTS.items()]
        self._note("\n".join(f"{usage(name):24}{what}" for name, what in told))
        self._note('Ctrl-C stops an answer. A message of several lines stands between """ and """, or is pasted.')

    def reset(self, argument: str, contents: str) -> None:
        """Forgets the conversation, but not the system message."""
        self._keep([])
        self.files, self.cut = "", False
        self._note("the conversation begins anew")

    def undo(self, argument: str, contents: str) -> None:
        """Takes back the last message and its answer."""
        if not self.messages:
            raise ValueError("there is nothing to take back")
        taken = self.messages[-2]["content"].partition("\n")[0]
        self._keep(self.messages[:-2])
        self.cut = False
        self._note(f"taken back: {taken:.60}")

    def retry(self, argument: str, contents: str) -> None:
        """Answers the last message once more, with another seed."""
        if not self.messages:
            raise ValueError("there is no message to answer")
        self.tries += 1
        if not self.sampled.temperature:
            self._note("temperature is 0, so the answer is the same: /set temperature 0.5")
        self._ask(self.messages[:-1])

    def go_on(self, argument: str, contents: str) -> None:
        """Goes on with an answer that was cut."""
        if not self.cut:
            last = "the last answer came to its end by itself; /retry answers once more"
            raise ValueError(last if self.messages else "there is no answer to go on with")
        self._ask(self.messages[:-1], self.messages[-1]["content"])

    def set_system(self, argument: str, contents: str) -> None:
        """Sets the system message, or removes it."""
        self.system = argument or None
        self._note("the system message is set" if argument else "there is no system message now")

    def set(self, argument: str, contents: str) -> None:
        """Sets temperature, top_p, top_k, max_gen_len or seed; alone, shows them."""
        name, _, value = argument.partition(" ")
        if argument:
            if name not in RANGES:
                raise ValueError(f"there is no {name}{nearest(name, list(RANGES))} (there are {', '.join(RANGES)})")
            if not value:
                raise ValueError(f"give a value as well: /set {name} {getattr(self.sampled, name)}")
            unset = name == "top_k" and value in ("none", "None")
            try:
                setattr(self.sampled, name, None if unset else number(value.strip(), RANGES[name]))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        self._note("  ".join(f"{name} {getattr(self.sampled, name)}" for name in RANGES))

    def file(self, argument: str, contents: str) -> None:
        """Sends a file's text with the next message."""
        self.files += f"{argument}:\n```\n{contents.rstrip()}\n```\n"
        lines = contents.count("\n") + (not contents.endswith("\n"))
        self._note(f"{argument} ({lines:,} line{'s' if lines != 1 else ''}) goes with your next message")

    def save(self, argument: str, contents: str) -> None:
        """Writes the conversation to a file."""
        if not argument:
            raise ValueError("give a file's name: /save talk.json")
        if self.writer.leads:
            from llama.system import replacing

            path = Path(argument).expanduser()
            if not path.absolute().parent.is_dir():
                self._note(f"{argument} can't be written: there is no folder {path.parent}")
                return
            done = "replaced" if path.exists() else "written"
            talk = {"system": self.system, "messages": self.messages, "settings": asdict(self.sampled)}
            try:
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(talk, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                self._note(f"{argument}: {done}, {len(self.messages)} messages")
            except OSError as error:
                self._note(f"{argument} can't be written ({error.strerror})")

    def load(self, argument: str, contents: str) -> None:
        """Goes on with a conversation from a file of /save."""
        try:
            talk = json.loads(contents)
            messages: list[Message] = [
                {"role": message["role"], "content": str(message["content"])} for message in talk["messages"]
            ]
            whole = [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{argument} is no conversation: give a file that /save wrote")
        self.system = talk.get("system")
        self.files, self.cut = "", False
        self._keep(messages)
        self._note(f"{argument}: {len(messages)} messages")

    def stats(self, argument: str, contents: str) -> None:
        """Shows tokens, speed, and how much of the context is used."""
        speed = f"{self.written / self.seconds:.1f} tokens a second" if self.seconds else "nothing written yet"
        used = f"context {self.used:,}{self._of_context()} tokens"
        self._note(f"{len(self.messages)} messages; {used}; {self.written:,} tokens written, {speed}")

    # Answers ---------------------------------------------------------------------------------------------------------

    def _ask(self, messages: list[Message], begun: str = "") -> None:
        """Answers messages, of which the last is the user's, and keeps them with the answer. `begun` is an answer to go
        on with."""
        length = self._make_room(messages, begun)
        sampled = replace(self.sampled, seed=(self.sampled.seed + self.tries) % 2**63)
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        pieces = self.writer.write([*opening, *messages[self.dropped :]], begun, sampled)
        text, count, reason, began = begun, 0, "stopped", 0.0
        try:
            for piece in pieces:
                began = began or time.monotonic()  # reading the conversation is no part of the speed
                text, count, reason = text + piece.text, count + piece.tokens, piece.reason or reason
                self._say(piece.text)
        except KeyboardInterrupt:
            self._say(" [stopped]")
        finally:
            pieces.close()
            self._say("\n")
        seconds = time.monotonic() - began if count else 0.0
        self.seconds, self.written, self.used = self.seconds + seconds, self.written + count, (length or 0) + count
        self.cut, self.messages = reason in ("length", "stopped"), [*messages, {"role": "assistant", "content": text}]
        self._figures(count, seconds, reason)

    def _figures(self, count: int, seconds: float, reason: str) -> None:
        cut = f"cut after {count:,} tokens: /continue goes on" if reason == "length" else ""
        if self.writer.context is not None and self.used >= self.writer.context:
            cut = "cut, since the context is full: /reset, or a longer --max_seq_len"
        if self.shows_figures:
            speed = f"{count:,} token{'s' if count != 1 else ''}"
            speed += f", {(count - 1) / max(seconds, 1e-9):,.0f} a second" if count > 1 else ""
            cut = "; ".join(filter(None, (speed, f"context {self.used:,}{self._of_context()}", cut)))
        if cut:
            self._note(cut)

    def _of_context(self) -> str:
        return "" if self.writer.context is None else f" of {self.writer.context:,}"

    def _make_room(self, messages: list[Message], begun: str) -> int | None:
        """Leaves out the oldest turns where the context has no room for all, and says so. Returns how many tokens will
        be read, where that is known. ValueError where the last message alone is too long."""
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        context, length, before = self.writer.context, 0, min(self.dropped, len(messages) - 1)
        for first in range(before, len(messages), 2):
            found = self.writer.length([*opening, *messages[first:]], begun)
            if found is None or context is None:
                return found
            length, room = found, min(max(self.sampled.max_gen_len, 1), context // 4)
            if length + room <= context or (length < context and first == len(messages) - 1):
                self.dropped = first
                if first > before:
                    self._note(f"the context is full: the oldest {first - before} messages are left out from now on")
                return length
        raise ValueError(f"the message has {length:,} tokens, but the context has room for {context:,}: shorten it")

    def _say(self, text: str) -> None:
        if self.writer.leads:
            print(text, end="", flush=True)

    def _keep(self, messages: list[Message]) -> None:
        self.messages, self.dropped = list(messages), min(self.dropped, max(len(messages) - 2, 0))

    def _note(self, text: str) -> None:
        note(text) if self.writer.leads else None


ACTS: dict[str, Callable[[Chat, str, str], None]] = {
    "/help": Chat.help,
    "/reset": Chat.reset,
    "/undo": Chat.undo,
    "/retry": Chat.retry,
    "/continue": Chat.go_on,
    "/system": Chat.set_system,
    "/set": Chat.set,
    "/file": Chat.file,
    "/save": Chat.save,
    "/load": Chat.load,
    "/stats": Chat.stats,
}
ARGUMENTS = {"/system": "TEXT", "/set": "temperature 0.5", "/file": "PATH", "/save": "FILE", "/load": "FILE"}
EXITS = ("/exit", "/quit", "/bye", "quit", "exit")


def usage(name: str) -> str:
    return f"{name} {ARGUMENTS.get(name, '')}".strip()


def note(text: str) -> None:
    """Says what is no part of the conversation: dim at a terminal; on standard error, so a pipe has answers alone."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)


Act = tuple[str, str, str]
"""A command's name, its argument, and what the file that it names holds."""


def next_act(reader: Reader) -> Act | None:
    """What the user wants next, on rank 0; what can't be is said, and asked again. None at the end."""
    while (line := reader.read()) is not None:
        text = line.strip()
        if text in EXITS:
            return None
        if text.startswith('"""'):
            return "say", text.strip('"').strip("\n"), ""
        if not text.startswith("/"):
            if text:
                return "say", text, ""
            continue
        name, _, argument = text.partition(" ")
        argument = argument.strip()
        if name not in ACTS:
            note(f"there is no {name}{nearest(name, [*ACTS, *EXITS])} (/help lists what there is)")
            continue
        contents = ""
        try:
            if name in ("/file", "/load"):
                if not argument:
                    raise ValueError(f"give a file's name: {usage(name)}")
                contents, _ = decoded(Path(argument).expanduser().read_bytes(), argument)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            note(f"{argument} can't be read ({reason})" if reason else str(error))
            continue
        return name, argument, contents
    return None


def chat(
    *,
    system: MaybeText = None,
    temperature: Temperature = 0.2,
    top_p: Share = 0.95,
    top_k: MaybeCount = None,
    max_gen_len: Amount = 1024,
    stop: Stops = (),
    seed: Seed = 1,
    talk: MaybeExisting = None,
    server: MaybeText = None,
    load_cache: MaybeExisting = None,
    save_cache: MaybeTarget = None,
    **loading: Unpack[Loading],
) -> None:
    r"""A conversation. /help lists its commands; Ctrl-C stops an answer, Ctrl-D or /exit ends.

    Through a pipe each line is a message, and several lines between triple quotes are one. (Under torchrun, Ctrl-C
    reaches the launcher, which ends all ranks.)

    Args:
        system: a system message.
        temperature: how much chance there is in each choice (0: none, always the likeliest token).
        top_p: draw from the likeliest tokens that have this share of the probability.
        top_k: draw from so many of the likeliest tokens.
        max_gen_len: tokens of each answer at most.
        stop: end before this text; may be given several times; \n is a line end.
        seed: of the draws; the same seed gives the same answers.
        talk: a conversation saved by /save, to go on with.
        server: the address of a running `codellama serve`, or of another server of OpenAI's API, to write the answers.
        load_cache: a file made by --save_cache: what it holds isn't read again.
        save_cache: a file to keep what was read and written.
    """
    saved = ""
    if talk is not None and os.environ.get("RANK", "0") == "0":
        saved, _ = decoded(Path(talk).read_bytes(), talk)
    sampled = Sampled(temperature, top_p, top_k, max_gen_len, seed, stop)
    with ExitStack() as until_the_end:
        writer: Writer
        if server is not None:
            writer = Remote(server_of(server, loading, load_cache, save_cache))
        else:
            llama = load_to_use(loading, seed)
            until_the_end.enter_context(cache_files(llama, load_cache, save_cache))
            writer = Model(llama)
        conversation = Chat(writer, sampled, system)
        reader: Reader = Terminal(list(ACTS)) if is_terminal() else Lines()
        if is_terminal():
            note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        first: Act | None = ("/load", talk, saved) if talk is not None else None
        while (act := writer.agree(first or (next_act(reader) if writer.leads else None))) is not None:
            first = None
            try:
                (Chat.say if act[0] == "say" else ACTS[act[0]])(conversation, *act[1:])
            except ValueError as error:
                conversation._note(str(error))
