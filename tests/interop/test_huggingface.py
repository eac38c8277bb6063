"""Hugging Face folders as checkpoints: transformers' logits and tokens, any number of ranks, and what can't be one."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interop import llamas_of_transformers as theirs
from llama.checkpoint import open_checkpoint
from llama.config import ModelArgs
from llama.interop.convert import convert
from llama.interop.huggingface import HuggingFace, open_weights, to_config
from parallel.ranks import on_ranks, outcomes

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.model is missing")
TOKENS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers saves of a small model with grouped heads."""
    folder = tmp_path_factory.mktemp("saved") / "it"
    theirs.make().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    copy = tmp_path / "it"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; ... takes one away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- the same numbers as transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", theirs.KINDS)
def test_a_folder_gives_the_logits_and_tokens_of_transformers_both_ways(kind: str, tmp_path: Path) -> None:
    """Theirs, read by us; and read by us, written by us as shards and back, read by them."""
    model = theirs.make(**theirs.KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    expected = theirs.logits(model, TOKENS)
    tokens = theirs.greedy_of_transformers(model, TOKENS, 64)
    ours = theirs.read_ours(tmp_path / "theirs")
    with torch.inference_mode():
        got = torch.cat([ours(TOKENS[:, :30], 0), ours(TOKENS[:, 30:], 30)], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(theirs.greedy(ours, TOKENS, 64), tokens)

    convert(tmp_path / "theirs", tmp_path / "meta", to="meta", shards=2)
    convert(tmp_path / "meta", tmp_path / "ours", to="hf")
    again = theirs.read(tmp_path / "ours")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    torch.testing.assert_close(theirs.logits(again, TOKENS), expected, rtol=0, atol=1e-6)
    assert torch.equal(theirs.greedy_of_transformers(again, TOKENS, 64), tokens)


def _logits(init_method: str, folder: Path, tokens: Tensor) -> Tensor:
    model = theirs.read_ours(folder, init_method=init_method)
    with torch.inference_mode():
        return model(tokens, 0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["MQA", "tied"])
def test_any_number_of_ranks_reads_a_folder(kind: str, world_size: int, tmp_path: Path) -> None:
    model = theirs.make(**theirs.KINDS[kind])
    model.save_pretrained(tmp_path / "it", max_shard_size="100KB")
    assert open_checkpoint(tmp_path / "it").n_shards > 1
    for got in on_ranks(_logits, world_size, tmp_path / "it", TOKENS):
        torch.testing.assert_close(got, theirs.logits(model, TOKENS), rtol=0, atol=1e-4)


def test_grouped_heads_that_the_ranks_cannot_share_are_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3}
    theirs.make(**sizes).save_pretrained(tmp_path / "it")
    for failure in outcomes(_logits, 2, tmp_path / "it", TOKENS):
        assert re.search(r"ValueError: .*3 can't be shared by 2 ranks", str(failure))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_each_rank_takes_its_own_part_of_every_tensor(saved: Path, tmp_path: Path, world_size: int) -> None:
    """The parts are those of the same weights in the published format."""
    convert(saved, tmp_path / "meta", to="meta")
    one, other = open_checkpoint(saved), open_checkpoint(tmp_path / "meta")
    args = one.args()
    assert sorted(one.names()) == sorted(other.names())
    for name in one.names():
        for rank in range(world_size):
            assert torch.equal(one.tensor(name, args, rank, world_size), other.tensor(name, args, rank, world_size))


def test_tensors_are_views_of_the_file_but_where_rows_are_reordered(saved: Path) -> None:
    opened = open_weights(saved)
    args = opened.args()
    whole = {name: opened.tensor(name, args) for name in opened.names()}
    part = {name: opened.tensor(name, args, 1, 2) for name in opened.names()}
    # A view of a half has the storage of the whole; a copy its own.
    views = {name for name in whole if part[name].untyped_storage().nbytes() == whole[name].nbytes}
    assert set(whole) - views == {f"layers.{i}.attention.{w}.weight" for i in range(2) for w in ("wq", "wk")}


@pytest.mark.parametrize("parts", [1, 2])
def test_bin_files_are_read_as_well(saved: Path, folder: Path, parts: int) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [
        f"pytorch_model-{i + 1:05d}-of-{parts:05d}.bin" if parts > 1 else "pytorch_model.bin" for i in range(parts)
    ]
    placed = {name: names[i % parts] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
    if parts > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    one, other = open_weights(folder), open_weights(saved)
    args = other.args()
    assert one.n_shards == parts
    assert one.args() == args
    assert all(torch.equal(one.tensor(name, args), other.tensor(name, args)) for name in other.names())


def test_frequencies_in_old_files_are_ignored(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    theirs.read_ours(folder)


# --- config.json -------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_config_json(saved: Path) -> None:
    expected = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, hidden_dim=96, vocab_size=320, max_seq_len=7)
    assert open_weights(saved).args(max_seq_len=7) == expected


def test_the_vocabulary_is_the_embeddings_own(folder: Path) -> None:
    change_config(folder, vocab_size=32000)
    assert open_weights(folder).args().vocab_size == 320


def test_absent_kv_heads_are_as_many_as_heads(tmp_path: Path) -> None:
    theirs.make(num_key_value_heads=8).save_pretrained(tmp_path / "it")
    change_config(tmp_path / "it", num_key_value_heads=..., head_dim=8)
    assert open_weights(tmp_path / "it").args().n_kv_heads == 8


LONG = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize(
    ("old", "new", "theta", "scaling"),
    [
        ({}, None, 1e4, None),
        ({"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e6}, 1e6, None),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
            1e6,
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            1e4,
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {**theirs.LLAMA3, "original_max_position_embeddings": 64}},
            {**theirs.LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 5e5},
            5e5,
            {**theirs.LLAMA3, "original_max_position_embeddings": 64},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 8.0, "attention_factor": None}},
            {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4},
            1e4,
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
        ),
        (
            {"rope_scaling": {"type": "longrope", **LONG, "original_max_position_embeddings": 64}},
            {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 64, "rope_theta": 1e4},
            1e4,
            {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 64, "factor": 4.0},  # of 256
        ),
    ],
)
def test_rope_is_read_in_both_spellings(
    folder: Path, old: dict[str, Any], new: dict[str, Any] | None, theta: float, scaling: dict[str, Any] | None
) -> None:
    nothing = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": ...}
    for spelling in (nothing | old, nothing | {"rope_parameters": new or ...}):
        change_config(folder, **spelling)
        args = open_weights(folder).args()
        assert args.rope_theta == theta
        assert args.rope_scaling == scaling


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, r"sliding_window of 4096"),
        ({"model_type": ...}, r"None.*'llama'"),
        ({"attention_bias": True}, r"attention_bias.*must be false"),
        ({"mlp_bias": True}, r"mlp_bias.*must be false"),
        ({"head_dim": 16}, r"head_dim is 16.*64.*8"),
        ({"hidden_act": "gelu"}, r"'gelu'.*'silu'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config.*bfloat16"),
        ({"hidden_size": ...}, r"hidden_size.*download"),
        ({"num_key_value_heads": 3}, r"n_kv_heads 3"),
        ({"rope_parameters": {"rope_type": "nobody's", "rope_theta": 1e4}}, r"nobody's.*linear"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor"),
        ({"rope_parameters": [1]}, r"rope_parameters"),
    ],
)
def test_what_the_core_cannot_run_is_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=said) as caught:
        open_weights(folder).args()
    assert str(folder / "config.json") in str(caught.value)


