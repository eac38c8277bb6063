"""Plans: the published sizes, what PyTorch really allocates, and suggestions that fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reference
from fixtures_text import ARGS
from llama import Llama, Transformer, checkpoint, load
from llama.checkpoint import Checkpoint
from llama.cli import dispatch, parse
from llama.config import PRESETS, ModelArgs
from llama.generation import EMBEDDED
from llama.interop import plan as module
from llama.interop.layout import read_args, shard_shapes, whole_shapes
from llama.interop.measure_plan import compare, fill
from llama.interop.memory import HOST_TOKEN, QUANTIZATIONS, Settings, plan, weight_bytes
from llama.interop.plan import (
    alternatives,
    architecture,
    changed,
    command,
    difference,
    fits,
    parse_size,
    require,
    verdict,
)
from llama.parallel import Ranks
from llama.quantize.layers import linears, quantize_
from llama.quantize.saved import quantize_checkpoint
from llama.tokenizer import Tokenizer

GB = 10**9


def preset(name: str, **limits: Any) -> ModelArgs:
    return ModelArgs(**{**PRESETS[name], "max_seq_len": 4096, "max_batch_size": 1, **limits})


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "kv_a_token"),
    [("7B", 6.739, 524_288), ("13B", 13.016, 819_200), ("34B", 33.744, 196_608), ("70B", 68.977, 327_680)],
)
def test_published_parameters_and_cache_of_a_token(name: str, billions: float, kv_a_token: int) -> None:
    planned = plan(preset(name, max_seq_len=1000, max_batch_size=3))
    assert round(planned.weights / 2 / 1e9, 3) == billions
    assert planned.kv_cache == kv_a_token * 1000 * 3
    assert plan(preset(name), Settings(kv_dtype=torch.float8_e4m3fn)).kv_cache == kv_a_token * 4096 // 2


@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_the_shapes_are_the_models_own(n_kv_heads: int) -> None:
    args = dataclasses.replace(ARGS, n_kv_heads=n_kv_heads)
    with torch.device("meta"):
        model = Transformer(args)
    assert whole_shapes(args) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    split = checkpoint.split(reference.random_weights(args), args, 4)
    assert shard_shapes(args, 4, 3) == {name: tuple(part.shape) for name, part in split[3].items()}


@pytest.mark.parametrize("name", ["7B", "70B"])
def test_ranks_share_what_is_cut(name: str) -> None:
    one, eight = plan(preset(name)), plan(preset(name), Settings(model_parallel_size=8))
    whole = one.args.dim * (2 * one.args.n_layers + 1) * 2  # the norms, which each rank holds
    assert eight.weights == (one.weights - whole) // 8 + whole
    assert eight.kv_cache * 8 == one.kv_cache
    assert eight.prefill < one.prefill


def test_more_ranks_than_kv_heads_hold_one_each() -> None:
    one, sixteen = plan(preset("34B")), plan(preset("34B"), Settings(model_parallel_size=16))
    assert sixteen.kv_cache == one.kv_cache // 8


def test_quantized_weights_leave_embedding_and_norms() -> None:
    args = ModelArgs(dim=64, n_layers=1, n_heads=2, vocab_size=96, hidden_dim=128)
    matrices = 4 * 64 * 64 + 3 * 64 * 128 + 96 * 64
    kept = (96 * 64 + 3 * 64) * 2
    assert weight_bytes(args, Settings()) == 2 * matrices + kept
    assert weight_bytes(args, Settings(quantize="int8")) == matrices + kept + 2 * (5 * 64 + 2 * 128 + 96)
    inner, output = matrices - 96 * 64, 96 * 64 + 2 * 96
    assert weight_bytes(args, Settings(quantize="int4")) == inner // 2 + 4 * inner // 32 + output + kept


@pytest.mark.parametrize("word", QUANTIZATIONS)
def test_quantized_weights_are_as_large_as_planned(word: str) -> None:
    """By what llama/quantize stores of a model, tensor by tensor."""
    args = ModelArgs(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, hidden_dim=256)
    if word == "nf4":
        pytest.importorskip("bitsandbytes")
    model = quantize_(Transformer(args).to(torch.bfloat16).requires_grad_(False), word)
    stored = [tensor for layer in linears(model).values() for tensor in layer.product.stored.values()]
    left = [weight for weight in model.parameters() if weight is not None]
    assert sum(tensor.nbytes for tensor in (*stored, *left)) == weight_bytes(args, Settings(quantize=word))


def test_build_plans_for_the_weights_as_they_will_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory that holds the 8 bits and not the 32; from a plain folder, and from one that is quantised already."""
    args = Checkpoint(EMBEDDED).args(max_seq_len=64, max_batch_size=1)
    sizes = [plan(args, Settings(1, torch.float32, None, word, device="cpu")).total for word in (None, "int8")]
    monkeypatch.setattr(module, "free_memory", lambda device: (sizes[0] + sizes[1]) // 2)
    limits: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 1, "device": "cpu"}
    with pytest.raises(ValueError, match="--quantize int8"):
        load(**limits)
    assert load(**limits, quantize="int8").text_completion(["x"], max_gen_len=1)
    quantize_checkpoint(EMBEDDED, tmp_path / "int8", "int8")
    assert load(tmp_path / "int8", **limits).text_completion(["x"], max_gen_len=1)


