"""Structured output: which tokens may come next, so that the whole answer is one of a language.

A grammar (a regular expression, a JSON schema, Lark or GBNF rules, a few choices) is compiled by llguidance into a
parser of bytes. For each step of an answer it says which pieces of the vocabulary continue a text of the language, as
a mask for `Request.allowed`. Two habits of SentencePiece are taken into account. A byte that no piece contains has a
piece of its own, so a character may come in several tokens. And an answer that stands alone (a chat's) loses its first
space, so its first piece is masked by what remains of it.

Ids that end the answer are allowed exactly where the text is complete. Where the next bytes can only be these, the
mask may allow only the tokens that the tokenizer itself would write them in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llama.lookup import agreeing
from llama.prompts import Prompt
from llama.tokenizer import MARKS, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r" |\n{1,2}[ \t]{0,20}"
"""Between the parts of JSON, once or not at all: a model that writes nothing but spaces would never end."""
MOST = 1_000_000
"""Characters of a grammar."""
KINDS = ("regex", "json_schema", "json_object", "lark", "gbnf", "choice")


def compile_grammar(
    tokenizer: Tokenizer,
    *,
    regex: str | None = None,
    json_schema: Mapping[str, Any] | str | bool | None = None,
    json_object: bool = False,
    lark: str | None = None,
    gbnf: str | None = None,
    choice: Sequence[str] | None = None,
) -> Grammar:
    """The grammar of one of these: texts that a `regex` matches as a whole (Rust's syntax: no look-around, no
    back-references; \\d, \\w and \\s are ASCII's), JSON by a schema or any JSON object, rules in `lark` as llguidance
    reads it or in `gbnf` as llama.cpp does, or one of a few texts. Raises ValueError for what can't be compiled, and
    where llguidance is missing."""
    asked: dict[str, Any] = {
        "regex": regex,
        "json_schema": json_schema,
        "json_object": json_object or None,
        "lark": lark,
        "gbnf": gbnf,
        "choice": choice,
    }
    given = {kind: value for kind, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"a grammar is given by {', '.join(given) or 'nothing'}; give one of {', '.join(KINDS)}")
    [(kind, value)] = given.items()
    compiler = _llguidance()
    if kind == "choice":
        kind, value = "regex", _alternatives(value)
    if kind in ("regex", "lark", "gbnf") and not isinstance(value, str):
        raise ValueError(f"{kind} is {value!r:.80}; give a text")
    try:
        if kind == "regex":
            regex = compiler.regex_to_lark(_without_anchors(_sized(kind, value)), "dws")
            source = compiler.LLMatcher.grammar_from_lark(f"start: /{regex}/")
        elif kind == "gbnf":
            source = compiler.LLMatcher.grammar_from_lark(_lark_of(_sized(kind, value)))
        elif kind == "lark":
            source = compiler.LLMatcher.grammar_from_lark(_sized(kind, value))
        else:
            source = _json(compiler, {"type": "object"} if kind == "json_object" else value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{kind} can't be read ({str(error) or type(error).__name__:.300})") from error
    vocabulary = _vocabulary(tokenizer)
    return Grammar(vocabulary, source, _matcher(vocabulary.inner, source, kind))


class Grammar:
    """A compiled grammar, for any number of answers at a time."""

    def __init__(self, vocabulary: Vocabulary, source: str, matcher: LLMatcher) -> None:
        self._vocabulary, self._source, self._matcher = vocabulary, source, matcher
        self._alone: Tensor | None = None

    def start(self, prompt: Prompt | None = None) -> Answer:
        """What `Request.allowed` takes, for one answer to `prompt`, whose ids end it. Without a prompt, eos does, and
        the text continues another."""
        vocabulary = self._vocabulary
        stop = frozenset({vocabulary.tokenizer.eos_id}) if prompt is None else prompt.stop
        first = None if prompt is None or prompt.continues else self._first_alone()
        return Answer(vocabulary, self._matcher.deep_copy(), sorted(stop), first)

    def _first_alone(self) -> Tensor:
        """The first token's mask (V,) where its leading space is no part of the text."""
        if self._alone is None:
            vocabulary = self._vocabulary
            mask = vocabulary.mask(_matcher(vocabulary.alone, self._source, "it"))
            mask[vocabulary.spaces] = True  # a space alone leaves no text
            self._alone = mask
        return self._alone


class Answer:
    """One answer's place in its grammar: a function of the answer's tokens so far to the mask (V,) of what may come
    next. It may be called with any list; what this one shares with the last one isn't parsed again."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, stop: list[int], first: Tensor | None) -> None:
        self._vocabulary, self._matcher, self._stop, self._first = vocabulary, matcher, stop, first
        self._tokens: list[int] = []  # those that were read
        self._steps = [0]  # how many of the parser's tokens stand for the first i

    def __call__(self, answer: list[int]) -> Tensor:
        """Raises ValueError where the grammar has become too complex for the parser."""
        if not self._read(answer):
            return self._ended(torch.zeros(self._vocabulary.size, dtype=torch.bool, device="cpu"), True)
        if not answer and self._first is not None:
            return self._ended(self._first.clone(), self._matcher.is_accepting())
        mask = self._vocabulary.mask(self._matcher)
        return self._ended(mask, bool(mask[self._vocabulary.tokenizer.eos_id]))

    def _ended(self, mask: Tensor, complete: bool) -> Tensor:
        mask[self._vocabulary.tokenizer.eos_id] = False
        mask[self._stop] = complete
        return mask

    def _read(self, answer: list[int]) -> bool:
        """Brings the parser to the end of `answer`. False where that is no beginning of a text of the language."""
        known = len(self._tokens)
        if answer[:known] != self._tokens:
            known = agreeing(answer, self._tokens)
            self._matcher.rollback(self._steps[-1] - self._steps[known])
            del self._tokens[known:], self._steps[known + 1 :]
        for token in answer[known:]:
            alone = not self._tokens and self._first is not None
            steps = self._vocabulary.spelled(token) if alone else [token]
            read = self._matcher.try_consume_tokens(steps) if token not in self._vocabulary.silent else -1
            if read != len(steps):
                self._matcher.rollback(max(read, 0))
                return False
            self._tokens.append(token)
            self._steps.append(self._steps[-1] + len(steps))
        return True


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's pieces as bytes, for the parser."""

    tokenizer: Tokenizer
    inner: LLTokenizer
    """Of pieces that follow others."""
    alone: LLTokenizer
    """Of the first piece of a text that stands alone: without its leading space."""
    spaces: list[int]
    """Ids of the pieces that are a space and nothing else."""
    silent: frozenset[int]
    """Ids that a text never contains: control pieces, and the marks."""

    @property
    def size(self) -> int:
        return self.tokenizer.n_words

    def mask(self, matcher: LLMatcher) -> Tensor:
        """(V,) of what may follow; eos where the text is complete."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise ValueError(f"the grammar is too complex ({_reason(matcher)}): simplify it")
        return torch.from_numpy(np.unpackbits(bits, count=self.size, bitorder="little").view(np.bool_))

    def spelled(self, token: int) -> list[int]:
        """The bytes' pieces of a token that begins a text which stands alone."""
        text = _bytes_of(self.tokenizer, token)
        piece = not self.tokenizer.byte_of(token)
        return _byte_pieces(self.tokenizer, text[1:] if piece and text.startswith(b" ") else text)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    compiler = _llguidance()
    model, ids = tokenizer.sp_model, range(tokenizer.n_words)
    marks = {i for mark in MARKS if (i := model.piece_to_id(mark)) != model.unk_id()}
    silent = frozenset(i for i in ids if model.is_control(i) or model.is_unknown(i) or i in marks)
    if any(model.piece_to_id(f"<0x{byte:02X}>") == model.unk_id() for byte in range(256)):
        raise ValueError("this tokenizer has no pieces for single bytes, which a grammar needs: train it with them")
    texts = [b"\xff" + str(i).encode() if i in silent else _bytes_of(tokenizer, i) for i in ids]
    first = [t[1:] if t.startswith(b" ") and not model.is_byte(i) else t for i, t in enumerate(texts)]
    inner = compiler.LLTokenizer(_Pieces(tokenizer, texts, sorted(silent), alone=False))
    alone = compiler.LLTokenizer(_Pieces(tokenizer, first, sorted(silent), alone=True))
    return Vocabulary(tokenizer, inner, alone, [i for i, text in enumerate(first) if not text], silent)


class _Pieces:
    """What llguidance asks of a tokenizer, by its names."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, texts: list[bytes], silent: list[int], alone: bool) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens, self.special_token_ids = texts, silent
        self._tokenizer, self._alone = tokenizer, alone

    def __call__(self, text: str) -> list[int]:
        """The ids in which `text` is written where nothing else may come. U+2581 would become a space."""
        if "\u2581" in text:
            return _byte_pieces(self._tokenizer, text.encode())
        encode = self._tokenizer.encode_infilling
        return self._tokenizer.encode(text, bos=False, eos=False) if self._alone else encode(text)


def _bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.byte_of(token) or tokenizer.token_piece(token).replace("\u2581", " ").encode()


def _byte_pieces(tokenizer: Tokenizer, text: bytes) -> list[int]:
    return [tokenizer.sp_model.piece_to_id(f"<0x{byte:02X}>") for byte in text]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError("grammars are compiled by llguidance: pip install 'codellama[grammar]'") from error
    return llguidance


def _matcher(tokenizer: LLTokenizer, source: str, kind: str) -> LLMatcher:
    """A parser at the beginning of a text. Its first mask is made here: what is too complex shows there."""
    compiler = _llguidance()
    limits = compiler.LLParserLimits(verbose_errors=False)
    matcher: LLMatcher = compiler.LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(f"{kind} can't be compiled: {_reason(matcher)}")
    return matcher


def _reason(matcher: LLMatcher) -> str:
    error = " ".join(re.split("<state>|<non-verbose", matcher.get_error())[0].split())[:300]
    return "no text fits it" if error.startswith("NoExtension") else error


def _json(compiler: Any, schema: Any) -> str:
    if isinstance(schema, (str, bytes)):
        schema = json.loads(_sized("json_schema", schema))
    if not isinstance(schema, (Mapping, bool)):
        raise ValueError(f"a schema is an object; this is {schema!r:.80}")
    text = _sized("json_schema", json.dumps({} if schema is True else schema))
    options = {"whitespace_pattern": WHITESPACE, "json_allow_general_unicode_escapes": True}
    source: str = compiler.LLMatcher.grammar_from_json_schema(text, overrides=options)
    return source


def _lark_of(gbnf: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(gbnf)
    except Exception as error:  # it raises Exception itself where a rule is missing
        raise ValueError(str(error)) from error


def _sized(kind: str, text: Any) -> Any:
    if len(text) > MOST:
        raise ValueError(f"{kind} has {len(text):,} characters; give at most {MOST:,}")
    return text


def _without_anchors(regex: str) -> str:
    """The text is matched as a whole, so ^ and $ around it say nothing; the parser knows neither."""
    regex = regex.removeprefix("^")
    cut = regex.removesuffix("$")
    escaped = (len(cut) - len(cut.rstrip("\\"))) % 2 == 1
    return regex if escaped else cut


def _alternatives(choice: Any) -> str:
    """A regex of some texts."""
    listed = isinstance(choice, Sequence) and not isinstance(choice, (str, bytes))
    if not listed or not choice or not all(isinstance(text, str) for text in choice):
        raise ValueError(f"choice is {choice!r:.80}; give a list of texts, at least one")
    try:
        return "|".join(f"({''.join(_literal(c) for c in text)})" for text in dict.fromkeys(choice))
    except UnicodeEncodeError:
        raise ValueError(f"choice is {choice!r:.80}; a text in it has half of a surrogate pair") from None


def _literal(character: str) -> str:
    character.encode()
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"
