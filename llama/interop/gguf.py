"""GGUF files, llama.cpp's format: written, and read as checkpoints (https://github.com/ggml-org/ggml, docs/gguf.md).

One file holds all: sizes and tokenizer as key-value pairs, and the tensors, in full or quantised in blocks of 32 or
256 numbers of a row. For this architecture, llama.cpp keeps queries and keys in Meta's order, so that names are all
that differs. The library `gguf` (extra `[gguf]`) knows the bytes; what needs no dequantising is used where it lies.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.arguments import checked
from llama.checkpoint import check_sizes, check_weight, recut
from llama.config import RANGES, ModelArgs, RopeScaling
from llama.interop.huggingface import note_context
from llama.rope import spectrum

_NAMES = {
    "tok_embeddings": "token_embd",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "norm": "output_norm",
    "output": "output",
}
_OURS = {theirs: ours for ours, theirs in _NAMES.items()}
_FACTORS = "rope_freqs.weight"
"""What Llama 3's scaling divides each pair's frequency by; the sizes don't tell its parameters."""

QUANTS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""What can be written, and the number by which a file says of what type most of it is (`general.file_type`)."""
_TOKENIZER_KEYS = ("tokens", "scores", "token_type")


def to_gguf(name: str) -> str:
    """GGUF's name of a parameter by Meta's."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{layer[1]}.{_NAMES[layer[2]]}.weight" if layer else _NAMES[name.removesuffix(".weight")] + ".weight"


