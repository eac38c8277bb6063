"""Where heads look: against all weights at once in float64, whatever the chunks and blocks; and in little memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures_text import training_texts
from llama import parallel
from llama.cache import Span
from llama.cli import parse
from llama.config import ModelArgs
from llama.evals.sources import File
from llama.generation import Llama
from llama.longcontext.attention import AttentionByDistance, Watch, attention_by_distance, furthest_first, watched
from llama.longcontext.cli import COMMANDS
from llama.model import Transformer, scaled_dot_product
from parallel.ranks import on_ranks
from reference import MakeModel

SOURCES = [File(f"{i}.py", text[:2000]) for i, text in enumerate(training_texts()[:3])]


def all_weights(model: Transformer, ids: Sequence[int]) -> Tensor:
    """(layers, H, T, T) float64: the softmax written out, of the queries and keys that the model makes in one pass."""
    found: list[Tensor] = []

    def attend(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        repeated = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
        scores = q[0].double() @ repeated[0].double().mT / q.shape[-1] ** 0.5
        sees = torch.ones(len(ids), len(ids)).tril().bool()
        found.append(torch.softmax(torch.where(sees, scores, -torch.inf), -1))
        return scaled_dot_product(q, keys, values, span)

    own = [layer.attention.attend for layer in model.layers]  # type: ignore[union-attr]
    for layer in model.layers:
        layer.attention.attend = attend  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            model(torch.tensor([list(ids)]))
    finally:
        for layer, before in zip(model.layers, own, strict=True):
            layer.attention.attend = before  # type: ignore[union-attr, assignment]
    return torch.stack(found)


def read(model: Transformer, ids: Sequence[int], chunk: int) -> None:
    cache, tokens = model.new_cache(1, len(ids)), torch.tensor([list(ids)])
    with torch.no_grad():
        for at in range(0, len(ids), chunk):
            model.hidden(tokens[:, at : at + chunk], at, cache)


@pytest.mark.parametrize(("chunk", "scores"), [(53, 2**22), (7, 2**22), (53, 1), (20, 1500), (1, 2**22)])
def test_sums_by_distance_are_those_of_all_weights_at_once(
    chunk: int, scores: int, tiny: ModelArgs, make_model: MakeModel
) -> None:
    """Chunks of the prompt, blocks of queries down to a single one, grouped heads; single tokens see masked slots."""
    model, _ = make_model(tiny)
    ids = torch.randint(tiny.vocab_size, (53,)).tolist()
    exact = all_weights(model, ids)
    with watched(model, 53, [(0, 3), (1, 7)], cells=10, scores=scores) as watches:
        read(model, ids, chunk)
    for layer, watch in enumerate(watches):
        for distance in range(53):
            direct = exact[layer].diagonal(-distance, 1, 2).sum(-1)
            torch.testing.assert_close(watch.by_distance[:, distance], direct, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(watch.on_first, exact[layer, :, :, 0], rtol=1e-5, atol=1e-5)
        assert watch.queries.tolist() == [1] * 53
    for layer, head in ((0, 3), (1, 7)):  # cells of 6 positions: nine points
        picture = watches[layer].maps[head]
        assert picture.shape == (9, 9)
        for i in range(9):
            for j in range(9):
                cell = exact[layer, head, 6 * i : 6 * i + 6, 6 * j : 6 * j + 6].max()
                assert picture[i, j].item() == pytest.approx(cell.item(), abs=1e-5)


def test_rows_at_different_positions_are_each_counted_at_theirs(tiny: ModelArgs, make_model: MakeModel) -> None:
    """Two rows that continue from 5 and 9 tokens: what each adds by itself."""
    model, _ = make_model(tiny)
    texts = [torch.randint(tiny.vocab_size, (n,)).tolist() for n in (11, 15)]
    exact = [all_weights(model, ids) for ids in texts]
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        model.hidden(torch.tensor([ids[:9] for ids in texts]), 0, cache)
        with watched(model, 20) as watches:
            model.hidden(torch.tensor([texts[0][5:], texts[1][9:]]), [5, 9], cache)
    for layer, watch in enumerate(watches):
        for distance in range(15):
            parts = [
                exact[row][layer, :, p, p - distance]
                for row, n in ((0, 5), (1, 9))
                for p in range(n, n + 6)
                if p >= distance
            ]
            torch.testing.assert_close(watch.by_distance[:, distance], torch.stack(parts).sum(0), rtol=1e-5, atol=1e-6)
        assert watch.queries.tolist() == [0] * 5 + [1] * 4 + [2] * 2 + [1] * 4 + [0] * 5


def test_a_watched_model_says_what_it_always_says(tiny: ModelArgs, make_model: MakeModel) -> None:
    """To the bit; and is left as it was, also by an error."""
    model, _ = make_model(tiny)
    ids = torch.randint(tiny.vocab_size, (1, 40))
    own = model(ids)

    def mine(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        return scaled_dot_product(q, keys, values, span)

    model.layers[1].attention.attend = mine  # one that was put there before
    with pytest.raises(KeyError), watched(model, 40):  # noqa: PT012
        assert torch.equal(model(ids), own)
        raise KeyError
    assert model.layers[0].attention.attend is scaled_dot_product
    assert model.layers[1].attention.attend is mine


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_memory_is_linear_in_the_length() -> None:
    """One layer's attention to a long prompt, the last chunk of it: twice the length, twice the numbers at most."""
    H, K, D, T, scores = 8, 2, 8, 64, 2**15
    sizes = []
    for length in (1000, 2000, 4000):
        watch = Watch(lambda q, *_: q, H, length, [0], 256, scores)
        q, keys = torch.randn(1, H, T, D), torch.randn(1, K, length, D)
        span = Span([length - T], T, length, torch.float32, torch.device("cpu"))
        with Largest() as largest:
            watch.attend(q, keys, keys, span)
        sizes.append(largest.numbers)
    assert max(sizes) <= 2 * max(scores, 4000 * H)
    assert sizes[2] < 4000 * T  # the scores of a chunk in one head alone; all would be 8 times as many


