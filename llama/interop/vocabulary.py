"""A tokenizer as a folder tells it: its model, the tokens that were added since, what begins and ends a text.

Hugging Face's folders tell all that in several files, which fine-tunes change one by one. They are read here together,
into an object with the methods of a SentencePieceProcessor, so that the core's Tokenizer needs to know one kind alone.
A GGUF file's tokenizer is first laid out as such a folder (gguf_tokenizer.py). A tokenizer.model counts before a
tokenizer.json beside it, for they hold the same pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llama.errors import CheckpointError
from llama.system import TOKENIZER_FILES, read_params
from llama.tokenizer import MARKS, OPENERS, Tokenizer, Traits

IDS_ONLY = "ids_only"
"""In a tokenizer_config.json of ours: why texts can't be encoded."""
FIM: dict[str, tuple[str, str, str, str]] = {
    "Code Llama": ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    "DeepSeek-Coder": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<｜end▁of▁sentence｜>"),
    "StarCoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"),
    "Qwen2.5-Coder": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"),
    "Codestral": ("[PREFIX]", "[SUFFIX]", "[MIDDLE]", "</s>"),
}
"""Infilling marks by the family that has them: before the prefix, the suffix and the middle, and what ends it."""


@dataclass
class Added:
    """A token beyond those of the tokenizer's model, as tokenizer.json's `added_tokens` have it."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass
class Said:
    """What a folder's files say of its tokenizer besides the model."""

    folder: Path
    added: dict[int, Added] = field(default_factory=dict)
    bos: str | int | None = None
    ends: list[str | int] = field(default_factory=list)
    """What ends a text, the first one foremost; by its text or its id."""
    adds_bos: bool | None = None
    legacy: bool = True
    """Whether a space is put before a text that follows an added token, as transformers does unless told otherwise."""
    template: str | None = None
    rows: int | None = None
    ids_only: str | None = None


def tokenizer_path(folder: Path) -> Path:
    """The file that `Tokenizer` opens for a folder: tokenizer.model where nothing more is said of the tokens."""
    beside = [folder / name for name in TOKENIZER_FILES if name.endswith(".json")]
    return next((file for file in beside if file.is_file()), folder / "tokenizer.model")


def read_said(folder: Path) -> Said:
    """All that the folder's files say. CheckpointError, naming the file, for one that is no JSON object."""
    files = {name: _object(folder / name) for name in (*TOKENIZER_FILES[1:-1], "config.json", "params.json")}
    said = Said(folder)
    config, settings, generation = files["config.json"], files["tokenizer_config.json"], files["generation_config.json"]
    for name, i in files["added_tokens.json"].items():
        said.added[_id(i, folder / "added_tokens.json")] = Added(name)
    listed = files["tokenizer.json"].get("added_tokens") or []
    for entry in listed if isinstance(listed, list) else []:
        _add(said, entry.get("id") if isinstance(entry, dict) else None, entry, folder / "tokenizer.json")
    decoder = settings.get("added_tokens_decoder") or {}
    for i, entry in decoder.items() if isinstance(decoder, dict) else []:
        _add(said, i, entry, folder / "tokenizer_config.json")
    special = files["special_tokens_map.json"]
    names = [_text(part.get(f"{key}_token")) for part in (settings, special) for key in ("bos", "eos", "pad", "unk")]
    for token in said.added.values():
        token.special = token.special or token.content in names
    begins = [names[0], names[4], *(_first(part.get("bos_token_id")) for part in (config, generation))]
    said.bos = next((one for one in begins if one is not None), None)
    ends = [config.get("eos_token_id"), names[1], names[5], generation.get("eos_token_id")]
    said.ends = [
        one for end in ends for one in (end if isinstance(end, list) else [end]) if isinstance(one, (int, str))
    ]
    told = settings.get("add_bos_token")
    said.adds_bos = told if isinstance(told, bool) else None
    said.legacy = settings.get("legacy") is not False
    said.template = _template(folder, settings)
    rows = config.get("vocab_size", files["params.json"].get("vocab_size"))
    said.rows = rows if isinstance(rows, int) and rows > 0 else None
    said.ids_only = settings.get(IDS_ONLY)
    return said


def _object(path: Path) -> dict[str, Any]:
    return read_params(path) if path.is_file() else {}


def _id(i: Any, path: Path) -> int:
    try:
        found = int(i)
    except (TypeError, ValueError):
        found = -1
    if not 0 <= found < 2**24:
        raise CheckpointError(f"{path} gives a token the id {i!r:.50}: ids are 0 to {2**24 - 1}; download it again")
    return found


