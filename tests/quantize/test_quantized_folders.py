"""Quantised folders: what was quantised on load, bit by bit; from any format; and what can't be one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fixtures_text import ARGS, WEIGHTS
from llama import parallel
from llama.checkpoint import load, open_checkpoint, save
from llama.model import Transformer
from llama.quantize import saved as module
from llama.quantize.layers import linears, quantize_load
from llama.quantize.saved import ENTRY, Saved, is_linear, quantize_checkpoint
from llama.quantize.schemes import scheme_of

WORDS = ["int8", "int4", "nf4"]


@pytest.fixture(autouse=True)
def group() -> None:
    parallel.start()


def loaded(path: Path, word: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    with torch.device("meta"):
        model = Transformer(ARGS)
    quantize_load(model, open_checkpoint(path), parallel.start(), dtype, word)
    return model


def contents(model: Transformer) -> dict[str, Tensor]:
    """All tensors of a quantised model."""
    stored = {name: layer.product.stored for name, layer in linears(model).items()}
    found = {f"{name}.{key}": tensor for name, own in stored.items() for key, tensor in own.items()}
    return found | dict(model.named_parameters())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("word", WORDS)
def test_saved_and_loaded_is_quantised_on_load_bit_by_bit(word: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    if word == "nf4":
        pytest.importorskip("bitsandbytes")
        with torch.device("meta"):
            assert Transformer(ARGS).layers[0].feed_forward.w2.weight.shape[1] % 64  # 96: nf4 can't
        with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.w2\.weight has 96 columns"):
            quantize_checkpoint(tiny_checkpoint, tmp_path / "it", word)
        assert not list(tmp_path.iterdir())
        return
    quantize_checkpoint(tiny_checkpoint, tmp_path / "it", word)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a core that does not know the entry yet
        assert_same(contents(loaded(tmp_path / "it")), contents(loaded(tiny_checkpoint, word)))
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "it"]  # and no scratch beside it


@pytest.mark.parametrize("kind", ["shards", "hf", "gguf"])
def test_any_format_gives_the_same_folder(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / {"gguf": "x.gguf"}.get(kind, "x")
    if kind == "shards":
        save(source, ARGS, WEIGHTS, 2)
    else:
        convert = pytest.importorskip("llama.interop.convert").convert
        pytest.importorskip("gguf" if kind == "gguf" else "safetensors")
        convert(tiny_checkpoint, source, to=kind, **({"quant": "f32"} if kind == "gguf" else {}))
    quantize_checkpoint(tiny_checkpoint, tmp_path / "expected", "int4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that two shards have no tokenizer
        quantize_checkpoint(source, tmp_path / "it", "int4")
    found, expected = (torch.load(tmp_path / name / "consolidated.00.pth") for name in ("it", "expected"))
    assert_same(found, expected)


@pytest.mark.parametrize(("word", "names"), [("int8", {"int8-dynamic"}), ("int4", {"int4-dynamic", "int8"})])
def test_dynamic_activations(word: str, names: set[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A folder runs with them. With 4 bits the output layer has 8, and meets activations as they are."""
    quantize_checkpoint(tiny_checkpoint, tmp_path / "it", word)
    model = loaded(tmp_path / "it", f"{word}-dynamic")
    assert_same(contents(model), contents(loaded(tiny_checkpoint, f"{word}-dynamic")))
    assert {layer.product.scheme.name for layer in linears(model).values()} == names


