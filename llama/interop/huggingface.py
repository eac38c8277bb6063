"""Hugging Face folders as checkpoints: config.json with *.safetensors or pytorch_model*.bin.

`open_weights` gives what the core's `load` asks of any checkpoint: names, sizes, and any rank's part of a parameter.
The files are mapped into memory and never read whole. A part is a view of the map wherever the formats agree; of the
queries' and keys' matrices, whose rows stand in another order (names.py), it is a copy of the rank's own heads.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.arguments import checked
from llama.checkpoint import check_sizes, check_weight, recut
from llama.config import RANGES, ModelArgs, RopeScaling
from llama.interop.names import ROTATED, to_huggingface, to_meta, to_pairs
from llama.interop.vocabulary import tokenizer_path
from llama.rope import SPECTRA
from llama.system import open_shard, read_params, read_plain, some_of

Read = Callable[[], Tensor]
ANOTHER = "choose another checkpoint"
# In old files; what they held follows from config.json and the causal mask.
_UNUSED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias|.*\.attn\.bias")
# What torch.compile, DataParallel and FSDP, and trainers' wrappers put before each name.
_PREFIX = re.compile(r"^(_orig_mod\.|module\.|_fsdp_wrapped_module\.|_forward_module\.)+")
_PACKED = re.compile(r".*\.(qweight|qzeros|g_idx|weight_scale|weight_packed|absmax|quant_map)")


def open_weights(path: Path) -> HuggingFace:
    """A Hugging Face folder, opened but not read. Raises ValueError as `HuggingFace` does."""
    return HuggingFace(path)


class HuggingFace:
    """The weights of a Hugging Face folder under Meta's names, as `llama.checkpoint.Weights` asks for them.

    Raises ValueError, naming the file and the remedy, for a folder without weights, an index that names a file or a
    tensor that isn't there, a missing part, and a file that is incomplete or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_params(path / "config.json")
        files = _weight_files(path)
        self._n_files = len(files)
        self._tensors: dict[str, Read] = {}
        for file in files:
            tensors = _map_safetensors(file) if file.suffix == ".safetensors" else _map_pickle(file)
            named = {_PREFIX.sub("", name): read for name, read in tensors.items()}
            self._tensors |= {name: read for name, read in named.items() if not _UNUSED.fullmatch(name)}
        if "model.embed_tokens.weight" not in self._tensors and "embed_tokens.weight" in self._tensors:  # LlamaModel's
            self._tensors = {n if n == "lm_head.weight" else f"model.{n}": read for n, read in self._tensors.items()}
        self._check_index()

    @property
    def n_shards(self) -> int:
        """How many files the weights come in."""
        return self._n_files

    @property
    def tokenizer_path(self) -> Path:
        return tokenizer_path(self.path)

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, where the file says so."""
        told = self.config.get("max_position_embeddings")
        return told if isinstance(told, int) else None

    @property
    def _tied(self) -> bool:
        """Whether the output's matrix is the embedding's. Where a file has a head of its own, that one counts, as in
        transformers 5, whatever config.json says."""
        return bool(self.config.get("tie_word_embeddings", False)) and "lm_head.weight" not in self._tensors

    def names(self) -> list[str]:
        """The parameters' names, Meta's; what has no such name keeps its own, so that `load` can say so."""
        names = [to_meta(name) or name for name in self._tensors]
        return [*names, "output.weight"] if self._tied and "output.weight" not in names else names

    def args(self, **limits: Any) -> ModelArgs:
        """The architecture that config.json describes; its vocabulary is the embedding's own.

        Raises ValueError for what the core can't run: another kind of model, biases, quantised weights, heads of
        another size, an unknown scaling of RoPE.
        """
        embedding = "model.embed_tokens.weight"
        if packed := [name for name in self._tensors if _PACKED.fullmatch(name)]:
            raise ValueError(f"{self.path} holds {some_of(packed, 2)}: {_quantized(self.config)}")
        if embedding not in self._tensors:
            raise ValueError(
                f"{self.path} has no {embedding} but {some_of(list(self._tensors))}: it does not hold a "
                "Llama with its language-model head; use the folder of a LlamaForCausalLM"
            )
        vocab_size, dim = check_weight(self.path, "tok_embeddings.weight", self._tensors[embedding](), embedding).shape
        try:
            args = ModelArgs(**sizes(self.config), vocab_size=vocab_size)
            check_sizes(args, self.names(), dim)
            if biases := [name for name in self._tensors if name.endswith(".bias")]:
                raise ValueError(f"the files hold biases ({some_of(biases, 2)}), which Llama's layers lack: {ANOTHER}")
            if "output.weight" not in self.names():
                raise ValueError(
                    "the files hold no lm_head.weight, and tie_word_embeddings is false: download the missing file, or "
                    "set tie_word_embeddings to true if the model was trained so"
                )
        except ValueError as error:
            raise ValueError(f"{self.path / 'config.json'}: {error}") from error
        note_context(self.path, self.context, **limits)
        return replace(args, **limits)

    def tensor(self, name: str, args: ModelArgs, rank: int = 0, world_size: int = 1) -> Tensor:
        """Rank `rank`'s part, of `world_size`, of a parameter by Meta's name; a view into the file, but for wq and wk.

        Raises ValueError where the tensor's shape has nothing to do with its name, or it can't be cut so.
        """
        key = self._key(name)
        whole = check_weight(self.path, name, self._tensors[key](), key)
        heads = args.head_dim if ROTATED.fullmatch(name) else 1
        if len(whole) % heads:
            raise ValueError(
                f"{key} in {self.path} has the shape {tuple(whole.shape)}, which fits neither its name nor "
                "config.json: take both from the same checkpoint"
            )
        part = recut(name, [whole], rank, world_size, args.n_kv_heads, args.head_dim)
        return to_pairs(part, args.head_dim) if heads > 1 else part

    def _key(self, name: str) -> str:
        if name == "output.weight" and self._tied:
            return "model.embed_tokens.weight"
        return to_huggingface(name) or name

    def _check_index(self) -> None:
        for index in _indices(self.path):
            absent = sorted({_PREFIX.sub("", name) for name in _weight_map(index)} - set(self._tensors))
            absent = [name for name in absent if not _UNUSED.fullmatch(name)]
            if absent:
                raise ValueError(
                    f"{index} names tensors that are in none of its files ({some_of(absent)}): index and files belong "
                    "to different checkpoints; download all of them again"
                )


# Files ---------------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    """The files of the weights: one that is whole, else those that an index names, else those whose names say so;
    safetensors before .bin."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    for index in _indices(folder):
        files = sorted({folder / file for file in _weight_map(index).values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {some_of(missing)}, which {index.name} names: download what is missing")
        return files
    for found in _found_by_name(folder):
        _check_parts(folder, found)
        return found
    raise ValueError(
        f"{folder} has a config.json but neither *.safetensors nor pytorch_model*.bin: download the weights as well"
    )


def _found_by_name(folder: Path) -> Iterator[list[Path]]:
    """Files of weights, of one kind at a time, the best first; an adapter's are none."""
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "consolidated*.safetensors"):
        found = [file for file in sorted(folder.glob(pattern)) if not file.name.startswith("adapter_")]
        if found:
            yield found


def _indices(folder: Path) -> list[Path]:
    """The index that holds, in a list; safetensors' own before that of .bin files. One of which no file is here is left
    over from files that were replaced."""
    if (folder / "model.safetensors").is_file():  # one file needs none, and one beside it is left over
        return []
    names = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    present = [folder / name for name in names if (folder / name).is_file()]
    used = [index for index in present if any((folder / file).is_file() for file in _weight_map(index).values())]
    return used[:1] or ([] if any(_found_by_name(folder)) else present[:1])


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to file name."""
    found = read_params(index).get("weight_map")
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in found.values()
    ):
        raise ValueError(f"{index} has no weight_map from tensors to files of its folder: download it again")
    return found


def _check_parts(folder: Path, files: list[Path]) -> None:
    """model-00002-of-00003: says which of the parts are missing."""
    present = {int(m[1]): int(m[2]) for file in files if (m := re.search(r"-(\d+)-of-(\d+)\.", file.name))}
    parts = max(present.values(), default=0)
    # A stray file may tell of any number of parts: so many are looked for as can be named.
    missing = sorted(set(range(1, min(parts, len(present) + 99) + 1)) - set(present))
    if missing:
        raise ValueError(f"{folder} lacks parts [{some_of(map(str, missing))}] of {parts}: download what is missing")


def _map_safetensors(path: Path) -> dict[str, Read]:
    """Each tensor of a file by its name, to be mapped when it is wanted."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("reading *.safetensors needs a package: pip install 'codellama[hf]'") from None
    read_plain(path, 1)
    try:
        # On a CPU, tensors and slices of them are views of the mapped file; nothing is read here but the header.
        file: Any = safe_open(path, framework="pt")
        names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read: most likely an incomplete download, or a web page "
            f"or Git LFS pointer in its place. Delete the file and download it again. ({error})"
        ) from error

    def reader(name: str) -> Read:
        def read() -> Tensor:
            tensor: Tensor = file.get_tensor(name)
            return tensor

        return read

    return {name: reader(name) for name in names}


