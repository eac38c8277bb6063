"""Several ranks: their codes are parts of one rank's, from plain and from quantised folders, and the scores agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import parallel
from llama.checkpoint import open_checkpoint, save
from llama.config import ModelArgs
from llama.model import Transformer
from llama.quantize.layers import linears, quantize_load
from llama.quantize.saved import Saved, quantize_checkpoint
from parallel.ranks import on_ranks
from parallel.shards import part
from reference import random_weights

ARGS = ModelArgs(dim=256, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=96, hidden_dim=256, max_seq_len=32)
"""A quarter of every row is whole groups of 64. With 4 ranks, two hold the same KV head."""
TOKENS = torch.arange(3, 19).view(2, 8)

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.model is missing")  # weights alone are tested here


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "plain"
    save(folder, ARGS, random_weights(ARGS), 2)
    return folder


def run(path: Path, word: str | None) -> tuple[dict[str, Tensor], Tensor]:
    ranks = parallel.start()
    with torch.device("meta"):
        model = Transformer(ARGS)
    checkpoint = Saved(path) if word is None else open_checkpoint(path)
    with ranks.all_ranks():
        quantize_load(model, checkpoint, ranks, torch.float32, word)
    stored = {
        f"{name}.{key}": tensor
        for name, layer in linears(model).items()
        for key, tensor in layer.product.stored.items()
    }
    with torch.no_grad():
        return stored, model(TOKENS)


def check(init_method: str, path: Path, word: str | None) -> tuple[dict[str, Tensor], Tensor]:
    parallel.start(init_method=init_method, timeout=60)
    return run(path, word)


@pytest.mark.parametrize("is_saved", [False, True], ids=["on load", "saved"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("word", ["int8", "int4:64", "int8-dynamic", "int4-dynamic"])
def test_ranks_hold_the_parts_of_one_ranks_codes(
    word: str, world_size: int, is_saved: bool, plain: Path, tmp_path: Path
) -> None:
    parallel.start()
    whole, scores = run(plain, word)
    if is_saved:
        if "dynamic" in word:
            pytest.skip("stored as int8 and int4 are")
        quantize_checkpoint(plain, tmp_path / "it", word)
    folder, asked = (tmp_path / "it", None) if is_saved else (plain, word)
    results: list[Any] = on_ranks(check, world_size, folder, asked, limit=240)
    for rank, (stored, found) in enumerate(results):
        assert stored.keys() == whole.keys()
        for name, tensor in stored.items():
            # A row's scale is whole on every rank that has some of the row's columns.
            of_row = name.endswith(".scale") and "int8" in word and any(w in name for w in ("wo.", "w2."))
            expected = whole[name] if of_row else part(name, whole[name], rank, world_size, ARGS.n_kv_heads)
            assert torch.equal(tensor, expected), (rank, name)
        # Sums of parts are rounded to bfloat16 part by part, and activations to 8 bits with a scale for each part.
        error = float((found - scores).square().mean().sqrt() / scores.std())
        assert error < (0.03 if word == "int8-dynamic" else 0.015)
        assert torch.equal(found, results[0][1])


def check_refused(init_method: str, path: Path, word: str | None) -> str:
    parallel.start(init_method=init_method, timeout=60)
    with pytest.raises(ValueError, match="groups") as raised:
        run(path, word)
    return str(raised.value)


@pytest.mark.parametrize("is_saved", [False, True], ids=["on load", "saved"])
def test_a_group_that_ranks_would_cut_is_refused_by_name(is_saved: bool, plain: Path, tmp_path: Path) -> None:
    parallel.start()
    if is_saved:
        quantize_checkpoint(plain, tmp_path / "it", "int4:128")
    folder, word = (tmp_path / "it", None) if is_saved else (plain, "int4:128")
    for words in on_ranks(check_refused, 4, folder, word, limit=240):
        assert "layers.0.attention.wo.weight" in words
        assert "64 columns, no whole number of groups of 128" in words
        assert "fewer ranks" in words
