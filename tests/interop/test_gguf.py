"""GGUF files: what is written, transformers and the format's own arithmetic read alike; what others wrote is read."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fixtures_text import ARGS, WEIGHTS
from interop import llamas_of_transformers as theirs
from llama.checkpoint import open_checkpoint, save, split
from llama.config import ModelArgs
from llama.generation import Llama
from llama.interop.convert import convert
from llama.interop.gguf import GGUF, QUANTS, to_gguf, to_meta, write_gguf
from llama.tokenizer import Tokenizer
from parallel.ranks import on_ranks
from reference import random_weights

Types = gguf.GGMLQuantizationType


def write(
    path: Path,
    quant: str = "f32",
    args: ModelArgs = ARGS,
    weights: dict[str, Tensor] = WEIGHTS,
    tokenizer: Path | None = None,
) -> Path:
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    write_gguf(path, args, shapes, iter(weights.items()), quant, 512, tokenizer)
    return path


def read(path: Path) -> dict[str, Tensor]:
    found = open_checkpoint(path)
    return {name: found.tensor(name, ARGS).clone() for name in found.names()}


# --- written and read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_there_and_back_is_bit_exact(tmp_path: Path, quant: str, dtype: torch.dtype) -> None:
    weights = {name: w.to(dtype) for name, w in WEIGHTS.items()}
    found = read(write(tmp_path / "m.gguf", quant, weights=weights))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].dtype == (torch.float32 if weight.dim() == 1 else dtype)
        assert torch.equal(found[name].float(), weight.float()), name


def test_q8_0_rounds_by_at_most_half_a_step_of_its_block(tmp_path: Path) -> None:
    found = read(write(tmp_path / "m.gguf", "q8_0"))
    for name, weight in WEIGHTS.items():
        if weight.dim() == 1:
            assert torch.equal(found[name], weight)
            continue
        blocks, read_back = weight.double().view(-1, 32), found[name].double().view(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        # The step itself is float16.
        assert ((blocks - read_back).abs() <= step * (0.5 + 127 * 2**-11)).all(), name
        assert not torch.equal(blocks, read_back)


def test_rows_that_are_no_multiple_of_a_block_are_float16(tmp_path: Path) -> None:
    args = replace(ARGS, hidden_dim=80)
    weights = random_weights(args, seed=0)
    write(tmp_path / "m.gguf", "q8_0", args, weights)
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == Types.F16
    assert kinds["blk.0.ffn_up.weight"] == Types.Q8_0
    assert kinds["output_norm.weight"] == Types.F32


def test_names_go_both_ways() -> None:
    for name in WEIGHTS:
        assert to_meta(to_gguf(name)) == name
    assert len({to_gguf(name) for name in WEIGHTS}) == len(WEIGHTS)
    assert to_meta("blk.0.attn_q.bias") == "blk.0.attn_q.bias"
    assert to_meta("rope_freqs.weight") == "rope_freqs.weight"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_kv_heads": 8},
        {"rope_theta": 1e6, "norm_eps": 1e-6},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
    ids=str,
)
def test_sizes_come_back(tmp_path: Path, change: dict[str, Any]) -> None:
    args = replace(ARGS, **change)
    found = open_checkpoint(write(tmp_path / "m.gguf", args=args, weights=random_weights(args, seed=0))).args()
    assert found.norm_eps == pytest.approx(args.norm_eps)  # in float32
    assert replace(found, norm_eps=args.norm_eps) == replace(args, max_seq_len=found.max_seq_len)


def test_llama_3s_scaling_comes_back_from_its_factors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    args = replace(ARGS, dim=512, rope_theta=500000.0, rope_scaling=scaling)  # 32 pairs, so that some are scaled
    found = open_checkpoint(write(tmp_path / "m.gguf", args=args, weights=random_weights(args, seed=0))).args()
    assert found.rope_scaling is not None
    assert found.rope_scaling["factor"] == pytest.approx(8.0)
    assert found.rope_scaling["rope_type"] == "llama3"


# --- read by others --------------------------------------------------------------------------------------------------


def test_transformers_reads_the_same_model(tmp_path: Path, tokenizer_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    write(tmp_path / "m.gguf", tokenizer=tokenizer_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ours = Llama.build(tmp_path / "m.gguf", max_seq_len=32, max_batch_size=2, device="cpu")
    tokens = torch.randint(3, 1000, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours.model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


# --- written by others -----------------------------------------------------------------------------------------------


def q4_k(data: NDArray[np.uint8]) -> NDArray[np.float64]:
    """One block of 144 bytes to 256 numbers, as ggml's definition says: eight parts with a scale and a minimum each."""
    d, dmin = data[:4].view(np.float16).astype(np.float64)
    s, q = data[4:16].astype(int), data[16:].astype(int)
    out = []
    for j in range(8):
        scale, least = (
            (s[j] & 63, s[j + 4] & 63)
            if j < 4
            else ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
        )
        part = q[32 * (j // 2) : 32 * (j // 2) + 32] >> (4 * (j % 2)) & 15
        out.append(d * scale * part - dmin * least)
    return np.concatenate(out)


def q6_k(data: NDArray[np.uint8]) -> NDArray[np.float64]:
    """One block of 210 bytes to 256 numbers: sixteen parts with a scale of 8 bits each."""
    low, high, scales = data[:128].astype(int), data[128:192].astype(int), data[192:208].view(np.int8).astype(int)
    d = float(data[208:].view(np.float16)[0])
    out = np.zeros(256)
    for half in range(2):
        for part in range(4):
            for i in range(32):
                nibble = low[64 * half + 32 * (part % 2) + i] >> (4 * (part // 2)) & 15
                q = (nibble | (high[32 * half + i] >> (2 * part) & 3) << 4) - 32
                out[128 * half + 32 * part + i] = d * scales[8 * half + 2 * part + i // 16] * q
    return out


@pytest.mark.parametrize(
    ("kind", "size", "scales", "by_hand"), [("Q4_K", 144, (0, 2), q4_k), ("Q6_K", 210, (208,), q6_k)]
)
def test_k_quants_are_read_as_defined(tmp_path: Path, kind: str, size: int, scales: Any, by_hand: Any) -> None:
    """Two blocks a row, of random bytes: no library writes these."""
    args = ModelArgs(dim=512, n_layers=1, n_heads=4, vocab_size=64, hidden_dim=512)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (64, 2, size), dtype=np.uint8)
    for at in scales:
        data[:, :, at : at + 2] = rng.uniform(0.001, 0.1, (64, 2)).astype(np.float16)[..., None].view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("output.weight", data.reshape(64, 2 * size), raw_dtype=Types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path / "m.gguf").tensor("output.weight", args)
    expected = np.stack([np.concatenate([by_hand(block) for block in row]) for row in data])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_older_quants_are_read_near_what_they_were_made_of(tmp_path: Path, kind: str) -> None:
    weight = WEIGHTS["output.weight"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("output.weight", gguf.quantize(weight.numpy(), Types[kind]), raw_dtype=Types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path / "m.gguf").tensor("output.weight", ARGS)
    largest = weight.view(-1, 32).abs().amax(1, keepdim=True)
    assert ((found - weight).view(-1, 32).abs() <= largest / (100 if kind == "Q8_0" else 6)).all()


def test_tied_embeddings_are_the_output_too(tmp_path: Path) -> None:
    weights = {name: w for name, w in WEIGHTS.items() if name != "output.weight"}
    found = read(write(tmp_path / "m.gguf", weights=weights))
    assert torch.equal(found["output.weight"], WEIGHTS["tok_embeddings.weight"])


# --- used ------------------------------------------------------------------------------------------------------------


def test_it_runs_like_the_checkpoint_it_was_made_of(tmp_path: Path, tokenizer_path: Path, tiny_llama: Llama) -> None:
    write(tmp_path / "m.gguf", tokenizer=tokenizer_path)
    llama = Llama.build(tmp_path / "m.gguf", max_seq_len=128, max_batch_size=4, device="cpu")
    for prompts in (["def f(x):\n    return"], ["a", "  b\n", "é☺"]):
        expected = tiny_llama.text_completion(prompts, temperature=0.0, max_gen_len=16)
        assert llama.text_completion(prompts, temperature=0.0, max_gen_len=16) == expected
    expected_too = tiny_llama.text_infilling(["def f("], [":\n"], temperature=0.0, max_gen_len=8)
    assert llama.text_infilling(["def f("], [":\n"], temperature=0.0, max_gen_len=8) == expected_too


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_gets_its_part(tmp_path: Path, ranks: int) -> None:
    found = open_checkpoint(write(tmp_path / "m.gguf"))
    for rank, shard in enumerate(split(WEIGHTS, ARGS, ranks)):
        for name, part in shard.items():
            assert torch.equal(found.tensor(name, ARGS, rank, ranks), part)


def _logits(init_method: str, path: Path, tokens: Tensor) -> Tensor:
    model = theirs.read_ours(path, init_method=init_method)
    with torch.inference_mode():
        return model(tokens, 0)


@pytest.mark.parametrize("quant", ["bf16", "q8_0"])
def test_ranks_together_are_the_one(tmp_path: Path, quant: str) -> None:
    """Quantised, too: what is cut across its blocks is dequantised first."""
    path = write(tmp_path / "m.gguf", quant)
    tokens = torch.randint(3, 1000, (2, 20), generator=torch.Generator().manual_seed(0))
    (alone,) = on_ranks(_logits, 1, path, tokens)
    for ranks in (2, 4):
        for found in on_ranks(_logits, ranks, path, tokens):
            torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_its_tokenizer_is_the_one_it_was_made_of(tmp_path: Path, tokenizer_path: Path) -> None:
    write(tmp_path / "m.gguf", tokenizer=tokenizer_path)
    opened = open_checkpoint(tmp_path / "m.gguf")
    ours, theirs = Tokenizer(tokenizer_path), Tokenizer(opened.tokenizer_path)
    assert vars(ours).keys() == vars(theirs).keys()
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "prefix_id", "middle_id", "suffix_id", "eot_id", "step_id"):
        assert getattr(theirs, name) == getattr(ours, name), name
    for text in ("def f(x):\n\treturn 'é' # 123\n", "  indented", "", "☺", " <EOT>", "\r\n", "名前"):
        assert theirs.encode(text, bos=True, eos=True) == ours.encode(text, bos=True, eos=True)
        assert theirs.decode(theirs.encode(text, bos=False, eos=False)) == text


def test_a_vocabulary_of_another_kind_runs_on_ids(tmp_path: Path, tiny_llama: Llama) -> None:
    weights, path = WEIGHTS, tmp_path / "m.gguf"
    write(tmp_path / "plain.gguf")
    # As the writer would, with a tokenizer of another kind in place of none.
    writer = gguf.GGUFWriter(path, "llama")
    for field in gguf.GGUFReader(tmp_path / "plain.gguf").fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    for name, weight in weights.items():
        writer.add_tensor(to_gguf(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.warns(UserWarning, match="its byte-level tokenizer lacks its merges"):
        llama = Llama.build(path, max_seq_len=128, max_batch_size=1, device="cpu")
    prompt = [[1, 50, 60, 70]]
    tokens, _ = llama.generate(prompt, 8, 0.0)
    assert tokens == tiny_llama.generate(prompt, 8, 0.0)[0]
    (event,) = llama.stream(prompt, 1, 0.0)
    assert event.text == f"<{tokens[0][0]}>"


# --- converted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 4])
def test_metas_format_to_gguf_and_back_is_bit_exact(tmp_path: Path, tokenizer_path: Path, shards: int) -> None:
    weights = {name: w.bfloat16() for name, w in WEIGHTS.items()}
    save(tmp_path / "meta", ARGS, weights, shards, tokenizer_path)
    convert(tmp_path / "meta", tmp_path / "m.gguf", "gguf", quant="bf16")
    convert(tmp_path / "m.gguf", tmp_path / "again", "meta", shards, torch.bfloat16)
    for shard in range(shards):
        name = f"consolidated.{shard:02d}.pth"
        one, other = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("meta", "again"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "again" / "tokenizer.model").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "m.gguf", "meta"]


def test_by_way_of_hugging_face_too(tmp_path: Path, tiny_checkpoint: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf", "gguf", quant="f32")
    assert all(torch.equal(weight, WEIGHTS[name]) for name, weight in read(tmp_path / "m.gguf").items())
    context = gguf.GGUFReader(tmp_path / "m.gguf").get_field("llama.context_length")
    assert context is not None
    assert context.contents() == 4096  # of theta 1e4, as its config.json says


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "q2_k"}, "--quant q2_k is unknown; there are f32, f16, bf16, q8_0"),
        ({"dtype": torch.float16}, "gguf has --quant, the others --dtype"),
        ({"shards": 2}, "--shards 2 with --to gguf"),
    ],
)
def test_options_that_do_not_go_with_gguf(
    tmp_path: Path, tiny_checkpoint: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(tiny_checkpoint, tmp_path / "m.gguf", "gguf", **options)
    with pytest.raises(ValueError, match="gguf has --quant, the others --dtype"):
        convert(tiny_checkpoint, tmp_path / "hf", "hf", quant="f16")
    assert not list(tmp_path.iterdir())


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 100, 20000])
def test_an_incomplete_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.gguf \([\d,]+ bytes\) can't be read: most likely an incomplete download"):
        open_checkpoint(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        open_checkpoint(tmp_path / "m.gguf")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"m\.gguf: its architecture is 'gemma'; only 'llama'"):
        open_checkpoint(tmp_path / "m.gguf").args()


@pytest.mark.parametrize("value", ["8", True, 0, -8, 8.5, [8, 8], np.float32("nan")], ids=str)
@pytest.mark.parametrize(
    "key",
    [
        *("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "attention.head_count_kv"),
        *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"),
    ],
)
def test_a_number_that_cannot_be_is_named(
    tmp_path: Path, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value == 8.5 and key.startswith("rope"):
        value = 1e-4
    scaled = replace(ARGS, rope_scaling={"rope_type": "linear", "factor": 4.0})
    found = GGUF(write(tmp_path / "m.gguf", args=scaled))
    stored = found._value

    def changed(asked: str, default: Any = None) -> Any:
        return value if asked == f"llama.{key}" else stored(asked, default)

    monkeypatch.setattr(found, "_value", changed)
    named = "rope_scaling's factor" if key == "rope.scaling.factor" else f"llama.{key}"
    with pytest.raises(ValueError, match=rf"m\.gguf: {named} is .*; give a ") as caught:
        found.args()
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("layers", [100_000, 999, 1])
def test_layers_that_the_file_does_not_hold_are_refused_at_once(
    tmp_path: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.gguf", args=replace(ARGS, n_layers=min(layers, 1000)))
    found = GGUF(tmp_path / "m.gguf")
    if layers > 1000:
        stored = found._value
        monkeypatch.setattr(
            found, "_value", lambda key, *default: layers if key.endswith("block_count") else stored(key, *default)
        )
    before = time.perf_counter()
    with pytest.raises(ValueError, match=rf"m\.gguf: .*(n_layers|block_count) is {layers}"):
        found.args()
    assert time.perf_counter() - before < 1


@pytest.mark.parametrize("value", ["1", -1, 10**6, True])
def test_a_token_id_beyond_the_vocabulary_is_named(
    tmp_path: Path, value: Any, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = GGUF(write(tmp_path / "m.gguf", tokenizer=tokenizer_path))
    assert found.tokenizer_path.is_file()
    other, stored = GGUF(tmp_path / "m.gguf"), found._value
    monkeypatch.setattr(other, "_value", lambda key, *default: value if "eos" in key else stored(key, *default))
    with pytest.raises(ValueError, match=r"m\.gguf: tokenizer\.ggml\.eos_token_id is .*at most"):
        other.tokenizer_path  # noqa: B018


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--quant q2_k is unknown; there are f32, f16, bf16, q8_0"):
        write(tmp_path / "m.gguf", "q2_k")
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="GGUF has no words for rope_type 'dynamic'"):
        write(tmp_path / "m.gguf", args=replace(ARGS, rope_scaling=scaling))
    assert set(QUANTS) == {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"}