def to_meta(name: str) -> str:
    """Meta's name of a parameter by GGUF's; what has none keeps its own."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
    ours = _OURS.get(layer[2] if layer else name.removesuffix(".weight"))
    if ours is None or not name.endswith(".weight"):
        return name
    return f"layers.{layer[1]}.{ours}.weight" if layer else f"{ours}.weight"


def open_weights(path: Path) -> GGUF:
    """A GGUF file, opened but not read. Raises ValueError as `GGUF` does."""
    return GGUF(path)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need a package: pip install 'codellama[gguf]'") from None
    return gguf


class GGUF:
    """The weights of a GGUF file under Meta's names, as `llama.checkpoint.Weights` asks for them.

    Raises ValueError, naming the file and the remedy, where there is none, and for what is no whole GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = _library()
        if not path.is_file():
            raise ValueError(f"there is no file {path}; pass --ckpt_dir with a folder or a .gguf file")
        try:
            # Copy on write: torch wants memory that may be written, and the file is not to be.
            self._reader = self._gguf.GGUFReader(path, "c")
        except Exception as error:  # the library raises all kinds of them for damaged files
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) can't be read: most likely an incomplete download; delete it "
                f"and download it again. ({type(error).__name__}: {error})"
            ) from error
        self._tensors = {to_meta(t.name): t for t in self._reader.tensors if t.name != _FACTORS}
        self._factors = next((t for t in self._reader.tensors if t.name == _FACTORS), None)
        if "output.weight" not in self._tensors and "tok_embeddings.weight" in self._tensors:
            self._tensors["output.weight"] = self._tensors["tok_embeddings.weight"]  # tied

    @property
    def n_shards(self) -> int:
        return 1

    def names(self) -> list[str]:
        """The parameters' names, Meta's; what has no such name keeps its own, so that `load` can say so."""
        return list(self._tensors)

    def args(self, **limits: Any) -> ModelArgs:
        """The architecture. Raises ValueError, naming the file, for what the core can't run: another kind of model,
        experts, heads of another size, a scaling of RoPE that it lacks."""
        try:
            args = ModelArgs(**self._sizes())
            check_sizes(args, self.names(), int(self._tensors["tok_embeddings.weight"].shape[0]))
            args.rope_scaling = self._scaling(args)
            spectrum(args.head_dim, args.rope_theta, args.rope_scaling, 1)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        note_context(self.path, self.context, **limits)
        return replace(args, **limits)

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, where the file says so."""
        told = self._value("llama.context_length")
        return int(told) if isinstance(told, int) else None

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _need(self, key: str) -> Any:
        value = self._value(key)
        if value is None:
            raise ValueError(f"it lacks {key}: it was not made whole; take another file")
        return value

    def _size(self, key: str, ours: str) -> Any:
        """What the file has under `llama.` and `key` for the number `ours` of ModelArgs."""
        return checked(f"llama.{key}", self._need(f"llama.{key}"), RANGES[ours])

    def _sizes(self) -> dict[str, Any]:
        kind = self._value("general.architecture")
        if kind != "llama":
            raise ValueError(f"its architecture is {kind!r}; only 'llama' can be loaded: choose a file of that kind")
        if self._value("llama.expert_count", 0):
            raise ValueError("it is a mixture of experts, which can't be loaded: choose a plain Llama")
        dim, n_heads = self._size("embedding_length", "dim"), self._size("attention.head_count", "n_heads")
        for key in ("llama.attention.key_length", "llama.rope.dimension_count"):
            if self._value(key, dim // n_heads) != dim // n_heads:
                raise ValueError(
                    f"{key} is {self._value(key)}; only {dim // n_heads}, {dim} / {n_heads}, can be loaded"
                )
        embedding = self._tensors.get("tok_embeddings.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ValueError("it has no matrix token_embd.weight: it holds no whole model, perhaps a vocabulary alone")
        found = {
            "dim": dim,
            "n_layers": self._size("block_count", "n_layers"),
            "n_heads": n_heads,
            "hidden_dim": self._size("feed_forward_length", "hidden_dim"),
            "norm_eps": self._size("attention.layer_norm_rms_epsilon", "norm_eps"),
            "vocab_size": self._words,
        }
        for key, ours in (("attention.head_count_kv", "n_kv_heads"), ("rope.freq_base", "rope_theta")):
            if self._value(f"llama.{key}") is not None:
                found[ours] = self._size(key, ours)
        return found

    @property
    def _words(self) -> int:
        return int(self._tensors["tok_embeddings.weight"].shape[1])  # shapes are written the other way round

    def _scaling(self, args: ModelArgs) -> RopeScaling | None:
        kind = self._value("llama.rope.scaling.type", "none")
        trained = self._value("llama.rope.scaling.original_context_length", self._value("llama.context_length", 2048))
        if self._factors is not None:
            return _llama3(args, torch.from_numpy(np.array(self._factors.data)).double())
        if kind == "none":
            return None
        scaling: RopeScaling = {"rope_type": kind, "factor": self._value("llama.rope.scaling.factor", 1.0)}
        return {**scaling, "original_max_position_embeddings": trained} if kind == "yarn" else scaling

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor:
        """Rank `rank`'s part, of `world_size`, of a parameter by Meta's name; float32 where the file has it quantised,
        else as stored, a view into the file. Raises ValueError for a type that can't be dequantised."""
        whole = check_weight(self.path, name, self._whole(name), self._tensors[name].name)
        return recut(name, [whole], rank, world_size, args.n_kv_heads, args.head_dim)

    def _whole(self, name: str) -> Tensor:
        stored, types = self._tensors[name], self._gguf.GGMLQuantizationType
        if stored.tensor_type in (types.F32, types.F16, types.F64):
            return torch.from_numpy(stored.data)
        if stored.tensor_type == types.BF16:
            return torch.from_numpy(stored.data.view(np.int16)).view(torch.bfloat16)
        try:
            return torch.from_numpy(self._gguf.dequantize(stored.data, stored.tensor_type))
        except NotImplementedError as error:
            raise ValueError(
                f"{stored.name} in {self.path} is of the type {stored.tensor_type.name}, which can't be dequantised: "
                "take a file in f16, bf16, q8_0 or q4_k"
            ) from error

    # The tokenizer ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer_path(self) -> Path:
        """A tokenizer.model made of the file's own pieces, there as long as this object is.

        Where the file's tokenizer is not a SentencePiece one, its pieces are the ids in angle brackets, and a warning
        says so: such a model can be given ids, and answers in ids.
        """
        return self._tokenizer_file

    @cached_property
    def _tokenizer_file(self) -> Path:
        self._scratch = tempfile.TemporaryDirectory(prefix="codellama-")
        path = Path(self._scratch.name, "tokenizer.model")
        path.write_bytes(self._tokenizer_model())
        return path

    def _token_id(self, mark: str, default: int) -> int:
        key = f"tokenizer.ggml.{mark}_token_id"
        found: int = checked(f"{self.path}: {key}", self._value(key, default), (int, "at least", 0, self._words - 1))
        return found

    def _tokenizer_model(self) -> bytes:
        kind = self._value("tokenizer.ggml.model", "missing")
        bos, eos = self._token_id("bos", 1), self._token_id("eos", 2)
        unknown = self._token_id("unknown", next(i for i in range(3) if i not in (bos, eos)))
        if kind == "llama":
            pieces, scores, types = (self._need(f"tokenizer.ggml.{key}") for key in _TOKENIZER_KEYS)
        else:
            warnings.warn(
                f"{self.path}: its tokenizer is {kind!r}, not a SentencePiece one, and can't be used: give the model "
                "ids (generate, stream), it answers in <ids>; or pass --tokenizer_path",
                stacklevel=2,
            )
            pieces, scores = [f"<{i}>" for i in range(self._words)], [0.0] * self._words
            types = [2 if i == unknown else 1 for i in range(self._words)]
        space = kind == "llama" and bool(self._value("tokenizer.ggml.add_space_prefix", True))
        model = _sentencepiece(pieces, scores, types, bos, eos, space)
        if kind != "llama":
            model.trainer_spec.unk_surface = "☺"  # the core's Tokenizer wants one id for it that decodes to it
        found: bytes = model.SerializeToString()
        return found


def _llama3(args: ModelArgs, factors: Tensor) -> RopeScaling:
    """The parameters of Llama 3's scaling whose factors (D/2,) these are; ValueError where they are none's."""
    found: RopeScaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "original_max_position_embeddings": 8192,
    }
    plain = spectrum(args.head_dim, args.rope_theta, None, 1).inv_freq
    scaled = spectrum(args.head_dim, args.rope_theta, found, 1).inv_freq
    if factors.shape != plain.shape or not torch.allclose(plain / scaled, factors, rtol=1e-4):
        raise ValueError(f"{_FACTORS} is not Llama 3.1's scaling: pass --rope_scaling, or take the original checkpoint")
    return found