NUMBERS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "rope_theta", "head_dim"),
)


@pytest.mark.parametrize("value", ["8", True, 0, -8, 8.5, math.nan, math.inf, [8], {}], ids=str)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_cannot_be_is_named_as_config_json_names_it(folder: Path, key: str, value: Any) -> None:
    if value == 8.5 and key == "rope_theta":
        value = 0.5
    changes = {"rope_parameters": ..., "rope_scaling": ..., key: value}
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"config.json: {key} is {re.escape(repr(value))}; give a "):
        open_weights(folder).args()


def test_whole_floats_are_whole_numbers(folder: Path) -> None:
    before = open_weights(folder).args()
    change_config(folder, hidden_size=64.0, num_hidden_layers=2.0, num_key_value_heads=2.0, head_dim=8.0)
    assert open_weights(folder).args() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 0}}, "beta_slow is 0"),
        ({"rope_scaling": {**theirs.LLAMA3, "low_freq_factor": 0}}, "low_freq_factor is 0"),
        (
            {"rope_scaling": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 0}},
            "_embeddings is 0",
        ),
        ({"rope_scaling": {"rope_type": "longrope", **LONG}, "max_position_embeddings": "9"}, "_embeddings is '9'"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2}, "max_position_embeddings": None},
            "_embeddings is None",
        ),
        ({"rope_scaling": False}, "rope_scaling is no object"),
        ({"rope_scaling": []}, "rope_scaling is no object"),
    ],
)
def test_a_scaling_that_cannot_be_is_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    change_config(folder, **{"rope_parameters": ..., **changes})
    with pytest.raises(ValueError, match=rf"config.json: .*{said}"):
        open_weights(folder).args()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
        ({"num_hidden_layers": 999}, "n_layers is 999, but 2 in the tensors"),
        ({"hidden_size": 2**30, "num_attention_heads": 1, "head_dim": ...}, f"dim is {2**30}, but 64 in the tensors"),
    ],
)
def test_sizes_beyond_the_tensors_are_refused_at_once(folder: Path, changes: dict[str, Any], said: str) -> None:
    change_config(folder, **{"num_key_value_heads": ..., **changes})
    before = time.perf_counter()
    with pytest.raises(ValueError, match=said):
        open_weights(folder).args()
    assert time.perf_counter() - before < 1


