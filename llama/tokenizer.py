"""Text to ids and back: SentencePiece, the infilling marks, and text as it arrives token by token.

Code Llama's tokenizer is a SentencePiece BPE model whose pieces write a space as `▁`. Two of its habits need care.
It puts a space before every text it encodes and takes one from every text it decodes, which would shift the
indentation of code that is cut in the middle; and its infilling marks (`▁<PRE>` and so on) are ordinary pieces, so
that a user's text could produce them. Here a mark gets into a prompt by its id alone, and text stays text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from llama.errors import CheckpointError

MARKS = ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<step>", *("▁<EOT>" * n for n in range(2, 7)))
"""Pieces with a meaning, which text must not produce."""


class Traits(NamedTuple):
    """What a vocabulary's files say besides its pieces; the defaults are those of a tokenizer.model alone."""

    ends: frozenset[int] | None = None
    """Ids that end a text; None: eos."""
    adds_bos: bool = True
    before: str = "☺"
    """A piece of its own in Code Llama's vocabulary: what follows it is encoded as the middle of a text."""
    byte_of: Callable[[int], bytes] | None = None
    """The bytes of a token of a byte-level vocabulary."""
    dialog: Callable[[Any], list[int]] | None = None
    """A dialog's ids in the checkpoint's own format."""


OPENERS: dict[str, Callable[[str], tuple[Any, Traits]]] = {}
"""What opens another kind of tokenizer, by its file's ending: an object with SentencePieceProcessor's methods, and its
traits. llama.interop puts in its own."""


def _sentencepiece(path: str) -> tuple[Any, Traits]:
    try:
        return SentencePieceProcessor(model_file=path), Traits()
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a SentencePiece model ({os.path.getsize(path):,} bytes): "
            "download it again; the published one is 499,723 bytes or a little more"
        ) from error