@pytest.fixture
def found(tiny_llama: Llama) -> AttentionByDistance:
    return attention_by_distance(tiny_llama, SOURCES, length=100, documents=2, heads=[(1, 6), (0, 0)])


def test_documents_are_averaged_and_figures_follow(found: AttentionByDistance, tiny_llama: Llama) -> None:
    texts = {source.path: source.text for source in SOURCES}
    ids = [tiny_llama.tokenizer.encode(texts[path], bos=True, eos=False)[:100] for path in found.documents]
    exact = torch.stack([all_weights(tiny_llama.model, each) for each in ids]).numpy()  # (documents, layers, H, T, T)
    assert exact.shape[0] == 2
    for distance in (0, 1, 17, 99):
        direct = np.diagonal(exact, -distance, 3, 4).mean((0, -1))
        assert found.weight[:, :, distance] == pytest.approx(direct, abs=1e-6)
    assert found.queries.tolist() == [2 * (100 - n) for n in range(100)]
    assert found.on_first == pytest.approx(exact[..., 0].mean((0, -1)), abs=1e-6)
    rest = exact.copy()
    rest[..., 0] = 0
    away = np.arange(100)[:, None] - np.arange(100)
    assert found.mean_distance == pytest.approx((rest * away).sum((0, 3, 4)) / rest.sum((0, 3, 4)), rel=1e-5)
    assert list(found.maps) == [(1, 6), (0, 0)]
    assert found.maps[1, 6] == pytest.approx(exact[0, 1, 6], abs=1e-6)  # of the first document, a cell a weight


def test_bins_hold_every_distance_once(found: AttentionByDistance) -> None:
    bins = found.bins()
    assert [bins[0].start, *(b.end for b in bins)] == sorted({0, *(b.end for b in bins)})
    assert (bins[0].end, bins[-1].end) == (1, 100)
    assert sum(b.pairs for b in bins) == 2 * 100 * 101 // 2
    assert sum(b.share for b in bins) == pytest.approx(np.ones((2, 8)), abs=1e-6)
    wide = next(b for b in bins if b.end - b.start > 3)
    parts = found.weight[:, :, wide.start : wide.end] * found.queries[wide.start : wide.end]
    assert wide.weight == pytest.approx(parts.sum(-1) / found.queries[wide.start : wide.end].sum())


