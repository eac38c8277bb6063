"""GGUF files, llama.cpp's format: written, and read as checkpoints (https://github.com/ggml-org/ggml, docs/gguf.md).

One file holds all: sizes and tokenizer as key-value pairs, and the tensors, in full or quantised in blocks of 32 or
256 numbers of a row. For this architecture, llama.cpp keeps queries and keys in Meta's order, so that names are all
that differs. The library `gguf` (extra `[gguf]`) knows the bytes; what needs no dequantising is used where it lies.
"""

from __future__ import annotations

import math
import re
import tempfile
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
from llama.interop.gguf_header import AGAIN, Entry, read_header
from llama.interop.gguf_tokenizer import Tokens, tokens_to_write
from llama.interop.huggingface import note_context
from llama.interop.vocabulary import read_said
from llama.rope import spectrum
from llama.system import some_of

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
"""What a scaling divides each pair's frequency by: Llama 3's, whose parameters the sizes don't tell."""
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
"""What llama.cpp's keys are called in a rope_scaling."""
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)

QUANTS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9}
"""What can be written, and the number by which a file says of what type most of it is (`general.file_type`)."""


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


def _plain(types: Any) -> dict[Any, torch.dtype]:
    return {types.F32: torch.float32, types.F16: torch.float16, types.F64: torch.float64, types.BF16: torch.bfloat16}


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need a package: pip install 'codellama[gguf]'") from None
    return gguf


