"""What people have instead of a checkpoint's folder: the root of a hub cache, a folder with one .gguf in it, a GGUF
file under another name, an adapter without its base. Either what they mean is opened, or it is said what they have."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from llama.checkpoint import Checkpoint, Weights, open_checkpoint
from llama.errors import CheckpointError
from llama.interop.vocabulary import tokenizer_path as tokenizer_path
from llama.system import read_plain, readable, some_of

WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def open_weights(path: Path) -> Weights:
    """What `path` can only mean. CheckpointError that says what it is, and what to pass instead."""
    found = meant(path)
    if found != path:
        return open_checkpoint(found)
    if path.is_file() and read_plain(path, 4) in (b"GGUF", b"FUGG"):
        from llama.interop.gguf import GGUF

        return GGUF(path)
    return Checkpoint(path)


@readable()
def meant(path: Path) -> Path:
    """The folder or the file that a path stands for: itself, or what lies in it. CheckpointError for what is known to
    be no checkpoint, and where two could be meant."""
    if not path.exists():
        raise CheckpointError(f"there is no folder {path}; pass --ckpt_dir with the folder of the checkpoint")
    if path.is_file():
        return _file(path)
    names = {file.name for file in path.iterdir()}
    if "params.json" in names or "config.json" in names or any(name.startswith("consolidated.") for name in names):
        return path
    if {"snapshots", "refs"} & names:
        return _snapshot(path)
    if "adapter_config.json" in names:
        raise CheckpointError(_adapter(path))
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    first = [name for name in ggufs if (part := _PART.fullmatch(name)) is None or int(part[2]) == 1]
    if len(first) == 1:
        return path / first[0]
    if ggufs:
        raise CheckpointError(f"{path} holds {len(ggufs)} .gguf files ({some_of(ggufs)}): pass the path of one of them")
    weights = sorted(name for name in names if WEIGHTS.fullmatch(name))
    if weights:
        raise CheckpointError(
            f"{path} holds weights ({some_of(weights, 2)}) without their config.json: download it from where they came"
        )
    inside = sorted(
        name for name in names if any((path / name / own).is_file() for own in ("params.json", "config.json"))
    )
    if inside:
        raise CheckpointError(f"{path} holds folders of checkpoints ({some_of(inside)}): pass the path of one of them")
    return path


def _file(path: Path) -> Path:
    """A file of a checkpoint's folder stands for the folder."""
    folder = path.parent
    if path.suffix in (".safetensors", ".pth", ".bin") and any(
        (folder / name).is_file() for name in ("params.json", "config.json")
    ):
        return folder
    if path.name == "adapter_model.safetensors":
        raise CheckpointError(_adapter(folder))
    if path.suffix in (".pth", ".bin", ".safetensors", ".pt", ".ckpt"):
        raise CheckpointError(
            f"{path} is a file of weights without params.json or config.json beside it: put it into its checkpoint's "
            "folder, and pass the folder"
        )
    if read_plain(path, 4) in (b"GGUF", b"FUGG"):
        return path
    if read_plain(path, 4) in (b"ggml", b"lmgg", b"fmgg", b"tjgg"):
        raise CheckpointError(f"{path} is a GGML file, from before GGUF: download the model as .gguf")
    raise CheckpointError(f"{path} is a file, and no GGUF: pass --ckpt_dir with a checkpoint's folder or a .gguf file")


def _snapshot(cache: Path) -> Path:
    """The snapshot of a hub cache's folder that its main branch names, or the only one."""
    snapshots = cache / "snapshots"
    held = sorted(folder.name for folder in snapshots.iterdir()) if snapshots.is_dir() else []
    main = cache / "refs" / "main"
    if main.is_file() and (name := read_plain(main, 100).decode("utf-8", "replace").strip()) in held:
        return snapshots / name
    if len(held) == 1:
        return snapshots / held[0]
    if not held:
        raise CheckpointError(f"{cache} is a hub cache without a snapshot: give the download command again")
    raise CheckpointError(f"{cache} holds {len(held)} snapshots ({some_of(held)}): pass {snapshots}/ and one of these")


def _adapter(folder: Path) -> str:
    base: Any = None
    with contextlib.suppress(ValueError, AttributeError):
        base = json.loads(read_plain(folder / "adapter_config.json")).get("base_model_name_or_path")
    named = f", {base!r}" if isinstance(base, str) and base else ""
    return (
        f"{folder} is an adapter (LoRA), which changes a base model{named} and can't be used alone: merge it into the "
        "base (PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)), and pass "
        "that folder"
    )
