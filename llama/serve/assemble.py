"""The one assembler: whatever form a client has for a prompt, it becomes ids here.

Clients ask for infilling in at least five forms: a prefix and a suffix as fields, `<FILL_ME>` in a text, llama.cpp's
fields with extra context, the raw text template `<PRE> … <SUF>… <MID>` in several spacings, and ids. The template is
text to the tokenizer, which spells marks out, so its parts are found first and each mark gets its id. A prompt that is
too long for the cache keeps what stands next to the cursor.

Token healing: where a text ends inside a word, its last piece is taken back, and the first new token must begin with
it. A model that has always seen "return" as one piece would not write "urn" after "ret".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from llama.prompts import (
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    Message,
    Prompt,
    Role,
    completion,
    dialog,
    has_special_tags,
    infilling,
)
from llama.requests import Allowed
from llama.tokenizer import MARKS, Tokenizer

FILL = "<FILL_ME>"
PRE, SUF, MID = "<PRE>", "<SUF>", "<MID>"
BOS = "<s>"
SHARE = 4
"""Of a cache that is too small for a prompt to infill: the suffix keeps at most a quarter of it, and so does context
from elsewhere; the prefix gets the rest."""


@dataclass(frozen=True)
class Assembled:
    """A prompt, and what an API must know of it to answer."""

    prompt: Prompt
    text: str = ""
    """What stands before the answer, for `echo`."""
    content: str = ""
    """All that the client sent, for a filter."""
    healed: str = ""
    """Text that was taken back: the answer begins with it, and the client has it already."""
    allowed: Allowed | None = None
    """The mask that makes the first token begin with it."""
    cut: int = 0
    """Tokens of the prompt that were left out for lack of room."""


@dataclass(frozen=True)
class Parts:
    """An infilling prompt in its parts."""

    prefix: str
    suffix: str
    begun: str = ""
    """The beginning of the middle."""
    suffix_first: bool | None = None
    """None where the client leaves the order to the server."""


def parse_template(text: str) -> Parts | None:
    """The parts of a text in the form `<PRE> prefix <SUF>suffix <MID>`; None for any other text.

    One space belongs to the template after <PRE> and before <SUF> and <MID>, where they are there. After <SUF>, one
    does only where there is none after <PRE>: clients that write `<PRE>prefix <SUF> suffix <MID>` put it there. What
    follows <MID> is the beginning of the middle; where nothing stands between <PRE> and <SUF>, it is the prefix, in
    SPM order. Line ends stay as they are.
    """
    stripped = text.lstrip().removeprefix(BOS).lstrip()
    suffix_at = stripped.find(SUF)
    middle_at = stripped.rfind(MID)
    if not stripped.startswith(PRE) or not 0 <= suffix_at < middle_at:
        return None
    prefix, suffix = stripped[len(PRE) : suffix_at], stripped[suffix_at + len(SUF) : middle_at]
    rest = stripped[middle_at + len(MID) :]
    if prefix.strip(" ") == "" and len(prefix) < 2 and rest.strip():
        return Parts(rest.removeprefix(" "), suffix.removesuffix(" "), suffix_first=True)
    if not prefix.startswith(" "):
        suffix = suffix.removeprefix(" ")
    prefix = prefix.removeprefix(" ").removesuffix(" ")
    return Parts(prefix, suffix.removesuffix(" "), rest.removeprefix(" ") if rest.strip() else "")


class Assembler:
    """Makes prompts for one tokenizer and one length of the cache."""

    def __init__(
        self, tokenizer: Tokenizer, max_seq_len: int, *, suffix_first: bool = False, heal: bool = True
    ) -> None:
        """`suffix_first` asks for infilling in SPM order, and `heal` heals tokens, unless a request says otherwise."""
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.suffix_first, self.heal = suffix_first, heal
        self._pieces = _pieces_of(tokenizer)
        marks = {tokenizer.sp_model.piece_to_id(mark) for mark in MARKS} - {tokenizer.sp_model.unk_id()}
        self._marks = frozenset(marks)

    def complete(
        self, given: str | Sequence[int], limit: int = 0, *, heal: bool | None = None, keep: int | None = None,
        stop: Sequence[str | int] = (),
    ) -> Assembled:  # fmt: skip
        """A text or ids to be continued; or to be infilled, where the text has a <FILL_ME> or is a raw template.

        `limit` is how many tokens may be written: infilling leaves room for them. `keep` keeps the last tokens of a
        longer prompt. Raises ValueError for two <FILL_ME>, and where the tokenizer can't infill.
        """
        if not isinstance(given, str):
            ids = list(given)
            text = self.tokenizer.decode(ids) if all(0 <= i < self.tokenizer.n_words for i in ids) else ""
            return Assembled(self._ended(Prompt(ids, frozenset({self.tokenizer.eos_id}))), text, text)
        if FILL in given:
            prefix, _, suffix = given.partition(FILL)
            if FILL in suffix:
                raise ValueError(f"the prompt has {given.count(FILL)} places marked {FILL}; it needs exactly one")
            return replace(self.infill(Parts(prefix, suffix), limit, heal=heal, stop=stop), text=given)
        if self.tokenizer.can_infill and (parts := parse_template(given)) is not None:
            return replace(self.infill(parts, limit, heal=heal, stop=stop), text=given)
        prompt = completion(self.tokenizer, given.removeprefix(BOS))
        cut = 0 if keep is None else max(0, len(prompt.tokens) - 1 - keep)
        prompt = replace(prompt, tokens=[*prompt.tokens[:1], *prompt.tokens[1 + cut :]])
        return replace(self._healed(self._ended(prompt), bool(heal), stop), text=given, content=given, cut=cut)

    def infill(
        self, parts: Parts, limit: int = 0, *, extra: str = "", heal: bool | None = None,
        stop: Sequence[str | int] = (),
    ) -> Assembled:  # fmt: skip
        """The middle of a prefix and a suffix. `extra` is text from elsewhere, which stands before <PRE>."""
        tokenizer = self.tokenizer
        suffix_first = self.suffix_first if parts.suffix_first is None else parts.suffix_first
        prefix = parts.prefix + parts.begun if suffix_first else parts.prefix
        prompt = infilling(tokenizer, prefix, parts.suffix, suffix_first)
        pre, before, suf, after = self._sections(prompt.tokens, suffix_first)
        begun = [] if suffix_first else tokenizer.encode_infilling(parts.begun)
        context = tokenizer.encode(extra, bos=False, eos=False) if extra else []
        room = self.max_seq_len - min(limit, self.max_seq_len // 2) - 4 - len(begun)
        total = len(context) + len(before) + len(after)
        context = context[max(0, len(context) - max(0, min(room - len(before) - len(after), room // SHARE))) :]
        after = after[: max(room - len(context) - len(before), room // SHARE, 0)]
        before = before[max(0, len(before) - max(0, room - len(context) - len(after))) :]
        cut = total - len(context) - len(before) - len(after)
        ids = [*pre[:1], *context, *pre[1:]]
        mid = tokenizer.middle_id
        assert mid is not None
        ids += [suf, *after, mid, *before] if suffix_first else [*before, suf, *after, mid, *begun]
        made = self._ended(replace(prompt, tokens=ids))
        wanted = self.heal if heal is None else heal
        cursor = len(ids) - 1 if suffix_first or begun else 1 + len(context) + len(before)
        found = self._healed(made, wanted and bool(before or begun), stop, cursor)
        content = extra + parts.prefix + parts.begun + parts.suffix
        return replace(found, cut=cut, text=parts.prefix + parts.begun, content=content)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, goes_on: bool = False) -> Assembled:
        """A dialog in the checkpoint's own format. Messages of one role that follow each other are one message.
        With `goes_on`, the last message is the beginning of an answer, and what follows it is asked for.

        Raises ValueError for roles that don't alternate even so, and for special tags in a message.
        """
        turns = in_turn(messages)
        content = "\n\n".join(turn["content"] for turn in turns)
        begun = ""
        if goes_on:
            if not turns or turns[-1]["role"] != "assistant":
                raise ValueError("continue_final_message needs a last message with the role assistant, to go on with")
            begun = turns.pop()["content"]
            if has_special_tags([Message(role="assistant", content=begun)]):
                raise ValueError(f"{UNSAFE_ERROR} They are {', '.join(SPECIAL_TAGS)}")
        prompt = dialog(self.tokenizer, turns)
        if begun:
            # The header of the turn format ends with the space that SentencePiece puts before a text.
            is_turn, tokenizer = self.tokenizer.step_id is not None, self.tokenizer
            more = tokenizer.encode_infilling(begun) if is_turn else tokenizer.encode(begun, bos=False, eos=False)
            prompt = replace(prompt, tokens=[*prompt.tokens, *more], continues=True)
        return Assembled(self._ended(prompt), content=content)

    def _sections(self, ids: list[int], suffix_first: bool) -> tuple[list[int], list[int], int, list[int]]:
        """Of an infilling prompt: bos and PRE, the prefix's ids, SUF, the suffix's. Text can't produce a mark."""
        suf, mid = self.tokenizer.suffix_id, self.tokenizer.middle_id
        assert suf is not None
        assert mid is not None
        at_suf, at_mid = ids.index(suf), ids.index(mid)
        before = ids[at_mid + 1 :] if suffix_first else ids[2:at_suf]
        return ids[:2], before, suf, ids[at_suf + 1 : at_mid]

    def _ended(self, prompt: Prompt) -> Prompt:
        """A mark ends an answer, whatever the job: its text would be nobody's."""
        return replace(prompt, stop=prompt.stop | self._marks)

    def _healed(self, prompt: Prompt, wanted: bool, stop: Sequence[str | int], at: int = -1) -> Assembled:
        """The prompt without its piece `at`, where that is part of a word and may be the beginning of longer pieces."""
        token = prompt.tokens[at]
        text = self._pieces.text.get(token, "")
        overlaps = any(isinstance(s, str) and _overlap(text, s) for s in stop)
        if not wanted or overlaps or not (text[-1:].isalnum() or text[-1:] == "_") or len(prompt.tokens) < 2:
            return Assembled(prompt)
        mask = self._pieces.starting_with(text)
        if mask is None:
            return Assembled(prompt)
        tokens = list(prompt.tokens)
        del tokens[at]
        return Assembled(replace(prompt, tokens=tokens), healed=text, allowed=lambda answer: None if answer else mask)


