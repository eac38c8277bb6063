"""A quantised model: the oracle's with the dequantised weights; nothing kept twice; blocks joined; what is refused."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fixtures_text import ARGS, SLOTS, WEIGHTS
from llama import parallel
from llama.checkpoint import CUT, open_checkpoint
from llama.config import ModelArgs
from llama.generation import Llama
from llama.model import Transformer
from llama.quantize.layers import linears, quantize_, quantize_load
from llama.quantize.saved import LINEAR, is_linear
from llama.quantize.schemes import Quantized, Scheme, scheme_of
from reference import MakeModel
from reference import llama as reference_llama

WORDS = ["int8", "int8-dynamic", "int4", "int4-dynamic", "nf4"]
WIDE = ModelArgs(dim=128, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, hidden_dim=192, max_seq_len=64)
"""Every row is whole groups of 64."""


@pytest.fixture(autouse=True)
def group() -> None:
    parallel.start()


def scheme(word: str) -> Scheme:
    if word == "nf4":
        pytest.importorskip("bitsandbytes")
    return scheme_of(word)


def dequantized(weights: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    own = scheme(word)
    schemes = {name: scheme_of("int8") if name == "output.weight" else own for name in weights if is_linear(name)}
    return {name: s.dequantize(s.quantize(weights[name])) for name, s in schemes.items()} | {
        name: w for name, w in weights.items() if name not in schemes
    }


def fresh(args: ModelArgs) -> Transformer:
    with torch.device("meta"):
        return Transformer(args)


def test_every_linear_layer_is_quantised_and_nothing_else() -> None:
    model = fresh(WIDE)
    assert CUT.keys() - {"tok_embeddings", "attention_norm", "ffn_norm", "norm"} == LINEAR
    names = [name for name, _ in model.named_parameters()]
    assert list(linears(model)) == [name for name in names if is_linear(name)]
    assert len(linears(model)) == 7 * WIDE.n_layers + 1


@pytest.mark.parametrize("word", WORDS)
def test_scores_are_the_oracles_with_dequantised_weights(word: str, make_model: MakeModel) -> None:
    model, weights = make_model(WIDE)
    quantize_(model, scheme(word))
    tokens = torch.randint(0, WIDE.vocab_size, (2, 20))
    expected = reference_llama(WIDE, dequantized(weights, word), tokens)
    with torch.no_grad():
        for found in (model(tokens), torch.cat([model(tokens[:, :17], 0), model(tokens[:, 17:], 17)], 1)):
            # bfloat16 within the layers: a wrong scale or order would be off by the scores' own size, of some units.
            error = float((found - expected).square().mean().sqrt() / expected.std())
            assert error < (0.06 if "dynamic" in word else 0.03)


def test_weights_are_let_go_one_by_one(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model quantised as a whole would need the memory of both, which is where it matters most."""
    model, _ = make_model(WIDE)
    held = {name: weakref.ref(layer.weight) for name, layer in linears(model).items()}
    seen: list[int] = []
    quantize = Scheme.quantize

    def watched(self: Scheme, weight: Tensor, name: str = "") -> dict[str, Tensor]:
        seen.append(sum(ref() is not None for ref in held.values()))
        return quantize(self, weight, name)

    monkeypatch.setattr(Scheme, "quantize", watched)
    assert quantize_(model, "int8") is model
    assert seen == list(range(len(held), 0, -1))
    assert [name for name, _ in model.named_parameters() if is_linear(name)] == []
    assert all(isinstance(layer.product, Quantized) for layer in linears(model).values())


@pytest.mark.parametrize("word", WORDS)
def test_joined_product_is_its_layers_one_after_the_other(word: str, make_model: MakeModel) -> None:
    model, _ = make_model(WIDE)
    block = quantize_(model, scheme(word)).layers[0]
    attention, x = block.attention, torch.randn(3, 5, WIDE.dim, dtype=torch.bfloat16)
    for together in ([attention.wq, attention.wk, attention.wv], [block.feed_forward.w1, block.feed_forward.w3]):
        product = together[0].product.joined([layer.product for layer in together[1:]])
        separate = torch.cat([layer.product(x) for layer in together], -1)
        torch.testing.assert_close(product(x), separate, rtol=2**-7, atol=2**-7)
        assert product.shape == (separate.shape[-1], WIDE.dim)
        parts = [layer.product.stored for layer in together]
        for key, tensor in product.stored.items():
            assert torch.equal(tensor, torch.cat([part[key] for part in parts]))