def _map_pickle(path: Path) -> dict[str, Read]:
    """The same of a .bin file, which holds tensors only and can run no code."""

    def reader(tensor: Tensor) -> Read:
        return lambda: tensor

    return {name: reader(tensor) for name, tensor in open_shard(path).items()}


# config.json ---------------------------------------------------------------------------------------------------------

_SPELLED = {"su": "longrope", "dynamic-ntk": "dynamic", "ntk-aware": "ntk", "interpolation": "linear"}
"""Other names of schemes, as they have been written."""
_REQUIRED = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}


def note_context(path: Path, made_for: Any, max_seq_len: int = 0, **_: Any) -> None:
    """Warns where a cache is to be longer than the context that a file says it was made for."""
    if isinstance(made_for, int) and max_seq_len > made_for:
        warnings.warn(
            f"{path}: max_seq_len {max_seq_len} is beyond the {made_for} tokens that it says it was made for; whether "
            "it is of use there, `codellama longcontext perplexity` measures",
            stacklevel=3,
        )


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json's contents as arguments of ModelArgs; ValueError for what the core can't run."""
    model_type = config.get("model_type")
    if model_type == "mistral" and config.get("sliding_window") is not None:
        raise ValueError(
            f"model_type is 'mistral' with a sliding_window of {config['sliding_window']}; only whole attention can be "
            f"computed: {ANOTHER}"
        )
    if model_type not in ("llama", "mistral"):  # without its window, Mistral's architecture is Llama's
        raise ValueError(f"model_type is {model_type!r}; only 'llama' can be loaded: {ANOTHER} of that architecture")
    missing = [key for key in _REQUIRED.values() if config.get(key) is None]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}: download it again")
    found = {ours: checked(theirs, config[theirs], RANGES[ours]) for ours, theirs in _REQUIRED.items()}
    if config.get("num_key_value_heads") is not None:
        found["n_kv_heads"] = checked("num_key_value_heads", config["num_key_value_heads"], RANGES["n_kv_heads"])
    # Without it, transformers' own default, unlike Llama's 1e-5.
    found["norm_eps"] = checked("rms_norm_eps", config.get("rms_norm_eps", 1e-6), RANGES["norm_eps"])
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{key} is {config[key]!r}; Code Llama's layers have no biases, so it must be false")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {config['hidden_act']!r}; only 'silu' can be loaded")
    if config.get("quantization_config"):
        raise ValueError(f"it has a quantization_config: {_quantized(config)}")
    dim, n_heads = found["dim"], found["n_heads"]
    head_dim = config.get("head_dim")
    if head_dim is not None and checked("head_dim", head_dim, RANGES["dim"]) * n_heads != dim:
        raise ValueError(
            f"head_dim is {head_dim}, but hidden_size {dim} for num_attention_heads {n_heads} gives "
            f"{dim / n_heads:g}; only heads of that size can be loaded"
        )
    theta, scaling = _rope(config)
    return {**found, "rope_theta": theta, "rope_scaling": scaling}


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from either spelling: rope_theta and rope_scaling (transformers 4), rope_parameters (5)."""
    both = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    if not all(part is None or isinstance(part, dict) for part in both):
        raise ValueError(f"rope_parameters or rope_scaling is no object: {both}")
    merged = {key: value for part in both for key, value in (part or {}).items() if value is not None}
    theta = merged.pop("rope_theta", config.get("rope_theta"))
    theta = checked("rope_theta", 10000.0 if theta is None else theta, RANGES["rope_theta"])
    old_name = merged.pop("type", "default")
    name = merged.pop("rope_type", old_name)
    name = _SPELLED.get(name, name) if isinstance(name, str) else name
    partial = merged.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        merged["partial_rotary_factor"] = partial  # which the core refuses by name
    stretched = config.get("max_position_embeddings", 2048)
    trained = config.get("original_max_position_embeddings")
    trained = stretched if trained is None else trained
    if name in ("yarn", "llama3", "longrope"):
        merged.setdefault("original_max_position_embeddings", trained)
    if name == "longrope":
        lengths = {
            "max_position_embeddings": config.get("max_position_embeddings", trained),
            "original_max_position_embeddings": merged["original_max_position_embeddings"],
        }
        longest, original = (checked(name, length, RANGES["max_seq_len"]) for name, length in lengths.items())
        merged.setdefault("factor", longest / original)
    if name == "dynamic":
        # There, transformers takes the trained context from max_position_embeddings alone.
        merged["original_max_position_embeddings"] = stretched
    return theta, _known(name, merged)