def test_heads_that_look_furthest_are_drawn_one_of_each_layer_first(tiny_llama: Llama) -> None:
    mean_distance = np.array([[5.0, 4.0, 3.0], [1.0, 2.0, 0.0]])
    assert furthest_first(mean_distance) == [(0, 0), (1, 1), (0, 1), (1, 0), (0, 2), (1, 2)]
    found = attention_by_distance(tiny_llama, SOURCES, length=60, documents=1, heads=3)
    assert list(found.maps) == furthest_first(found.mean_distance)[:3]


def check_attention(init_method: str, folder: Path) -> AttentionByDistance:
    parallel.start(init_method=init_method, timeout=20)
    llama = Llama.build(folder, max_seq_len=60, timeout=20)
    return attention_by_distance(llama, SOURCES, documents=1, heads=[(1, 6), (0, 1)])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_put_their_heads_together(world_size: int, tiny_checkpoint: Path, tiny_llama: Llama) -> None:
    """On every rank all heads, in their order; with 4 ranks, two of them hold the same kv head."""
    alone = attention_by_distance(tiny_llama, SOURCES, length=60, documents=1, heads=[(1, 6), (0, 1)])
    for found in on_ranks(check_attention, world_size, tiny_checkpoint):
        assert found.weight == pytest.approx(alone.weight, abs=1e-5)
        assert found.on_first == pytest.approx(alone.on_first, abs=1e-5)
        assert found.mean_distance == pytest.approx(alone.mean_distance, rel=1e-3)
        assert list(found.maps) == [(1, 6), (0, 1)]
        for head, picture in found.maps.items():
            assert picture == pytest.approx(alone.maps[head], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": [(0, 8)]}, r"\(0, 8\).*head \(0 to 7\)"),
        ({"heads": [(2, 0)]}, r"layer \(0 to 1\)"),
        ({"heads": -1}, "-1"),
        ({"length": 200}, "200.*max_seq_len"),
        ({"sources": [File("short.py", "x = 1\n")]}, "no document has 128 tokens"),
    ],
)
def test_what_cannot_be_watched_is_named(tiny_llama: Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_by_distance(tiny_llama, **{"sources": SOURCES, **options})


@pytest.mark.parametrize(("heads", "maps"), [([(1, 2), (0, 7)], ["1:2", "0:7"]), (0, [])])
def test_command_writes_a_table_a_record_and_a_picture(
    heads: Any, maps: list[str], tmp_path: Path, tiny_checkpoint: Path, told: list[Any]
) -> None:
    for source in SOURCES:
        (tmp_path / source.path).write_text(source.text, encoding="utf-8")
    parallel.start()
    options: dict[str, Any] = {"ckpt_dir": str(tiny_checkpoint), "max_seq_len": 64}
    out = tmp_path / "out"
    COMMANDS["attention"](out=str(out), sources=str(tmp_path), documents=1, heads=heads, **options)
    [(table, printed)] = told
    assert [line.split()[0] for line in table] == ["layer", "0", "1"]
    shares = [float(word.strip("%")) for word in table[1].split()[1:-2]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert printed["maps"] == maps
    with open(out / "attention.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    share = {(row["layer"], row["head"]): 0.0 for row in rows}
    for row in rows:
        share[row["layer"], row["head"]] += float(row["value"]) if row["metric"] == "share" else 0
    assert list(share.values()) == pytest.approx([1.0] * 16, abs=1e-6)
    assert json.loads((out / "attention.json").read_text(encoding="utf-8"))["length"] == 64
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("heads", ["two", "1:2:3", "0:1,3"])
def test_heads_that_cannot_be_read_are_named(heads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(COMMANDS["attention"], ["--heads", heads], "attention")
    assert "LAYER:HEAD" in capsys.readouterr().err


def test_heads_are_a_number_or_places() -> None:
    for words, heads in (("3", 3), ("0:3,2:1", [(0, 3), (2, 1)])):
        assert parse(COMMANDS["attention"], ["--heads", words], "attention")[1]["heads"] == heads