@pytest.mark.parametrize(
    ("scaling", "position", "theta"),
    [
        ({}, 16384, 1e6),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, 65536, 1e6),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, 65536, 1e6 * 4.0 ** (128 / 126)),
        ({"rope_theta": 1e4}, 4096, 1e4),
    ],
)
def test_a_written_config_tells_the_context_and_knows_transformers_schemes_only(
    scaling: dict[str, Any], position: int, theta: float
) -> None:
    config = to_config(ModelArgs(**{"rope_theta": 1e6, **scaling}), torch.bfloat16)
    assert config["max_position_embeddings"] == position
    assert config["rope_theta"] == theta
    assert config["torch_dtype"] == "bfloat16"
    assert (config["rope_scaling"] or {}).get("rope_type") in (None, "linear")


# --- what can't be a checkpoint ----------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    """What is said of a folder that is refused: one paragraph."""
    with pytest.raises(ValueError, match=r".") as caught:
        theirs.read_ours(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_named(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    said = refusal(folder)
    assert str(path) in said
    assert "download it again" in said


@pytest.mark.parametrize("found", [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_something_else_in_place_of_a_file_is_named(folder: Path, found: bytes) -> None:
    (folder / "model.safetensors").write_bytes(found * 20)
    said = refusal(folder)
    assert str(folder / "model.safetensors") in said
    assert "web page or Git LFS pointer" in said


def test_a_stray_part_is_refused_at_once(folder: Path) -> None:
    """A set of the numbers of all parts takes minutes and gigabytes."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-99999999.safetensors")
    before = time.perf_counter()
    assert "lacks parts [2, 3, 4, 5, 6, 7 and 93 more] of 99999999" in refusal(folder)
    assert time.perf_counter() - before < 1


def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "own.safetensors")
    assert f"{folder / 'own.safetensors'} is a pipe" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_a_tensor_of_whole_numbers_is_named(folder: Path, name: str, dtype: torch.dtype) -> None:
    """It would be converted to numbers that mean nothing, and said nothing of."""
    change_tensors(folder, lambda t: t.update({name: t[name].to(dtype)}))
    assert re.search(rf"{folder}.*{name} is {dtype}.*not floating point", refusal(folder))


def test_an_embedding_without_rows_is_named(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.embed_tokens.weight": torch.tensor(1.0)}))
    assert re.search(r"embed_tokens.weight is torch.float32 of the shape \(\)", refusal(folder))


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert str(folder) in refusal(folder)


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    theirs.make().save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    return tmp_path / "parts"


def test_an_index_that_names_a_missing_file_is_named(indexed: Path) -> None:
    gone = sorted(indexed.glob("*.safetensors"))[1]
    gone.unlink()
    said = refusal(indexed)
    assert gone.name in said
    assert "model.safetensors.index.json" in said
    assert "download" in said


def test_a_missing_part_is_named_without_an_index_too(indexed: Path) -> None:
    (indexed / "model.safetensors.index.json").unlink()
    assert open_weights(indexed).args().n_layers == 2
    sorted(indexed.glob("*.safetensors"))[1].unlink()
    assert "[2]" in refusal(indexed)


def test_an_index_that_names_a_tensor_in_no_file_is_named(indexed: Path) -> None:
    path = indexed / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.2.mlp.up_proj.weight"] = sorted(indexed.glob("*.safetensors"))[0].name
    path.write_text(json.dumps(index))
    assert "model.layers.2.mlp.up_proj.weight" in refusal(indexed)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {"a": "../x"}}', '{"weight_map": [1]}', "nothing"])
def test_a_broken_index_is_named(indexed: Path, text: str) -> None:
    (indexed / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(indexed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing: layers.1.feed_forward.w3"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}), r"hold biases .*q_proj.bias"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"norm.weight \(65,\)"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(90, 64)}), r"w3.weight \(90, 64\)"),
        (lambda t: t.update({"model.layers.1.self_attn.o_proj.weight": torch.ones(64)}), r"o_proj.weight.*\(64,\)"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(60, 64)}),
            r"q_proj.weight.*\(60, 64\)",
        ),
        (lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(64, 64)}), r"wk.weight \(64, 64\)"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"no model.embed_tokens.weight"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path, change: Any, said: str) -> None:
    change_tensors(folder, change)
    text = refusal(folder)
    assert str(folder) in text
    assert re.search(said, text)


def test_without_the_library_one_sentence_says_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match=r"pip install 'codellama\[hf\]'"):
        HuggingFace(saved)


def test_a_cache_beyond_the_context_of_the_file_is_noted(folder: Path) -> None:
    change_config(folder, max_position_embeddings=128)
    with pytest.warns(UserWarning, match=r"max_seq_len 512 is beyond the 128 tokens that it says it was made for"):
        open_checkpoint(folder).args(max_seq_len=512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(folder).args(max_seq_len=128)
        open_checkpoint(folder).args()