def _add(said: Said, i: Any, entry: Any, path: Path) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise CheckpointError(f"{path} has an added token without its content ({entry!r:.80}): download it again")
    flags = {key: bool(entry.get(key)) for key in ("special", "lstrip", "rstrip")}
    said.added[_id(i, path)] = Added(entry["content"], **flags)


def _text(token: Any) -> str | None:
    """A special token is its text, or an object that has it."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _first(ids: Any) -> int | None:
    found = ids[0] if isinstance(ids, list) and ids else ids
    return found if isinstance(found, int) else None


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {part.get("name"): part.get("template") for part in found if isinstance(part, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None


# SentencePiece with more tokens --------------------------------------------------------------------------------------


class Extended:
    """A SentencePiece model and the tokens that were added to it, with the methods of a SentencePieceProcessor."""

    def __init__(self, model: Any, said: Said) -> None:
        self._model, self._said = model, said
        self._own = int(model.vocab_size())
        highest = max([self._own - 1, *said.added]) + 1
        self._rows = max(highest, said.rows or 0)
        self.added = {i: token for i, token in said.added.items() if i >= self._own}
        self._ids = {token.content: i for i, token in self.added.items()}
        named = {model.id_to_piece(i): i for i in said.added if i < self._own}
        specials = {text: i for text, i in named.items() if model.is_control(i)}
        marked = {text: i for text, i in specials.items() if text not in ("<s>", "</s>", "<unk>")}
        self._split = pattern({**marked, **self._ids})
        self._split_all = pattern({**specials, **self._ids})
        self._every = {**specials, **self._ids}
        self._bare: list[int] = model.encode("☺")

    def encode(self, text: str | bytes) -> list[int]:
        return self._encode(text, self._split)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the special tokens stand for themselves, as a chat template writes it."""
        return self._encode(text, self._split_all)

    def _encode(self, text: str | bytes, split: re.Pattern[str] | None) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        ids: list[int] = []
        parts: list[str] = [text] if split is None else split.split(text)
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(self._every[part])
            elif part := self._stripped(parts, n):
                bare = n > 0 and not self._said.legacy
                found: list[int] = self._model.encode("☺" + part if bare else part)
                ids += found[len(self._bare) :] if bare else found
        return ids

    def _stripped(self, parts: Sequence[str], n: int) -> str:
        """A part of a text between added tokens, without the spaces that these claim."""
        text = parts[n]
        before = self.added.get(self._every[parts[n - 1]]) if n else None
        after = self.added.get(self._every[parts[n + 1]]) if n + 1 < len(parts) else None
        text = text.lstrip() if before and before.rstrip else text
        return text.rstrip() if after and after.lstrip else text

    def decode(self, ids: Sequence[int]) -> str:
        text, run, begun = "", [], False
        for i in [*ids, -1]:
            if 0 <= i < self._own:
                run.append(i)
                continue
            if run:
                text += self._model.decode([*self._bare, *run])[1:] if begun else self._model.decode(run)
                begun, run = True, []
            if i in self.added and not self.added[i].special:
                text, begun = text + self.added[i].content, True
        return text

    def id_to_piece(self, i: int) -> str:
        if i < self._own:
            found: str = self._model.id_to_piece(i)
            return found
        return self.added[i].content if i in self.added else f"[unused {i}]"

    def piece_to_id(self, piece: str) -> int:
        found: int = self._model.piece_to_id(piece)
        return self._ids.get(piece, found) if found == self._model.unk_id() else found

    def is_control(self, i: int) -> bool:
        return self.added[i].special if i in self.added else (i < self._own and bool(self._model.is_control(i)))

    def is_unused(self, i: int) -> bool:
        return bool(self._model.is_unused(i)) if i < self._own else i not in self.added

    def is_byte(self, i: int) -> bool:
        return i < self._own and bool(self._model.is_byte(i))

    def is_unknown(self, i: int) -> bool:
        return i < self._own and bool(self._model.is_unknown(i))

    def get_score(self, i: int) -> float:
        return float(self._model.get_score(i)) if i < self._own else 0.0

    def vocab_size(self) -> int:
        return self._rows

    def __len__(self) -> int:
        return self._rows

    def bos_id(self) -> int:
        found = _found(self, self._said.bos)
        return int(self._model.bos_id()) if found is None else found

    def eos_id(self) -> int:
        return next((i for end in self._said.ends if (i := _found(self, end)) is not None), int(self._model.eos_id()))

    def pad_id(self) -> int:
        return int(self._model.pad_id())

    def unk_id(self) -> int:
        return int(self._model.unk_id())

    def serialized_model_proto(self) -> bytes:
        proto: bytes = self._model.serialized_model_proto()
        return proto + json.dumps({token.content: i for i, token in self.added.items()}).encode() * bool(self.added)