def _proto() -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError("a GGUF file's tokenizer needs protobuf: pip install 'codellama[gguf]'") from None
    return sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]


def _sentencepiece(pieces: list[str], scores: list[float], types: list[int], bos: int, eos: int, space: bool) -> Any:
    """A ModelProto with the published settings; GGUF numbers the types of pieces as SentencePiece does."""
    model = _proto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        model.pieces.add(piece=piece, score=float(score), type=int(kind))
    unknown = next((i for i, kind in enumerate(types) if kind == 2), None)
    if unknown is None:
        raise ValueError("the file's tokenizer has no unknown piece: it is damaged; take another file")
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = 2, len(pieces)  # 2: byte-pair encoding
    trainer.byte_fallback = 6 in types
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = unknown, bos, eos, -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = pieces[unknown], pieces[bos], pieces[eos]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = space
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


# Writing -------------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    args: ModelArgs,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, Tensor]],
    quant: str,
    context: int,
    tokenizer_path: Path | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes `tensors`, of `shapes` by Meta's names and in their order, one at a time, as `quant` of QUANTS.

    Vectors stay float32, as llama.cpp wants them; a matrix whose rows are no multiple of 32 long is float16 instead of
    q8_0. `context` is the trained length, for the file to tell. Raises ValueError for an unknown `quant`, and for a
    RoPE scaling that GGUF has no words for.
    """
    if quant not in QUANTS:
        raise ValueError(f"--quant {quant} is unknown; there are {', '.join(QUANTS)}")
    gguf = _library()
    writer = gguf.GGUFWriter(path, "llama")
    _write_sizes(writer, args, context, quant)
    if tokenizer_path is not None and tokenizer_path.is_file():
        _write_tokenizer(writer, tokenizer_path, args.vocab_size)
    types = {name: _type(gguf, shape, quant) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        writer.add_tensor_info(to_gguf(name), shape, np.dtype(np.float32), prod(shape) // block * size, types[name])
    scaled = _factors(args)
    if scaled is not None:
        writer.add_tensor_info(_FACTORS, scaled.shape, scaled.dtype, scaled.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors:
        stored = gguf.quantize(tensor.float().numpy(), types[name])
        writer.write_tensor_data(stored)
        advance(stored.nbytes)
        del tensor, stored  # before the next one is made
    if scaled is not None:
        writer.write_tensor_data(scaled)
    writer.close()


def _type(gguf: Any, shape: tuple[int, ...], quant: str) -> Any:
    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    kind = types[quant.upper()]
    return types.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _write_sizes(writer: Any, args: ModelArgs, context: int, quant: str) -> None:
    writer.add_name("Code Llama")
    writer.add_file_type(QUANTS[quant])
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_dimension_count(args.head_dim)
    scaling = args.rope_scaling or {}
    kind, theta = scaling.get("rope_type", scaling.get("type", "default")), args.rope_theta
    if kind == "ntk":  # by its definition a larger theta
        theta *= scaling["factor"] ** (args.head_dim / (args.head_dim - 2))
    elif kind in ("linear", "yarn"):
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", scaling["factor"])
        if kind == "yarn":
            writer.add_uint32("llama.rope.scaling.original_context_length", scaling["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise ValueError(f"GGUF has no words for rope_type {kind!r}; it has default, linear, ntk, yarn and llama3")
    writer.add_rope_freq_base(theta)


def _factors(args: ModelArgs) -> np.ndarray[Any, Any] | None:
    """What Llama 3's scaling divides frequencies by (D/2,); None for other schemes."""
    if (args.rope_scaling or {}).get("rope_type") != "llama3":
        return None
    plain, scaled = (spectrum(args.head_dim, args.rope_theta, s, 1).inv_freq for s in (None, args.rope_scaling))
    return (plain / scaled).float().numpy()


def _write_tokenizer(writer: Any, path: Path, rows: int) -> None:
    model = _proto()
    model.ParseFromString(path.read_bytes())
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    pieces += [(f"[PAD{i}]", 0.0, 5) for i in range(len(pieces), rows)]  # 5: unused
    words, scores, types = (list(column) for column in zip(*pieces, strict=True))
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.add_array("tokenizer.ggml.scores", scores)
    writer.add_array("tokenizer.ggml.token_type", types)
    ids = {"unknown": model.trainer_spec.unk_id, "bos": model.trainer_spec.bos_id, "eos": model.trainer_spec.eos_id}
    place = {word: i for i, word in enumerate(words)}
    marks = {"fim_pre": "▁<PRE>", "fim_suf": "▁<SUF>", "fim_mid": "▁<MID>", "eot": "▁<EOT>"}
    ids |= {key: place[mark] for key, mark in marks.items() if mark in place}
    for key, i in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", i)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_bool("tokenizer.ggml.add_eos_token", False)
    writer.add_bool("tokenizer.ggml.add_space_prefix", model.normalizer_spec.add_dummy_prefix)
