"""Conversion: there and back bit by bit, in little memory; and whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from interop import llamas_of_transformers as theirs
from llama import cli
from llama.checkpoint import Checkpoint, open_checkpoint, save
from llama.config import ModelArgs
from llama.generation import Llama
from llama.interop import convert as module
from llama.interop.convert import convert
from llama.prompts import infilling
from parallel.ranks import RankFailed, on_ranks, outcomes
from parallel.shards import shard

ARGS = ModelArgs(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, hidden_dim=96, rope_theta=1e6, max_batch_size=2
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in two shards, without a tokenizer."""
    save(tmp_path / "source", ARGS, reference.random_weights(ARGS), n_shards=2)
    return tmp_path / "source"


pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.model is missing")


def tensors_of(path: Path) -> list[dict[str, Tensor]]:
    return [torch.load(file, weights_only=True) for file in sorted(path.glob("consolidated.*.pth"))]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.dtype == other[name].dtype, name
        assert torch.equal(weight, other[name]), name


# --- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_shards_to_hugging_face_and_back_are_the_same_bits(
    n_kv_heads: int, n: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    args = dataclasses.replace(ARGS, n_kv_heads=n_kv_heads)
    weights = {name: w.to(dtype) for name, w in reference.random_weights(args).items()}
    save(tmp_path / "a", args, weights, n)
    convert(tmp_path / "a", tmp_path / "b", to="hf")
    for m in {n, 1, 4}:
        convert(tmp_path / "b", tmp_path / f"c{m}", to="meta", shards=m)
        for rank, own in enumerate(tensors_of(tmp_path / f"c{m}")):
            assert_same(own, shard(weights, args, rank, m))
        assert Checkpoint(tmp_path / f"c{m}").args() == Checkpoint(tmp_path / "a").args()


@pytest.mark.parametrize(("n", "m"), [(1, 8), (8, 1), (2, 4), (4, 2), (2, 2)])
def test_shards_to_another_number_of_shards(n: int, m: int, tmp_path: Path) -> None:
    weights = reference.random_weights(ARGS)
    save(tmp_path / "a", ARGS, weights, n)
    convert(tmp_path / "a", tmp_path / "b", to="meta", shards=m)
    found = tensors_of(tmp_path / "b")
    assert len(found) == m
    for rank, own in enumerate(found):
        assert_same(own, shard(weights, ARGS, rank, m))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_rounds_and_nothing_else(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    convert(source, tmp_path / "b", to="hf", dtype=dtype)
    convert(tmp_path / "b", tmp_path / "again", to="hf", dtype=torch.float32)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    for path, stored in ((tmp_path / "b", dtype), (tmp_path / "again", torch.float32)):
        opened = open_checkpoint(path)
        got = {name: opened.tensor(name, ARGS) for name in opened.names()}
        assert_same(got, {name: w.to(dtype).to(stored) for name, w in reference.random_weights(ARGS).items()})


def test_tensors_of_several_dtypes_keep_theirs(tmp_path: Path) -> None:
    weights = reference.random_weights(ARGS)
    weights = {name: w if "norm" in name else w.bfloat16() for name, w in weights.items()}
    save(tmp_path / "a", ARGS, weights)
    convert(tmp_path / "a", tmp_path / "b", to="hf")
    convert(tmp_path / "b", tmp_path / "c", to="meta")
    assert_same(tensors_of(tmp_path / "c")[0], weights)


def test_scaling_survives(tmp_path: Path) -> None:
    args = dataclasses.replace(
        ARGS, rope_scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    )
    save(tmp_path / "a", args, reference.random_weights(args))
    convert(tmp_path / "a", tmp_path / "b", to="hf")
    assert open_checkpoint(tmp_path / "b").args() == open_checkpoint(tmp_path / "a").args()


# --- what is written ---------------------------------------------------------------------------------------------


def test_written_shards_are_files_of_the_published_format(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "b", to="meta", shards=4)
    names = [f"consolidated.{i:02d}.pth" for i in range(4)]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [*names, "params.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "source"]  # nothing is left beside it
    for name, own in zip(names, tensors_of(tmp_path / "b"), strict=True):
        assert zipfile.ZipFile(tmp_path / "b" / name).testzip() is None
        assert (tmp_path / "b" / name).stat().st_size < sum(w.nbytes for w in own.values()) + 30_000


def test_large_folders_come_in_files_with_an_index(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 40_000)
    convert(source, tmp_path / "b", to="hf")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 3
    assert [path.name for path in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert {path.name for path in files} == set(index["weight_map"].values())
    weights = reference.random_weights(ARGS)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    assert all(path.stat().st_size <= 40_000 + 4096 + 256 * 50 for path in files)
    read = theirs.read(tmp_path / "b").state_dict()
    assert torch.equal(read["lm_head.weight"], weights["output.weight"])
    opened = open_checkpoint(tmp_path / "b")
    assert_same({name: opened.tensor(name, ARGS) for name in opened.names()}, weights)


def test_the_library_reads_what_is_written(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    convert(source, tmp_path / "b", to="hf")
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(found["model.norm.weight"], reference.random_weights(ARGS)["norm.weight"])


def test_the_embedding_of_a_tied_model_is_its_output_too(tmp_path: Path) -> None:
    model = theirs.make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="meta")
    own = tensors_of(tmp_path / "b")[0]
    assert torch.equal(own["output.weight"], own["tok_embeddings.weight"])
    convert(tmp_path / "b", tmp_path / "c", to="hf")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_folders_other_files_go_with_it_into_another_folder(tmp_path: Path) -> None:
    theirs.make().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"chat_template": "its own"}')
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 7]}))
    convert(tmp_path / "a", tmp_path / "b", to="hf", dtype=torch.bfloat16)
    assert (tmp_path / "b" / "tokenizer_config.json").read_text() == '{"chat_template": "its own"}'
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["max_position_embeddings"] == 256
    assert written["eos_token_id"] == [2, 7]