def test_only_alike_layers_are_joined(make_model: MakeModel) -> None:
    model, _ = make_model(WIDE)
    block = model.layers[0]
    quantize_(model, "int8")
    with pytest.raises(ValueError, match=r"int8 of 128 columns, int8 of 192 columns can't be joined"):
        block.feed_forward.w1.product.joined([block.feed_forward.w2.product])


# --- refused ---------------------------------------------------------------------------------------------------------


def test_tied_weights_are_refused_by_name(make_model: MakeModel) -> None:
    model, _ = make_model(WIDE)
    model.output.weight = model.tok_embeddings.weight
    with pytest.raises(ValueError, match=r"output\.weight is tied to tok_embeddings\.weight"):
        quantize_(model, "int8")
    assert not any(isinstance(layer.product, Quantized) for layer in linears(model).values())


def test_shapes_and_repetitions_are_refused_by_name(make_model: MakeModel) -> None:
    model, _ = make_model(WIDE)
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.w2\.weight has 192 columns, .* groups of 128"):
        quantize_(model, "int4:128")
    model, _ = make_model(WIDE)
    quantize_(model, "int8")
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wq\.weight is quantised already"):
        quantize_(model, "int8")
    model, _ = make_model(WIDE)
    with pytest.raises(ValueError, match="float16 is too slow"):
        quantize_(model.half(), "int4")


# --- while a checkpoint is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_loading_quantises_as_quantising_what_is_loaded(word: str, tiny_checkpoint: Path) -> None:
    ranks = parallel.start()
    model = fresh(ARGS)
    quantize_load(model, open_checkpoint(tiny_checkpoint), ranks, torch.bfloat16, word)
    loaded = Llama.build(tiny_checkpoint, dtype=torch.float32).model
    quantize_(loaded, word)
    for name, layer in linears(model).items():
        theirs = linears(loaded)[name].product.stored
        for key, tensor in layer.product.stored.items():
            assert torch.equal(tensor, theirs[key]), (name, key)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_plain_weights_are_never_all_in_memory(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    read = checkpoint.tensor

    def watched(name: str, *args: object) -> Tensor:
        tensor = read(name, *args).clone()  # type: ignore[arg-type]
        most.append(sum(ref() is not None for ref in alive))
        if is_linear(name):
            alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(checkpoint, "tensor", watched)
    quantize_load(fresh(ARGS), checkpoint, parallel.start(), torch.bfloat16, "int8")
    assert max(most) <= 1


def test_without_a_scheme_it_loads_plainly(tiny_checkpoint: Path) -> None:
    model = fresh(ARGS)
    quantize_load(model, open_checkpoint(tiny_checkpoint), parallel.start(), torch.float32)
    assert all(torch.equal(p, WEIGHTS[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"n_layers": 3}, r"missing: layers\.2\.attention"),
        ({"n_layers": 1}, r"unexpected: layers\.1\."),
        ({"hidden_dim": 128}, r"w1\.weight in .* is \(96, 64\) instead of \(128, 64\)"),
    ],
)
def test_missing_and_misshapen_weights_are_named(sizes: dict[str, int], words: str, tiny_checkpoint: Path) -> None:
    model = fresh(replace(ARGS, **sizes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        quantize_load(model, open_checkpoint(tiny_checkpoint), parallel.start(), torch.bfloat16, "int8")


def test_a_quantised_llama_writes(tiny_checkpoint: Path) -> None:
    llama = Llama.build(tiny_checkpoint, max_seq_len=SLOTS)
    quantize_(llama.model, "int8")
    plain = Llama.build(tiny_checkpoint, max_seq_len=SLOTS)
    prompt = [[1, 300, 301, 302, 303]]
    assert llama.generate(prompt, 4, temperature=0)[0] == plain.generate(prompt, 4, temperature=0)[0]