class Tokenizer:
    """A tokenizer.model. Ids that it lacks are None (`prefix_id` … `eot_id` without infilling, `step_id` but for 70B
    Instruct); `pad_id` is -1, since Llama has no pad piece."""

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        """Raises CheckpointError where there is no SentencePiece model at `model_path`."""
        if not os.path.isfile(model_path):
            raise CheckpointError(f"there is no tokenizer at {model_path}; pass the path of a tokenizer.model")
        opened = OPENERS.get(os.path.splitext(model_path)[1], _sentencepiece)
        self.sp_model, traits = opened(os.fspath(model_path))
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        self.prefix_id = self._id("▁<PRE>")
        self.middle_id = self._id("▁<MID>")
        self.suffix_id = self._id("▁<SUF>")
        self.eot_id = self._id("▁<EOT>")
        self.step_id = self._id("<step>")
        self.traits, self.dialog = traits, traits.dialog
        self.ends = frozenset({self.eos_id}) if traits.ends is None else traits.ends
        self._spelled = {i: self._spell(self.token_piece(i)) for m in MARKS if (i := self._id(m)) is not None}
        self._before: list[int] = self.sp_model.encode(traits.before)

    def _id(self, piece: str) -> int | None:
        found: int = self.sp_model.piece_to_id(piece)
        return None if found == self.sp_model.unk_id() else found

    def _spell(self, mark: str) -> list[int]:
        """The ids that spell a mark as plain text, character by character."""
        ids: list[int] = []
        for character in mark:
            known = self._id(character)
            ids += [known] if known is not None else [self._id(f"<0x{b:02X}>") or 0 for b in character.encode()]
        return ids

    @property
    def can_infill(self) -> bool:
        return None not in (self.prefix_id, self.middle_id, self.suffix_id, self.eot_id)

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Ids of a text, on request between the ids that begin and end a sequence. What looks like a mark in it is
        spelled out as the text that it is. ValueError for halves of surrogate pairs, which are no text."""
        try:
            ids: list[int] = self.sp_model.encode(s.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has a lone surrogate at {error.start}: read it as UTF-8") from None
        if not self._spelled.keys().isdisjoint(ids):
            ids = [part for i in ids for part in self._spelled.get(i, [i])]
        return [self.bos_id] * (bos and self.traits.adds_bos) + ids + [self.eos_id] * eos

    def encode_infilling(self, s: str) -> list[int]:
        """Ids of a text in the middle of another: without the space that SentencePiece puts before every text."""
        return self.encode(self.traits.before + s, bos=False, eos=False)[len(self._before) :]

    def decode(self, t: Sequence[int]) -> str:
        """The text of ids. One leading space is taken off, the one that `encode` put there."""
        text: str = self.sp_model.decode(list(t))
        return text

    def decode_infilling(self, t: Sequence[int]) -> str:
        """The text of ids in the middle of a text: no space is taken off."""
        return self.decode([*self._before, *t])[len(self.traits.before) :]

    def token_piece(self, t: int) -> str:
        piece: str = self.sp_model.id_to_piece(t)
        return piece

    def byte_of(self, t: int) -> bytes:
        """The byte that a piece of byte fallback stands for, or those of a byte-level piece; b"" for every other."""
        if self.traits.byte_of is not None:
            return self.traits.byte_of(t)
        return bytes([int(self.token_piece(t)[3:5], 16)]) if self.sp_model.is_byte(t) else b""


class Detokenizer:
    """Text as it arrives: `push` gives what each token adds, and the parts add up to the text of all tokens.

    A character spread over several byte pieces comes whole with its last byte. `continues` says that the tokens
    follow others, so that a first space belongs to the text; otherwise it is taken off, as `Tokenizer.decode` does.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = True) -> None:
        self._tokenizer = tokenizer
        self._continues = continues
        self._held: list[int] = []
        self._bytes = b""

    def push(self, token: int) -> str:
        """The text that is certain with this token; "" while a character is incomplete."""
        self._held.append(token)
        byte = self._tokenizer.byte_of(token)
        self._bytes = self._bytes + byte if byte else b""
        return "" if _ends_within_character(self._bytes) else self.flush()

    def flush(self) -> str:
        """The text that is held back, an incomplete character as U+FFFD: for the end of the tokens."""
        if not self._held:
            return ""
        decode = self._tokenizer.decode_infilling if self._continues else self._tokenizer.decode
        text = decode(self._held)
        # Control pieces such as bos leave no text and don't use up the space.
        self._continues = self._continues or any(not self._tokenizer.sp_model.is_control(t) for t in self._held)
        self._held, self._bytes = [], b""
        return text


def _ends_within_character(data: bytes) -> bool:
    """Whether the last bytes are the beginning of a UTF-8 character that more bytes could complete."""
    for length in range(1, min(3, len(data)) + 1):
        if data[-length] >= 0xC0:
            try:
                data[-length:].decode()
            except UnicodeDecodeError as error:
                return error.reason == "unexpected end of data"
            return False
    return False


class StopStrings:
    """Text as it comes, held back while its end could begin one of some strings, and cut before the first that is
    complete. However the text is divided, the same comes out."""

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise ValueError("a stop string is empty; give at least one character, or leave it out")
        self._strings = strings
        self._held = ""
        self.certain = 0
        """How many characters have come out."""
        self.found = False

    @property
    def length(self) -> int:
        """How many characters went in."""
        return self.certain + len(self._held)

    def push(self, text: str) -> str:
        """The text that no stop string can cut any more."""
        if self.found:
            return ""
        self._held += text
        ends = [(i + len(s), i) for s in self._strings if (i := self._held.find(s)) >= 0]
        if ends:
            self.found = True
            cut = min(ends)[1]
        else:
            cut = len(self._held) - max((self._overlap(s) for s in self._strings), default=0)
        out, self._held = self._held[:cut], "" if self.found else self._held[cut:]
        self.certain += len(out)
        return out

    def flush(self) -> str:
        """What is held back, once no more text will come."""
        out, self._held = self._held, ""
        self.certain += len(out)
        return out

    def _overlap(self, string: str) -> int:
        """The length of the longest end of the held text that is a beginning of `string`."""
        longest = min(len(self._held), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)
