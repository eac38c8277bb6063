"""tokenizer.json, the file of the `tokenizers` library, behind the methods of a SentencePieceProcessor.

Llama 3, DeepSeek-Coder, Qwen and SmolLM have byte-level tokenizers: a piece is a run of bytes, each written as one
visible character, so `Ġ` is a space. There is no space before a text, no unknown piece, and a character may end in the
middle of a piece. A Llama 2 tokenizer in this form keeps its space before a text, which the library puts there itself.
https://huggingface.co/docs/tokenizers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.interop.vocabulary import FIM, Said, _found


def byte_alphabet() -> dict[str, int]:
    """The character by which GPT-2's vocabulary writes each byte: itself where it is visible, else one from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTES = byte_alphabet()


def open_json(path: Path, said: Said) -> tuple[Any, str, Callable[[int], bytes] | None]:
    """The vocabulary, the text that its infilling is encoded behind, and the bytes of each token."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(f"{path} needs a package: pip install 'codellama[hf]'") from None
    try:
        library = Tokenizer.from_file(str(path))
        decoder = json.dumps(json.loads(path.read_bytes()).get("decoder"))
    except Exception as error:  # the library raises its own base class
        raise CheckpointError(
            f"{path} can't be read as a tokenizer.json ({str(error)[:200]}): download it again"
        ) from None
    vocabulary = JsonVocabulary(library, said, byte_level="ByteLevel" in decoder)
    return vocabulary, "" if vocabulary.byte_level else "☺", vocabulary.byte_of


class JsonVocabulary:
    """A tokenizer of the library, with the methods of a SentencePieceProcessor."""

    def __init__(self, library: Any, said: Said, byte_level: bool) -> None:
        self.library, self._said, self.byte_level = library, said, byte_level
        library.no_truncation()
        library.no_padding()
        self._special = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
        self._added = {i: token.content for i, token in library.get_added_tokens_decoder().items()}
        highest = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._rows = max(highest, said.rows or 0)
        marks = [family for family in FIM.values() if all(library.token_to_id(mark) is not None for mark in family[:3])]
        self._marks = dict(zip(FIM["Code Llama"], marks[0], strict=True)) if marks else {}
        begun = library.encode("a").ids[:1]
        self.adds_bos = begun == [self.bos_id()]

    def encode(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    encode_marked = encode

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.library.decode([i for i in ids if i >= 0], skip_special_tokens=True)
        return text

    def id_to_piece(self, i: int) -> str:
        found: str | None = self.library.id_to_token(i) if i >= 0 else None
        return f"[unused {i}]" if found is None else found

    def piece_to_id(self, piece: str) -> int:
        """An id; infilling's marks are found by Code Llama's names for them, and a byte as `<0x0A>`."""
        found: int | None = self.library.token_to_id(self._marks.get(piece, piece))
        if found is None and self.byte_level and piece[:3] == "<0x":
            spelled = next(char for char, byte in BYTES.items() if byte == int(piece[3:5], 16))
            found = self.library.token_to_id(spelled)
        return self.unk_id() if found is None else found

    def byte_of(self, i: int) -> bytes:
        """All bytes of a token; b"" for those that leave no text."""
        piece = self.id_to_piece(i)
        if i in self._special or self.is_unused(i):
            return b""
        if i in self._added:
            return bytes(self._added[i].encode())
        if not self.byte_level:
            return bytes([int(piece[3:5], 16)]) if self.is_byte(i) else b""
        return bytes([BYTES[char] for char in piece if char in BYTES])

    def is_control(self, i: int) -> bool:
        return i in self._special

    def is_unused(self, i: int) -> bool:
        return self.library.id_to_token(i) is None

    def is_byte(self, i: int) -> bool:
        piece = self.id_to_piece(i)
        return not self.byte_level and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")

    def is_unknown(self, i: int) -> bool:
        return i == self.unk_id()

    def get_score(self, i: int) -> float:
        return 0.0

    def vocab_size(self) -> int:
        return self._rows

    def __len__(self) -> int:
        return self._rows

    def bos_id(self) -> int:
        """The token that begins a text; where there is none, the one that ends it separates texts, as in GPT-2."""
        found = _found(self, self._said.bos)
        return self.eos_id() if found is None else found

    def eos_id(self) -> int:
        return next((i for end in self._said.ends if (i := _found(self, end)) is not None), -1)

    def unk_id(self) -> int:
        told: int | None = None
        if not self.byte_level:
            told = self.library.token_to_id("<unk>")
        return -1 if told is None else told

    def pad_id(self) -> int:
        return -1

    def merges(self) -> list[str]:
        """Pairs of pieces that join, the first ones first, as GGUF writes them."""
        found = json.loads(self.library.to_str())["model"].get("merges", [])
        return [pair if isinstance(pair, str) else " ".join(pair) for pair in found]

    def pre(self, known: Mapping[str, tuple[str, ...]]) -> str:
        """The name, in `known`, of how words are cut. ValueError where it is none of these."""
        cut = json.loads(self.library.to_str()).get("pre_tokenizer") or {}
        parts, found = cut.get("pretokenizers", [cut]), []
        for part in parts:
            if part.get("type") == "Split":
                found += list(part["pattern"].values())
            elif part.get("type") == "Digits":
                found += [r"\p{N}"]
            elif part.get("type") == "ByteLevel" and part.get("use_regex", True):
                found += known["default"]
        name = next((name for name, words in known.items() if words == tuple(found)), None)
        if name is None or not self.byte_level:
            raise ValueError(
                f"GGUF has no name for how this tokenizer.json cuts words ({found}); there are {', '.join(known)}: "
                "convert --to hf or meta"
            )
        return name

    def serialized_model_proto(self) -> bytes:
        text: str = self.library.to_str()
        return text.encode()