class GGUF:
    """The weights of a GGUF file, or of the parts that llama.cpp's gguf-split makes of one, under Meta's names, as
    `llama.checkpoint.Weights` asks for them.

    Raises ValueError, naming the file and the remedy, where there is none, and for what is no whole GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = _library()
        if not path.is_file():
            raise ValueError(f"there is no file {path}; pass --ckpt_dir with a folder or a .gguf file")
        sizes = {int(kind): size for kind, size in self._gguf.GGML_QUANT_SIZES.items()}
        self.path, parts = _parts(path)
        self.values: dict[str, Any] = {}
        """The file's key-value pairs."""
        self._tensors: dict[str, tuple[Entry, Any]] = {}
        for part in parts:
            values, entries, data = read_header(part, sizes)
            self.values = {**values, **self.values}  # the first part tells all
            for entry in entries:
                name = to_meta(entry.name)
                if name in self._tensors:
                    raise ValueError(f"{part} holds {entry.name} twice, or another part does: download all parts again")
                self._tensors[name] = entry, data
        if len(parts) == 1 and self._value("split.count", 0) > 1:
            raise ValueError(
                f"{path} is one part of {self._value('split.count')}, and its name doesn't say which: give the parts "
                "the names that they had, model-00001-of-00002.gguf"
            )
        self._factors = self._tensors.pop(_FACTORS, None)
        if "output.weight" not in self._tensors and "tok_embeddings.weight" in self._tensors:
            self._tensors["output.weight"] = self._tensors["tok_embeddings.weight"]  # tied

    @property
    def n_shards(self) -> int:
        return 1

    @property
    def nbytes(self) -> int:
        """Of all tensors, as stored."""
        return sum(entry.nbytes for entry in {entry for entry, _ in self._tensors.values()})

    def kinds(self) -> dict[str, int]:
        """How many tensors are of each type."""
        found: dict[str, int] = {}
        for kind in sorted(entry.kind for entry in {entry for entry, _ in self._tensors.values()}):
            name = self._gguf.GGMLQuantizationType(kind).name.lower()
            found[name] = found.get(name, 0) + 1
        return found

    def names(self) -> list[str]:
        """The parameters' names, Meta's; what has no such name keeps its own, so that `load` can say so."""
        return list(self._tensors)

    def args(self, **limits: Any) -> ModelArgs:
        """The architecture. Raises ValueError, naming the file, for what the core can't run: another kind of model,
        experts, biases, heads of another size."""
        try:
            args = ModelArgs(**self._sizes())
            check_sizes(args, self.names(), int(self._tensors["tok_embeddings.weight"][0].shape[0]))
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
        return told if isinstance(told, int) else None

    def _value(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def _need(self, key: str) -> Any:
        value = self._value(key)
        if value is None:
            raise ValueError(f"it lacks {key}: it was not made whole; take another file")
        return value

    def _size(self, key: str, ours: str) -> Any:
        """What the file has under `llama.` and `key` for the number `ours` of ModelArgs."""
        found = self._need(f"llama.{key}")
        return checked(f"llama.{key}", found, RANGES[ours])

    def _sizes(self) -> dict[str, Any]:
        kind = self._value("general.architecture")
        if kind != "llama":
            raise ValueError(f"its architecture is {kind!r}; only 'llama' can be loaded: choose a file of that kind")
        if self._value("llama.expert_count", 0):
            raise ValueError("it is a mixture of experts, which can't be loaded: choose a plain Llama")
        if biases := [entry.name for entry, _ in self._tensors.values() if entry.name.endswith(".bias")]:
            raise ValueError(f"its layers have biases ({some_of(biases, 2)}), which Llama's lack: choose another model")
        dim, n_heads = self._size("embedding_length", "dim"), self._size("attention.head_count", "n_heads")
        for key in ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"):
            if self._value(key, dim // n_heads) != dim // n_heads:
                raise ValueError(
                    f"{key} is {self._value(key)}; only {dim // n_heads}, {dim} / {n_heads}, can be loaded: choose "
                    "another model"
                )
        embedding = self._tensors.get("tok_embeddings.weight")
        if embedding is None or len(embedding[0].shape) != 2:
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
        return int(self._tensors["tok_embeddings.weight"][0].shape[1])  # shapes are written the other way round

    def _scaling(self, args: ModelArgs) -> RopeScaling | None:
        if self._factors is not None:
            return _divided(args, self._stored(*self._factors).double())
        old = self._value("llama.rope.scale_linear")  # before the keys of scaling, in 2023
        kind = self._value("llama.rope.scaling.type", "linear" if old not in (None, 0, 1.0) else "none")
        factor = self._value("llama.rope.scaling.factor", old if old not in (None, 0) else 1.0)
        if kind == "none":
            return None
        if kind == "longrope":
            raise ValueError("its scaling is longrope, but it lacks its factors: pass the original checkpoint")
        scaling: RopeScaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            trained = self._value(
                "llama.rope.scaling.original_context_length", self._value("llama.context_length", 2048)
            )
            scaling["original_max_position_embeddings"] = trained
            stretch = self._value(
                "llama.rope.scaling.attn_factor", self._value("llama.rope.scaling.yarn_attn_factor", 1)
            )
            if stretch != 1 and isinstance(factor, float) and factor >= 1:  # on top of YaRN's own
                scaling["attention_factor"] = stretch * (1 + 0.1 * math.log(factor))
            for key, ours in _YARN.items():
                if (found := self._value(f"llama.rope.scaling.{key}")) is not None:
                    scaling[ours] = found
        return scaling

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor:
        """Rank `rank`'s part, of `world_size`, of a parameter by Meta's name; float32 where the file has it quantised,
        else as stored, a view into the file. Raises ValueError for a type that can't be dequantised."""
        entry, data = self._tensors[name]
        whole = check_weight(self.path, name, self._stored(entry, data), entry.name)
        return recut(name, [whole], rank, world_size, args.n_kv_heads, args.head_dim)

    def _stored(self, entry: Entry, data: Any) -> Tensor:
        types = self._gguf.GGMLQuantizationType
        shape, kind = entry.shape[::-1], types(entry.kind)
        if kind in _plain(types):
            dtype = _plain(types)[kind]
            if not prod(shape):
                return torch.empty(shape, dtype=dtype)
            if entry.start % dtype.itemsize:
                raise ValueError(
                    f"{entry.name} in {self.path} begins at byte {entry.start:,}, between two numbers: {AGAIN}"
                )
            return torch.frombuffer(data, dtype=dtype, count=prod(shape), offset=entry.start).view(shape)
        block, nbytes = self._gguf.GGML_QUANT_SIZES[kind]
        rows = np.frombuffer(data, np.uint8, entry.nbytes, entry.start)
        try:
            return torch.from_numpy(self._gguf.dequantize(rows.reshape(*shape[:-1], shape[-1] // block * nbytes), kind))
        except (NotImplementedError, KeyError) as error:
            raise ValueError(
                f"{entry.name} in {self.path} is of the type {kind.name}, which can't be dequantised: "
                "take a file in f16, bf16, q8_0 or q4_k"
            ) from error

    # The tokenizer ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer_path(self) -> Path:
        """A tokenizer made of the file's own entries, there as long as this object is.

        Where nobody here can encode as the file says, its pieces are the ids in angle brackets, and a warning says so:
        such a model can be given ids, and answers in ids.
        """
        return self._tokenizer_file

    @cached_property
    def _tokenizer_file(self) -> Path:
        self._scratch = tempfile.TemporaryDirectory(prefix="codellama-")
        try:
            return Tokens(self._value, self._words).lay_out(Path(self._scratch.name), str(self.path))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def _parts(path: Path) -> tuple[Path, list[Path]]:
    """The first part of what a file belongs to, and all parts. ValueError where one is missing."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) < 2:
        return path, [path]
    count = int(named[3])
    present = [
        i for i in range(1, count + 1) if path.with_name(f"{named[1]}-{i:05d}-of-{count:05d}{named[4]}").is_file()
    ]
    parts = [path.with_name(f"{named[1]}-{i:05d}-of-{count:05d}{named[4]}") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ValueError(
            f"{path} is one of {count} parts, and {path.parent} holds {len(present)}; missing: {some_of(missing)}"
            ": download these into the same folder"
        )
    return parts[0], parts


def _divided(args: ModelArgs, factors: Tensor) -> RopeScaling:
    """The scaling that divides each pair's frequency by these factors (D/2,): Llama 3's, where they are its own, else
    one divisor for each pair, as LongRoPE has them."""
    pairs = args.head_dim // 2
    if factors.shape != (pairs,) or not bool((factors > 0).all()) or not bool(factors.isfinite().all()):
        raise ValueError(
            f"{_FACTORS} has the shape {tuple(factors.shape)}, or numbers that are not positive; it should have "
            f"{pairs} divisors: download the file again"
        )
    plain = spectrum(args.head_dim, args.rope_theta, None, 1).inv_freq
    for trained in (8192, 4096, 16384):
        found: RopeScaling = {
            "rope_type": "llama3",
            "factor": max(float(factors.max()), 1.0),
            "original_max_position_embeddings": trained,
        }
        scaled = spectrum(args.head_dim, args.rope_theta, found, 1).inv_freq
        if torch.allclose(plain / scaled, factors, rtol=1e-4):
            return found
    each = factors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": each,
        "long_factor": each,
        "factor": 1.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.0,
    }


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
    for key, value in tokens_to_write(path, rows).items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    template = read_said(path.parent).template if path.suffix == ".json" else None
    if template is not None:
        writer.add_string("tokenizer.chat_template", template)
