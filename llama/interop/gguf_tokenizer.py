"""The tokenizer in a GGUF file, laid out as the files of a Hugging Face folder, and back.

GGUF has three arrays, tokens, scores and types, and ids of the special tokens. A model `llama` is SentencePiece's; it
becomes a tokenizer.model. A model `gpt2` is byte-level, with the merges in order and the name of the expression that
cuts a text into words; it becomes a tokenizer.json.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama.arguments import checked
from llama.interop.huggingface import write_json
from llama.interop.vocabulary import FIM, IDS_ONLY

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces; SentencePiece's numbers too."""
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<end_of_turn>", "<|EOT|>")
"""Control tokens that end a text whatever the file says, as in llama.cpp."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DIGITS = (r"\p{N}", _GPT2)
WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_LLAMA3.replace("{1,3}", ""),)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    "deepseek-coder": _DEEPSEEK,
}
"""Expressions that cut a text into words one after the other, by `tokenizer.ggml.pre`."""


class Tokens:
    """What a file says of its tokens. ValueError, without the path, for what can't be."""

    def __init__(self, value: Callable[..., Any], rows: int) -> None:
        """`value` gives what the file has under a key, or None."""
        self.rows = rows
        self._value = value
        self.model = self._get("model", "missing")
        self.tokens: list[str] = [str(token) for token in self._list("tokens")][:rows]
        self.types = [int(kind) for kind in self._list("token_type")][:rows] or [NORMAL] * len(self.tokens)
        self.scores = [float(score) for score in self._list("scores")][:rows] or [0.0] * len(self.tokens)
        if len(self._list("tokens")) > rows:
            raise ValueError(
                f"its tokenizer has {len(self._list('tokens'))} pieces, but the embedding {rows} rows: take another"
            )
        if not len(self.tokens) == len(self.types) == len(self.scores):
            found = f"{len(self.tokens)} tokens, {len(self.types)} types and {len(self.scores)} scores"
            raise ValueError(f"its tokenizer has {found}, which should be equally many: take another file")

    def _get(self, key: str, default: Any = None) -> Any:
        return self._value(f"tokenizer.ggml.{key}", default)

    def _list(self, key: str) -> list[Any]:
        found = self._get(key)
        return found if isinstance(found, list) else []

    def id(self, mark: str, default: int | None = None) -> int | None:
        """The id of a special token, `bos`; `default` where the file has none. 2**32 - 1 means none too."""
        found = self._get(f"{mark}_token_id", default)
        if found is None or found == 2**32 - 1:
            return default
        i: int = checked(f"tokenizer.ggml.{mark}_token_id", found, (int, "at least", 0, self.rows - 1))
        return i

    def ends(self) -> list[int]:
        """What ends a text, eos first."""
        told = [self.id("eos", 2 if self.model == "llama" else None), self.id("eot"), self.id("eom")]
        by_text = [i for i, t in enumerate(self.tokens) if self.types[i] in (CONTROL, USER_DEFINED) and t in ENDS]
        return [i for i in dict.fromkeys([*told, *by_text]) if i is not None]

    def lay_out(self, folder: Path, name: str) -> Path:
        """Writes the files, and returns the one that `Tokenizer` opens."""
        bos = self.id("bos", 1 if self.model == "llama" else None)
        settings: dict[str, Any] = {"chat_template": self._value("tokenizer.chat_template")}
        adds = self._get("add_bos_token")
        if isinstance(adds, bool):
            settings["add_bos_token"] = adds
        elif self.model == "gpt2":
            settings["add_bos_token"] = self._get("pre") in ("llama-bpe", "llama3", "llama-v3", "deepseek-coder")
        reason = None
        if self.model == "llama":
            (folder / "tokenizer.model").write_bytes(self._sentencepiece(bos))
            special = {token: i for i, token in enumerate(self.tokens) if self.types[i] == CONTROL}
            write_json(folder / "added_tokens.json", special)
        elif self.model == "gpt2":
            reason = self._byte_level(folder)
        else:
            reason = f"its tokenizer is {self.model!r}, which can't be used here"
        if reason is not None:
            warnings.warn(f"{name}: {reason}: give the model ids; or pass --tokenizer_path", stacklevel=2)
            settings[IDS_ONLY] = f"{name}: {reason}"
        write_json(folder / "config.json", {"vocab_size": self.rows})
        write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": self.ends()})
        write_json(folder / "tokenizer_config.json", settings)
        return folder / "tokenizer_config.json"

    # SentencePiece ---------------------------------------------------------------------------------------------------

    def _sentencepiece(self, bos: int | None) -> bytes:
        """A tokenizer.model. Pieces are made unique, unknown and bytes get the types that SentencePiece wants: old
        converters typed them otherwise."""
        if not self.tokens or not self._list("scores"):
            raise ValueError(
                "its tokenizer lacks its pieces, or their scores: it was not made whole; take another file"
            )
        tokens = self.tokens + [f"[unused {i}]" for i in range(len(self.tokens), self.rows)]
        scores = self.scores + [0.0] * (self.rows - len(self.scores))
        types = self.types + [UNUSED] * (self.rows - len(self.types))
        unknown = self.id("unknown")
        typed = [i for i, kind in enumerate(types) if kind == UNKNOWN]
        if unknown is None or unknown in (bos, *self.ends()[:1]):
            unknown = typed[0] if typed else tokens.index("<unk>") if "<unk>" in tokens else None
        if unknown is None:
            raise ValueError("its tokenizer has no unknown piece: it is damaged; take another file")
        eos = self.ends()[0]
        seen: set[str] = set()
        for i, token in enumerate(tokens):
            if token in seen or not token:
                tokens[i], types[i] = f"[unused {i}]", UNUSED
            seen.add(tokens[i])
            if i == unknown:
                types[i] = UNKNOWN
            elif types[i] == UNKNOWN or not NORMAL <= types[i] <= BYTE:
                types[i] = NORMAL
        every_byte = {f"<0x{byte:02X}>" for byte in range(256)}
        if every_byte <= seen:
            types = [BYTE if token in every_byte else kind for token, kind in zip(tokens, types, strict=True)]
        else:  # SentencePiece wants all 256 or none
            types = [NORMAL if kind == BYTE else kind for kind in types]
        space = self._get("add_space_prefix", True) is not False
        return sentencepiece_proto(tokens, scores, types, (unknown, bos if bos is not None else -1, eos), space)

    # Byte-level ------------------------------------------------------------------------------------------------------

    def _byte_level(self, folder: Path) -> str | None:
        """Writes a tokenizer.json; or says why it can't be."""
        merges, pre = self._list("merges"), self._get("pre", "default")
        if not merges or not self.tokens:
            return "its byte-level tokenizer lacks its merges"
        if pre not in WORDS:
            return f"its byte-level tokenizer cuts words as {pre!r}, which is not known (known are {', '.join(WORDS)})"
        if self._get("pre") is None:
            warnings.warn(
                "the file doesn't say how it cuts words (tokenizer.ggml.pre); GPT-2's way is used", stacklevel=2
            )
        splits: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in WORDS[pre]
        ]
        plain = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocabulary: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            vocabulary.setdefault(token, i)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [
            {"id": i, "content": token, **flags, "special": kind == CONTROL}
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED) and token and vocabulary[token] == i
        ]
        contents = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, {"type": "ByteLevel", **plain}]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", **plain},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": pre in ("llama-bpe", "llama3", "llama-v3"),
                "vocab": vocabulary,
                "merges": merges,
            },
        }
        write_json(folder / "tokenizer.json", contents)
        return None