def _known(name: Any, parameters: dict[str, Any]) -> RopeScaling | None:
    """The scaling without the keys that its scheme doesn't take, which a warning names: transformers and fine-tuners
    have written several that mean nothing (finetuned, original_max_position_embeddings beside linear)."""
    name = _SPELLED.get(name, name) if isinstance(name, str) else name
    scheme = SPECTRA.get(name) if isinstance(name, str) else None
    if scheme is None:
        return {"rope_type": name, **parameters}
    if name == "yarn" and "attention_factor" not in parameters and "attn_factor" in parameters:
        parameters["attention_factor"] = parameters.pop("attn_factor")
    accepted = inspect.signature(scheme).parameters
    ignored = [key for key in parameters if key not in accepted and key != "partial_rotary_factor"]
    silent = (
        {"factor", "original_max_position_embeddings"} if name == "default" else {"original_max_position_embeddings"}
    )
    if named := [key for key in ignored if key not in silent]:
        warnings.warn(f"rope_scaling has {some_of(named)}, which {name!r} doesn't take: ignored", stacklevel=4)
    kept = {key: value for key, value in parameters.items() if key not in ignored}
    return None if name == "default" and not kept else {"rope_type": name, **kept}


def _quantized(config: dict[str, Any]) -> str:
    """Which program's quantised weights these are, and what to do instead."""
    told = config.get("quantization_config")
    method = told.get("quant_method") if isinstance(told, dict) else None
    if method is None and isinstance(told, dict):
        method = "bitsandbytes" if any(key.startswith(("load_in_", "bnb_")) for key in told) else None
    name = {"gptq": "GPTQ", "awq": "AWQ"}.get(str(method).lower(), str(method or "GPTQ, AWQ or another program"))
    return (
        f"the weights are quantised by {name}, which can't be read; take the plain checkpoint (bfloat16 or "
        "float16) and --quantize int4, or its .gguf file"
    )