def test_transformers_writes_what_ours_writes(tiny_checkpoint: Path, tiny_llama: Llama, tmp_path: Path) -> None:
    """From texts to texts: a completion and an infilling, 64 greedy tokens each, with its tokenizer and its model."""
    from transformers import AutoTokenizer

    convert(tiny_checkpoint, tmp_path / "b", to="hf")
    model, tokenizer = theirs.read(tmp_path / "b"), AutoTokenizer.from_pretrained(tmp_path / "b")
    ends = [tiny_llama.tokenizer.eos_id, tiny_llama.tokenizer.eot_id]
    assert model.generation_config.eos_token_id == ends
    prefix, suffix = "def add(a, b):\n    ", "\n    return c\n"
    asked = [prefix, f"{prefix}<FILL_ME>{suffix}"]
    expected = [
        tiny_llama.tokenizer.encode(prefix, True, False),
        infilling(tiny_llama.tokenizer, prefix, suffix).tokens,
    ]
    for text, ids in zip(asked, expected, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        assert encoded["input_ids"][0].tolist() == ids
        (ours,), _ = tiny_llama.generate([ids], 64, temperature=0, stop_token=ends[1])
        assert theirs.greedy_of_transformers(model, encoded["input_ids"], 64)[0].tolist() == ours
    convert(tmp_path / "b", tmp_path / "c", to="meta")
    assert Llama.build(tmp_path / "c").generate([ids], 64, temperature=0, stop_token=ends[1])[0] == [ours]
    assert Llama.build(tmp_path / "b").generate([ids], 64, temperature=0, stop_token=ends[1])[0] == [ours]


# --- whole or not at all -----------------------------------------------------------------------------------------


def refusal(src: Path, dst: Path, **options: Any) -> str:
    before = set(dst.parent.iterdir()) if dst.parent.is_dir() else set()
    with pytest.raises(ValueError, match=r".") as caught:
        convert(src, dst, **options)
    assert (set(dst.parent.iterdir()) if dst.parent.is_dir() else set()) == before  # nothing is left
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_existing_destination_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert str(tmp_path / "b") in refusal(source, tmp_path / "b")
    assert "exists" in refusal(source, source)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "onnx"}, "onnx"),
        ({"to": "hf", "shards": 2}, "--to meta"),
        ({"to": "meta", "shards": 0}, "--shards 0"),
        ({"to": "meta", "shards": 3}, "--shards 3"),
        ({"to": "meta", "shards": 16}, "--shards 16"),
    ],
)
def test_what_cannot_be_written_is_named(source: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    assert said in refusal(source, tmp_path / "b", **options)


def test_a_source_of_other_tensors_is_named(source: Path, tmp_path: Path) -> None:
    for path in source.glob("*.pth"):
        own = torch.load(path, weights_only=True)
        own["layers.1.ffn_norm.weight"] = torch.ones(65)
        torch.save(own, path)
    assert "layers.1.ffn_norm.weight" in refusal(source, tmp_path / "b")
    for path in source.glob("*.pth"):
        own = torch.load(path, weights_only=True)
        own["more.weight"] = own.pop("layers.1.ffn_norm.weight")
        torch.save(own, path)
    said = refusal(source, tmp_path / "b", to="meta")
    assert "missing: layers.1.ffn_norm.weight" in said
    assert "unexpected: more.weight" in said


def test_a_place_that_cannot_hold_a_folder_is_named(source: Path, tmp_path: Path) -> None:
    said = refusal(source, source / "params.json" / "b")
    assert str(source / "params.json" / "b") in said
    assert "another place" in said


def test_too_small_a_disk_is_named_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1000))
    assert "1,000 bytes free" in refusal(source, tmp_path / "b")


