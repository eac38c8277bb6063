"""Prompts: from what a user writes to the ids that the model was trained on.

Code Llama does three jobs, and a prompt is how it is told which: plain text is continued; a prefix and a suffix
around infilling marks are given their middle (arXiv 2308.12950, section 2.3); a dialog between special tags is
answered. Every job ends in one thing, a `Prompt`: ids, the ids that end the answer, and how its text begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class _Message(TypedDict):
    role: Role
    content: str


class Message(_Message, total=False):
    """One turn of a dialog. `destination` is where the answers of the turn format go; prompts don't need it."""

    destination: str


Dialog = Sequence[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>", "<step>")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


FinishReason = Literal["stop", "length", "refused", "error"]
"""The model or a `stop` ended the answer; it reached max_gen_len or max_seq_len; the dialog was not answered; an error
ended it, such as logits that are not finite."""


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    stop: frozenset[int]
    """Ids that end the answer, and are no part of it."""
    continues: bool = True
    """The answer's text continues the prompt's, so a first space belongs to it. A chat's answer stands alone."""


def completion(tokenizer: Tokenizer, text: str) -> Prompt:
    """bos and the text, to be continued up to eos."""
    return Prompt(tokenizer.encode(text, bos=True, eos=False), tokenizer.ends, continues=text != "")


def infilling(tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool = False) -> Prompt:
    """What stands between `prefix` and `suffix` is asked for: PSM order, or SPM with `suffix_first`.

    Raises ValueError where the tokenizer has no infilling marks.
    """
    pre, suf, mid, eot = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id
    if pre is None or suf is None or mid is None or eot is None:
        raise ValueError(
            "this checkpoint can't infill: its tokenizer has no <PRE>, <SUF>, <MID> and <EOT>. "
            "Use the 7B, 13B or 70B base or Instruct models (not the Python ones, and not 34B)"
        )
    before = tokenizer.encode(prefix, bos=False, eos=False)
    after = tokenizer.encode_infilling(suffix)
    ids = [pre, suf, *after, mid, *before] if suffix_first else [pre, *before, suf, *after, mid]
    return Prompt(tokenizer.encode("", bos=True, eos=False) + ids, tokenizer.ends | {eot})


def dialog(tokenizer: Tokenizer, messages: Dialog) -> Prompt:
    """The format of the checkpoint at hand: its own chat template's, where it has another one than Llama's; turns where
    its tokenizer has `<step>` (70B Instruct); else `[INST]`.

    An optional system message first, then user and assistant in turn, the last from the user; ValueError otherwise,
    and where a message contains a special tag.
    """
    check_dialog(messages)
    if has_special_tags(messages):
        raise ValueError(f"{UNSAFE_ERROR} They are {', '.join(SPECIAL_TAGS)}")
    if tokenizer.dialog is not None:
        return Prompt(tokenizer.dialog(messages), tokenizer.ends, continues=False)
    return _turns(tokenizer, messages) if tokenizer.step_id is not None else _inst(tokenizer, messages)


def has_special_tags(messages: Dialog) -> bool:
    """Whether a message tries to speak in tags. `Llama.chat_completion` answers such a dialog with UNSAFE_ERROR."""
    return any(tag in message["content"] for message in messages for tag in SPECIAL_TAGS)


def check_dialog(messages: Dialog) -> None:
    """Raises ValueError, naming the message, where the roles or contents can't be those of a dialog."""
    for i, message in enumerate(messages):
        given = (message.get("content"), message.get("role")) if isinstance(message, Mapping) else (None, None)
        if not isinstance(given[0], str) or given[1] not in ("system", "user", "assistant"):
            raise ValueError(
                f"message {i} of the dialog is {message!r}; it needs a role (system, user or assistant) and a content"
            )
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or turns[-1] != "user":
        allowed = "an optional system message, then user and assistant in turn, with a user message last"
        raise ValueError(f"the dialog's roles are {roles}; allowed are {allowed}")


def _inst(tokenizer: Tokenizer, messages: Dialog) -> Prompt:
    """`[INST] question [/INST] answer `, each finished turn between bos and eos; the system message, between
    `<<SYS>>` tags, opens the first question."""
    contents = [message["content"].strip() for message in messages]
    if messages[0]["role"] == "system":
        # Only the whole first question is stripped, not the system message alone.
        contents = [B_SYS + messages[0]["content"] + E_SYS + messages[1]["content"], *contents[2:]]
    tokens: list[int] = []
    for question, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        tokens += tokenizer.encode(f"{B_INST} {question.strip()} {E_INST} {answer} ", bos=True, eos=True)
    tokens += tokenizer.encode(f"{B_INST} {contents[-1].strip()} {E_INST}", bos=True, eos=False)
    return Prompt(tokens, tokenizer.ends, continues=False)


def _turns(tokenizer: Tokenizer, messages: Dialog) -> Prompt:
    """` Source: role`, a blank line, the content and `<step>` for each message; then the header of the reply, the
    only one that bears a destination."""

    def text(s: str) -> list[int]:
        return tokenizer.encode(s, bos=False, eos=False)

    assert tokenizer.step_id is not None
    tokens = [tokenizer.bos_id]
    for message in messages:
        content = message["content"].strip()
        tokens += text(f" Source: {message['role']}")
        tokens += text(f"\n\n {content}") if content else []
        tokens.append(tokenizer.step_id)
    tokens += text(" Source: assistant\nDestination: user") + text("\n\n ")
    return Prompt(tokens, tokenizer.ends | {tokenizer.step_id}, continues=False)


# Answers, as the jobs return them ---------------------------------------------------------------------------------


class Details(TypedDict, total=False):
    """What results hold more with `logprobs`: the pieces, and their log-probabilities (None for the very first)."""

    tokens: list[str]
    logprobs: list[float | None]


class CompletionPrediction(Details, total=False):
    generation: str
    finish_reason: FinishReason | None


class InfillingPrediction(CompletionPrediction, total=False):
    full_text: str


class ChatPrediction(Details, total=False):
    generation: Message
    finish_reason: FinishReason | None