def in_turn(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages with the roles that a dialog has: first the system messages as one (`developer` is another word for
    it), later ones as the user's, and messages of one role that follow each other joined by a blank line."""
    found: list[Message] = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {i} has the role {role!r:.40}; allowed are system, user and assistant")
        if role == "system" and any(one["role"] != "system" for one in found):
            role = "user"
        if found and found[-1]["role"] == role:
            found[-1] = Message(role=found[-1]["role"], content=f"{found[-1]['content']}\n\n{content}")
        else:
            found.append(Message(role=cast(Role, role), content=str(content or "")))
    return found


def _overlap(text: str, stop: str) -> bool:
    """Whether a stop string lies in a text, or begins in it."""
    return stop in text or any(stop.startswith(text[at:]) for at in range(len(text)))


class Pieces:
    """The texts of a vocabulary's pieces, in order, so that those with a common beginning stand together."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        model, marks = tokenizer.sp_model, set(MARKS)
        plain = [
            i for i in range(tokenizer.n_words)
            if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
        ]  # fmt: skip
        self.text = {i: p.replace("▁", " ") for i in plain if (p := tokenizer.token_piece(i)) not in marks}
        self._sorted = sorted((text, i) for i, text in self.text.items())
        self._size = tokenizer.n_words
        self._masks: dict[str, Tensor | None] = {}

    def starting_with(self, text: str) -> Tensor | None:
        """(V,) bool: the pieces that begin with a text; None where that is one alone."""
        if text not in self._masks:
            first = bisect_left(self._sorted, (text, -1))
            ids = []
            while first < len(self._sorted) and self._sorted[first][0].startswith(text):
                ids.append(self._sorted[first][1])
                first += 1
            mask = torch.zeros(self._size, dtype=torch.bool, device="cpu")
            mask[ids] = True
            self._masks[text] = mask if len(ids) > 1 else None
        return self._masks[text]


@lru_cache(maxsize=4)
def _pieces_of(tokenizer: Tokenizer) -> Pieces:
    return Pieces(tokenizer)