def test_the_core_loads_it_dequantised(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_checkpoint, tmp_path / "it", "int4")
    with torch.device("meta"):
        model = Transformer(ARGS)
    folder = Saved(tmp_path / "it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the entry is not unknown
        assert folder.args() == open_checkpoint(tiny_checkpoint).args()
    load(model, folder, parallel.start(), torch.float32)
    for name, p in model.named_parameters():
        w = WEIGHTS[name]
        own = scheme_of("int8" if name == "output.weight" else "int4")
        expected = own.dequantize(own.quantize(w)).bfloat16().float() if is_linear(name) else w
        assert torch.equal(p, expected), name


def test_size_is_what_the_scheme_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_checkpoint, tmp_path / "it", "int4")
    stored = torch.load(tmp_path / "it" / "consolidated.00.pth")
    output = WEIGHTS["output.weight"]  # int8, with a scale of 2 bytes for each row
    linear = sum(w.numel() for name, w in WEIGHTS.items() if is_linear(name) and w is not output)
    kept = sum(tensor.nbytes for name, tensor in stored.items() if name not in WEIGHTS)
    assert kept == linear * 5 // 8 + output.numel() + 2 * len(output)
    params = json.loads((tmp_path / "it" / "params.json").read_text())
    assert params.pop(ENTRY) == {"scheme": "int4", "group": 32, "version": 1}
    assert params == json.loads((tiny_checkpoint / "params.json").read_text())


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A good one, to be spoiled."""
    quantize_checkpoint(tiny_checkpoint, tmp_path / "good", "int4")
    return tmp_path / "good"


def spoil(folder: Path, **changes: object) -> None:
    params = json.loads((folder / "params.json").read_text())
    params[ENTRY] |= changes
    (folder / "params.json").write_text(json.dumps(params))


def test_another_version_is_refused(folder: Path) -> None:
    spoil(folder, version=2)
    with pytest.raises(ValueError, match=r"params\.json: .* version 2, and this package reads version 1: quantise"):
        Saved(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": "int3"}, r"params\.json: there is no scheme 'int3'"),
        ({"group": 48}, r"params\.json: groups of 48 with int4"),
    ],
)
def test_an_unknown_scheme_or_group_is_refused(changes: dict[str, object], words: str, folder: Path) -> None:
    spoil(folder, **changes)
    with pytest.raises(ValueError, match=words):
        Saved(folder)


def test_another_group_than_that_of_the_tensors_is_refused(folder: Path) -> None:
    spoil(folder, group=64)
    with pytest.raises(ValueError, match=r"attention\.wq\.weight\.scale is \(64, 2\) instead of \(64, 1\), .* int4:64"):
        loaded(folder)


@pytest.mark.parametrize("word", ["int8", "int4:64"])
def test_another_scheme_than_it_has_is_refused(word: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"is quantised to int4:32, and {word} was asked for"):
        loaded(folder, word)


def test_a_plain_folder_is_no_quantised_one(tiny_checkpoint: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="not a quantised checkpoint"):
        Saved(tiny_checkpoint)
    with pytest.raises(ValueError, match="is quantised already"):
        quantize_checkpoint(folder, folder.parent / "again", "int8")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    stored = torch.load(folder / "consolidated.00.pth")
    del stored["layers.1.attention.wo.weight.zero"]
    torch.save(stored, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.wo\.weight.* lacks zero"):
        loaded(folder)


def test_nothing_is_left_of_what_failed(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    existing = tmp_path / "existing"
    existing.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        quantize_checkpoint(tiny_checkpoint, existing, "int8")
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wq\.weight has 64 columns, .* groups of 128"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "it", "int4:128")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="1,000 bytes free; quantising needs about"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "it", "int8")
    assert list(tmp_path.iterdir()) == [existing]


def test_weights_come_one_at_a_time(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is laid aside is mapped from a file, not kept in memory."""
    laid: list[Tensor] = []
    lay = module._laid

    def watched(tensor: Tensor, path: Path) -> Tensor:
        laid.append(lay(tensor, path))
        assert path.stat().st_size == tensor.nbytes
        return laid[-1]

    monkeypatch.setattr(module, "_laid", watched)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "it", "int8")
    assert len(laid) == 2 * (7 * ARGS.n_layers + 1) + 2 + 2 * ARGS.n_layers
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in laid)