def _on_a_full_disk(init_method: str, src: Path, dst: Path, to: str) -> str:
    """What is said where files can grow to 60,000 bytes only, as a quota or a full disk would have it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        convert(src, dst, to)
    except ValueError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "written"


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(source: Path, tmp_path: Path, to: str) -> None:
    (said,) = on_ranks(_on_a_full_disk, 1, source, tmp_path / "b", to)
    assert str(tmp_path / "b") in said
    assert "make room" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_disk_that_fills_up_while_a_shard_is_put_together(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(own: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nand more")

    monkeypatch.setattr(module.torch, "save", full)
    assert "file write failed" in refusal(source, tmp_path / "b", to="meta")


def _killed_on_the_way(init_method: str, src: Path, dst: Path, to: str, after: int) -> None:
    """Dies by SIGKILL with the tensor number `after`."""
    write, count = module._write, [0]

    def deadly(*args: Any) -> int:
        count[0] += 1
        if count[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)

    module._write = deadly
    convert(src, dst, to, 2 if to == "meta" else 1)


@pytest.mark.parametrize(("to", "after"), [("hf", 9), ("hf", 21), ("meta", 9), ("meta", 30)])
def test_a_killed_conversion_leaves_nothing_that_looks_whole(source: Path, tmp_path: Path, to: str, after: int) -> None:
    (outcome,) = outcomes(_killed_on_the_way, 1, source, tmp_path / "b", to, after)
    assert isinstance(outcome, RankFailed)
    assert "died" in str(outcome)
    left = [path for path in tmp_path.iterdir() if path != source]
    assert [path.name[:3] for path in left] == [".b."]  # it was on its way, under another name
    with pytest.raises(ValueError, match=r"params\.json is missing|no config\.json|consolidated"):
        open_checkpoint(left[0])
    convert(source, tmp_path / "b", to)  # and it is not in the way of another try
    assert open_checkpoint(tmp_path / "b").args().dim == 64


def test_an_interrupted_conversion_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- memory ------------------------------------------------------------------------------------------------------

BIG = ModelArgs(dim=512, n_layers=8, n_heads=8, n_kv_heads=4, vocab_size=16000, hidden_dim=1408)  # 80 MB in bfloat16


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _growth(init_method: str, src: Path, dst: Path, to: str, shards: int, dtype: torch.dtype | None) -> int:
    """By how many bytes the process's private memory grows at most while it converts."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _private_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    before = _private_bytes()
    watcher.start()
    convert(src, dst, to, shards, dtype)
    done.set()
    watcher.join()
    return peak[0] - before


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is measured as Linux reports it")
def test_a_conversion_takes_one_tensor_of_memory(tmp_path: Path) -> None:
    from llama.model import Transformer

    with torch.device("meta"):
        shapes = {name: w.shape for name, w in Transformer(BIG).state_dict().items()}
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    largest = max(w.nbytes for w in weights.values())
    whole = sum(w.nbytes for w in weights.values())
    room = 1.2 * largest + 16e6  # chunks, and what libraries take when they are first used
    assert room < whole / 2
    save(tmp_path / "two", BIG, weights, 2)
    for src, dst, *how in (
        ("two", "hf", "hf", 1, None),
        ("hf", "one", "meta", 1, None),
        ("two", "four", "meta", 4, torch.float32),
    ):
        (growth,) = on_ranks(_growth, 1, tmp_path / src, tmp_path / dst, *how)
        assert growth < room, (dst, growth)


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_converts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "codellama",
        "convert",
        str(source),
        str(tmp_path / "b"),
        "--to",
        "meta",
        "--shards",
        "4",
        "--dtype",
        "bfloat16",
    ]
    monkeypatch.setattr("sys.argv", words)
    cli.main()
    assert str(tmp_path / "b") in capsys.readouterr().out
    assert {w.dtype for own in tensors_of(tmp_path / "b") for w in own.values()} == {torch.bfloat16}
    monkeypatch.setattr("sys.argv", [*words[:-1], "int3"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "bfloat16" in capsys.readouterr().err