def pattern(words: dict[str, int]) -> re.Pattern[str] | None:
    """What splits a text at these words, the longest first, and keeps them; None where there are none."""
    longest = sorted(filter(None, words), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest)) + ")") if longest else None


def _found(model: Any, token: str | int | None) -> int | None:
    """A token's id, by its text or its id; None where the vocabulary has none."""
    if isinstance(token, int):
        return token if 0 <= token < model.vocab_size() else None
    i: int | None = None if token is None else model.piece_to_id(token)
    unknown = i is not None and i == model.unk_id() and model.id_to_piece(i) != token
    return None if unknown else i


class IdsOnly:
    """A vocabulary whose texts nobody here can encode: a model is given ids, and answers in <ids>."""

    def __init__(self, said: Said) -> None:
        self._said, self._rows = said, said.rows or 0
        self.vocab_size = self.__len__

    def __len__(self) -> int:
        return self._rows

    def encode(self, text: str | bytes) -> list[int]:
        if text and text not in ("☺", "☺".encode()):
            raise ValueError(f"{self._said.ids_only}: give the model ids (generate, stream), or pass --tokenizer_path")
        return []

    encode_marked = encode

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(self.id_to_piece, ids))

    def id_to_piece(self, i: int) -> str:
        return f"<{i}>"

    def piece_to_id(self, piece: str) -> int:
        return -1

    def _never(self, i: int) -> bool:
        return False

    is_control = is_byte = is_unused = is_unknown = _never

    def get_score(self, i: int) -> float:
        return 0.0

    def bos_id(self) -> int:
        return self._said.bos if isinstance(self._said.bos, int) else -1

    def eos_id(self) -> int:
        return next((end for end in self._said.ends if isinstance(end, int)), -1)

    def unk_id(self) -> int:
        return -1

    pad_id = unk_id

    def serialized_model_proto(self) -> bytes:
        return b""


# Opening -------------------------------------------------------------------------------------------------------------


def open_folder(path: str) -> tuple[Any, Traits]:
    """What the core's Tokenizer asks for, of the folder in which the file `path` stands."""
    folder = Path(path).parent
    said = read_said(folder)
    if said.ids_only is not None:
        model: Any = IdsOnly(said)
        return model, Traits(_ends(model, said), said.adds_bos is not False, "")
    model, text, byte_of = _model(said)
    if said.adds_bos is None:
        said.adds_bos = True if isinstance(model, Extended) else bool(model.adds_bos)
    return model, Traits(_ends(model, said), said.adds_bos, text, byte_of, _dialog(model, said))


def _ends(model: Any, said: Said) -> frozenset[int]:
    """What ends a text. The marks of infilling and of turns end an answer of their own job alone."""
    told = {i for end in said.ends if (i := _found(model, end)) is not None}
    own = MARKS if isinstance(model, Extended) else ()  # other families' marks end a text as well
    marks = {i for mark in own if (i := _found(model, mark)) is not None}
    return frozenset((told - marks) | {model.eos_id()})


def _model(said: Said) -> tuple[Any, str, Callable[[int], bytes] | None]:
    own, json_file = said.folder / "tokenizer.model", said.folder / "tokenizer.json"
    if own.is_file():
        try:
            return Extended(SentencePieceProcessor(model_file=str(own)), said), "☺", None
        except Exception as error:  # of a kind of its own; tokenizer.json may serve
            if not json_file.is_file():
                raise CheckpointError(f"{own} is not a SentencePiece model: download it again") from error
    if not json_file.is_file():
        raise CheckpointError(
            f"{said.folder} has neither tokenizer.model nor tokenizer.json: download one, or pass --tokenizer_path"
        )
    from llama.interop.tokenizer_json import open_json

    return open_json(json_file, said)


def _dialog(model: Any, said: Said) -> Callable[[Any], list[int]] | None:
    """The folder's own chat template as a function of a dialog; None where it is Llama 2's or Code Llama's format,
    which the core writes without the template, id for id."""
    template = said.template
    if template is None or "<<SYS>>" in template or "Source: " in template:
        return None
    from llama.interop.chat_template import ChatTemplate

    return ChatTemplate(template, model, f"the chat template of {said.folder}")


OPENERS[".json"] = open_folder


def named(tokenizer: Tokenizer) -> list[tuple[str, bool, bool]]:
    """Of every id beyond the SentencePiece model's: text, whether it is special, whether it is unused."""
    model = tokenizer.sp_model
    own = model._own if isinstance(model, Extended) else len(model)
    return [(model.id_to_piece(i), model.is_control(i), model.is_unused(i)) for i in range(own, len(model))]