def trained_context(args: ModelArgs) -> int:
    """Tokens that a model was made for, as config.json wants to know. Meta's files don't say; what scaling says is
    taken, or else the published 16,384 of theta 1e6 and 4,096 of a lower one."""
    scaling = args.rope_scaling or {}
    name = scaling.get("rope_type", scaling.get("type", "default"))
    original = scaling.get("original_max_position_embeddings", 16384 if args.rope_theta >= 1e6 else 4096)
    return int(original if name == "dynamic" else original * scaling.get("factor", 1))


def to_config(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of a config.json, but for the special ids. RoPE is spelled as transformers 4 does, which 5 and other
    programs read too."""
    theta, scaling = args.rope_theta, dict(args.rope_scaling or {})
    old_name = scaling.pop("type", "default")
    name = scaling.pop("rope_type", old_name)
    if name == "ntk":  # by its definition a larger theta, and no scheme of transformers'
        theta *= scaling["factor"] ** (args.head_dim / (args.head_dim - 2))
        name = "default"
    if name == "dynamic":
        scaling.pop("original_max_position_embeddings")  # it is max_position_embeddings
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": trained_context(args),
        "rms_norm_eps": args.norm_eps,
        "rope_theta": theta,
        "rope_scaling": None if name == "default" else {"rope_type": name, **scaling},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