def test_memory_is_linear_in_the_context() -> None:
    sizes = [plan(preset("7B", max_seq_len=n)).total for n in (32_768, 65_536, 98_304)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.01)


# --- what a run really allocates ---------------------------------------------------------------------------------


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` held at once: every allocation that PyTorch's CPU allocator reports."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


NARROW = {"hidden_dim": 64}  # attention is what counts, not the feed-forward layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("changes", "rows", "slots", "chunk"),
    [
        ({"n_kv_heads": 8, "hidden_dim": 344}, 1, 512, 512),
        ({"n_kv_heads": 8, **NARROW}, 1, 512, 512),
        ({"n_kv_heads": 8, **NARROW}, 3, 600, 128),
        ({"n_kv_heads": 2, "hidden_dim": 344}, 3, 1000, 128),  # in bfloat16 the kernel has 64 KiB besides
        ({"n_kv_heads": 2, **NARROW}, 3, 600, 256),
        ({"n_kv_heads": 2, **NARROW}, 1, 1500, 512),  # the last chunk, not a whole one, is the largest moment
    ],
)
def test_a_plan_is_what_a_run_allocates(
    tokenizer: Tokenizer, changes: dict[str, int], rows: int, slots: int, chunk: int, dtype: torch.dtype
) -> None:
    args = ModelArgs(
        dim=128,
        n_layers=2,
        n_heads=8,
        vocab_size=tokenizer.n_words,
        max_batch_size=rows,
        max_seq_len=slots,
        **changes,  # type: ignore[arg-type]
    )
    llama = Llama(Transformer(args).to(dtype).requires_grad_(False), tokenizer, prefill_chunk=chunk)
    planned = plan(args, Settings(dtype=dtype, prefill_chunk=chunk, device="cpu"))
    tensors = planned.total - planned.weights - rows * slots * HOST_TOKEN  # lists are none of the allocator's
    assert tensors / allocated(lambda: fill(llama)) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("slots", [512, 2048])
def test_a_plan_is_what_the_embedded_checkpoint_takes(slots: int, capsys: pytest.CaptureFixture[str]) -> None:
    compare(shapes=("embedded",), slots=slots, rows=4, json=True)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["ratio"] == pytest.approx(1, abs=0.05)


# --- what fits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limits", "settings", "memory"),
    [
        ("7B", {"max_seq_len": 100_000}, {}, 40 * GB),
        ("7B", {}, {"dtype": torch.float32}, 24 * GB),
        ("34B", {"max_batch_size": 64}, {}, 80 * GB),
        ("70B", {"max_seq_len": 100_000}, {"model_parallel_size": 2}, 80 * GB),
        ("70B", {"max_seq_len": 100_000, "max_batch_size": 8}, {}, 48 * GB),
    ],
)
def test_suggestions_fit_and_are_the_nearest(
    name: str, limits: dict[str, int], settings: dict[str, Any], memory: int
) -> None:
    planned = plan(preset(name, **limits), Settings(**settings))
    assert not fits(planned, memory)
    found = alternatives(planned, memory)
    assert found
    for other in found:
        assert fits(other, memory)
        assert other == plan(other.args, other.settings)
        assert difference(planned, other).startswith("--")
        # One step back, and it would not fit.
        for limit, step in (("max_seq_len", 128), ("max_batch_size", 1)):
            if getattr(other.args, limit) < getattr(planned.args, limit):
                assert not fits(changed(other, **{limit: getattr(other.args, limit) + step}), memory)
        if other.settings.model_parallel_size > planned.settings.model_parallel_size:
            halved = other.settings.model_parallel_size // 2
            assert halved < planned.settings.model_parallel_size or not fits(
                changed(other, model_parallel_size=halved), memory
            )


def test_where_nothing_would_do_nothing_is_suggested() -> None:
    assert alternatives(plan(preset("70B")), GB // 10) == []
    assert "nor would one row" in verdict(plan(preset("70B")), GB // 10)


def test_the_verdict_says_what_to_type() -> None:
    planned = plan(preset("7B", max_seq_len=100_000))
    assert verdict(planned, 80 * GB).startswith("fits: ")
    said = verdict(planned, 40 * GB)
    assert said.startswith("does not fit")
    assert "--max_seq_len " in said
    assert "--model_parallel_size 2" in said


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_parallel_size": 3}, "3 ranks"),
        ({"model_parallel_size": 64}, "64 ranks"),
        ({"model_parallel_size": 0}, "model_parallel_size"),
        ({"quantize": "int2"}, "int2.*int8, .*int4"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_settings_that_can_not_be_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan(preset("7B"), Settings(**settings))


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        plan(ModelArgs())


def test_build_is_told_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Checkpoint(EMBEDDED)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    monkeypatch.setattr(module, "free_memory", lambda device: 8 * GB)
    with pytest.raises(
        ValueError, match=r"13\.48 GB of weights.*8\.00 GB free.*--model_parallel_size 4.*CODELLAMA_IGNORE_PLAN"
    ):
        require(plain, preset("7B"), ranks, torch.bfloat16)
    monkeypatch.setenv("CODELLAMA_IGNORE_PLAN", "1")
    require(plain, preset("7B"), ranks, torch.bfloat16)
    monkeypatch.delenv("CODELLAMA_IGNORE_PLAN")
    monkeypatch.setattr(module, "free_memory", lambda device: None)
    require(plain, preset("7B"), ranks, torch.bfloat16)
    monkeypatch.undo()
    require(plain, dataclasses.replace(ARGS, max_seq_len=16), ranks, torch.float32)  # on this machine


def test_load_asks_the_plan_before_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("llama.quantize.layers.quantize_load", read)
    monkeypatch.setattr(module, "free_memory", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"cpu has 1\.0 MB free"):
        load(device="cpu")
    monkeypatch.setenv("CODELLAMA_IGNORE_PLAN", "1")
    with pytest.raises(AssertionError, match="weights were read"):
        load(device="cpu")


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * GB),
        ("80gb", 80 * GB),
        ("79.5GiB", int(79.5 * 2**30)),
        ("512 MB", 512 * 10**6),
        ("17179869184", 2**34),
    ],
)
def test_sizes_as_they_are_written(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "80 apples", "-1GB", "0", "80"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="80GB"):
        parse_size(text)


def test_the_command_plans_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    command("7b", max_seq_len=100_000, max_batch_size=1, device_memory=80 * GB)
    out = capsys.readouterr().out
    assert "13.48 GB" in out  # weights
    assert "52.43 GB" in out  # KV cache
    assert "fits: " in out
    command("34B", max_seq_len=100_000, max_batch_size=1, model_parallel_size=2, device_memory=40 * GB)
    assert "does not fit" in capsys.readouterr().out


def test_the_command_plans_a_folder_without_weights(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "hidden_dim": 96, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        read_args(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    assert read_args(tmp_path).vocab_size == Tokenizer(tokenizer_path).n_words
    dispatch(command, [str(tmp_path), "--device", "cpu", "--device_memory", "1GB"], "plan")
    assert "fits: " in capsys.readouterr().out


CONFIG = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def test_a_config_json_is_the_same_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert plan(read_args(tmp_path)).weights == plan(preset("34B")).weights
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config\.json: .*bert"):
        read_args(tmp_path)


def test_words_that_mean_nothing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="7B, 13B, 34B, 70B"):
        command("8B")
    for option, word, known in (
        ("--dtype", "int3", "float32"),
        ("--kv_dtype", "fp4", "float8"),
        ("--device", "tpu", "cpu"),
    ):
        with pytest.raises(SystemExit):
            dispatch(command, ["7B", option, word], "plan")
        err = capsys.readouterr().err
        assert option in err
        assert word in err
        assert known in err


def test_without_limits_it_is_one_conversation_of_the_models_own_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16,384 tokens where theta is 1e6; what a config.json says; and the embedded checkpoint's."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 6000}))
    for model, length in (("13B", 16_384), (str(tmp_path), 6000), (str(EMBEDDED), 2048)):
        args = architecture(model)
        assert (args.max_seq_len, args.max_batch_size) == (length, 1)
        command(model, device_memory=GB)
        assert f"1 row of {length:,} tokens" in capsys.readouterr().out


def test_suggestions_are_all_that_fit_and_none_is_better_than_another() -> None:
    """One change, and several together: fewer bits, fewer rows, a shorter context."""
    planned = plan(preset("34B", max_seq_len=16_384, max_batch_size=64))
    said = [difference(planned, other) for other in alternatives(planned, 80 * GB)]
    assert len(said) == len(set(said))
    kinds = [tuple(word for word in words.split() if word.startswith("--")) for words in said]
    assert [len(kind) for kind in kinds] == sorted(len(kind) for kind in kinds)
    for kind in ("--max_batch_size",), ("--max_seq_len",), ("--model_parallel_size",):
        assert kind in kinds
    for kind in ("--max_batch_size", "--quantize"), ("--max_seq_len", "--quantize"), ("--max_seq_len", "--kv_dtype"):
        assert kind in kinds
    tight = plan(preset("34B", max_seq_len=100_000, max_batch_size=64))
    together = [difference(tight, other) for other in alternatives(tight, 24 * GB)]
    assert any("--max_batch_size 1 " in words and "--max_seq_len" in words and "int4" in words for words in together)
    # In words that a person can paste.
    for words in said:
        arguments = parse(command, ["34B", *words.split(), "--device_memory", "80GB"], "plan")[1]
        settings = Settings(
            arguments["model_parallel_size"], quantize=arguments["quantize"], prefill_chunk=arguments["prefill_chunk"],
            kv_dtype=torch.int8 if arguments["kv_dtype"] else None,
        )  # fmt: skip
        rows = 64 if "--max_batch_size" not in words else arguments["max_batch_size"]
        assert fits(
            plan(architecture("34B", max_seq_len=arguments["max_seq_len"], max_batch_size=rows), settings), 80 * GB
        )