def proto() -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError("a GGUF file's tokenizer needs protobuf: pip install 'codellama[gguf]'") from None
    return sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]


def sentencepiece_proto(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], special: tuple[int, int, int], space: bool
) -> bytes:
    """A tokenizer.model with the published settings; `special` are unknown, bos and eos."""
    model = proto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, (unknown, bos, eos) = model.trainer_spec, special
    trainer.model_type, trainer.vocab_size = 2, len(pieces)  # 2: byte-pair encoding
    trainer.byte_fallback = BYTE in types
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = unknown, bos, eos, -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = (pieces[i] if i >= 0 else "" for i in special)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = space
    model.normalizer_spec.remove_extra_whitespaces = False
    found: bytes = model.SerializeToString()
    return found


# Writing -------------------------------------------------------------------------------------------------------------


def tokens_to_write(tokenizer_path: Path, rows: int) -> dict[str, Any]:
    """A tokenizer as GGUF's entries, each with the kind of its value. ValueError where it has more pieces than rows,
    and for one of which GGUF can't say how it cuts words."""
    from llama.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_path)
    model = tokenizer.sp_model
    if tokenizer.n_words > rows:
        raise ValueError(
            f"{tokenizer_path} has {tokenizer.n_words} pieces, but the embedding {rows} rows: use the tokenizer that "
            "came with these weights"
        )
    from llama.interop.tokenizer_json import JsonVocabulary

    ids = range(tokenizer.n_words)
    tokens = [model.id_to_piece(i) for i in ids] + [f"[unused {i}]" for i in range(len(ids), rows)]
    scores = [float(model.get_score(i)) for i in ids] + [0.0] * (rows - len(ids))
    types = [_type(model, i) for i in ids] + [UNUSED] * (rows - len(ids))
    found: dict[str, Any] = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    space = True
    if isinstance(model, JsonVocabulary):
        del found["scores"]
        found |= {"model": "gpt2", "merges": model.merges(), "pre": model.pre(WORDS)}
        space = False
    else:
        inner = proto()
        inner.ParseFromString(tokenizer_path.with_name("tokenizer.model").read_bytes())
        space = inner.normalizer_spec.add_dummy_prefix
    special = {"unknown": model.unk_id(), "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    marks = dict(zip(("fim_pre", "fim_suf", "fim_mid", "eot"), FIM["Code Llama"], strict=True))
    place = {token: i for i, token in reversed(list(enumerate(tokens)))}
    special |= {key: place[mark] for key, mark in marks.items() if mark in place}
    others = sorted(tokenizer.ends - {tokenizer.eos_id})
    if others and "eot" not in special:
        special["eot"] = others[0]
    found |= {f"{key}_token_id": i for key, i in special.items() if i >= 0}
    found |= {"add_bos_token": tokenizer.traits.adds_bos, "add_eos_token": False, "add_space_prefix": space}
    return found


def _type(model: Any, i: int) -> int:
    from llama.interop.vocabulary import Extended

    for kind, asked in ((UNKNOWN, "is_unknown"), (BYTE, "is_byte"), (CONTROL, "is_control"), (UNUSED, "is_unused")):
        if getattr(model, asked)(i):
            return kind
    added = getattr(model, "added", {}) if isinstance(model, Extended) else getattr(model, "_added", {})
    return USER_DEFINED if i in added else NORMAL
