"""Where heads look: the weight of attention by distance, and maps of chosen heads.

A head's weights are a square, queries by keys, which nobody can keep at 100,000 tokens: 40 GB a head. But what one
wants of them is small: a sum for each distance, and a picture of 256 by 256 points. So a function in the place of
each layer's `attend` takes the queries in blocks, computes their weights, adds them up along the diagonals (equal
distance) and forgets them; of the chosen heads it keeps the largest weight of each cell of the map. The layer's own
`attend` still gives the answer, so a model that is watched says exactly what it says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Unpack

from llama.cache import Span
from llama.config import ModelArgs
from llama.evals.positions import long_documents
from llama.evals.record import Record, begin, save_record, tell
from llama.evals.sources import Source
from llama.evals.table import render
from llama.front import load as build
from llama.generation import Llama
from llama.longcontext.perplexity import checked_lengths, read_texts, rope_of
from llama.model import Attend, Transformer
from llama.options import AMOUNT, Loading, MaybeCount, MaybeSources, Out, number, spec
from llama.parallel import Ranks, shards

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Head = tuple[int, int]
"""Layer and head, from 0."""
SCORES = 2**22
"""About as many scores are made at once; but at least those of one query with all that it sees, in every head."""


class Watch:
    """What the heads of one layer look at, added up over all queries that it is shown.

    Rows that are padded show the padding too: give it rows of equal length.
    """

    def __init__(self, own: Attend, heads: int, slots: int, maps: Sequence[int], cells: int, scores: int) -> None:
        self.own = own
        """What answers."""
        self.by_distance = torch.zeros(heads, slots, dtype=torch.float64)
        """(H, slots): the sum of weights on keys that many tokens before the query."""
        self.on_first = torch.zeros(heads, slots, dtype=torch.float64)
        """(H, slots): of the query at each position, the weight on slot 0; it is in `by_distance` too."""
        self.queries = torch.zeros(slots, dtype=torch.int64)
        """How many there were at each position."""
        self.cell = -(-slots // cells)
        """Positions to a point of a map."""
        points = -(-slots // self.cell)
        self.maps = {head: torch.zeros(points, points) for head in maps}
        """(query, key): the largest weight in each cell."""
        self.scores = scores

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """The place of the layer's own: (B, H, T, D), and what `span` says of them."""
        with torch.no_grad():
            starts = span.positions[:, 0].tolist()
            for row in range(q.shape[0]):
                self._show(q[row], keys[row], starts[row if len(starts) > 1 else 0])
        return self.own(q, keys, values, span)

    def _show(self, q: Tensor, keys: Tensor, start: int) -> None:
        """q (H, T, D) of the tokens from position `start` on, keys (K, S, D)."""
        (H, T, D), K = q.shape, keys.shape[0]
        at_once = max(1, self.scores // (H * (start + T)))
        keys = keys[:, : start + T].float()
        for first in range(0, T, at_once):
            block = q[:, first : first + at_once].float()  # (H, C, D)
            C = block.shape[1]
            end = start + C
            # The query heads of a kv head stand beside each other, as if they were more queries.
            scores = block.reshape(K, -1, D) @ keys[:, :end].mT * D**-0.5  # (K, H / K * C, end)
            scores = scores.view(H, C, end)
            future = torch.ones(C, C, dtype=torch.bool, device=q.device).triu_(1)
            scores[:, :, start:].masked_fill_(future, -torch.inf)
            self._add(scores.softmax(-1), start)
            start = end

    def _add(self, weights: Tensor, start: int) -> None:
        """(H, C, S) of the queries from position `start` on; the last of them sees all S."""
        H, C, S = weights.shape
        # Row j is moved j to the left, so that a column holds one distance: from start + C - 1 in column 1 to 0 in
        # the last. A view does it, whose rows are one longer than the real ones.
        padded = F.pad(weights, (C, 0))
        skewed = padded.as_strided((H, C, S + 1), (C * (S + C), S + C + 1, 1))
        self.by_distance[:, :S] += skewed.sum(1)[:, 1:].flip(-1).cpu()  # float64 from here on; not every device has it
        self.on_first[:, start:S] += weights[:, :, 0].cpu()
        self.queries[start:S] += 1
        for head, picture in self.maps.items():
            # One query after the other within a cell, a cell after the other among keys.
            pooled = F.max_pool1d(weights[head], self.cell, ceil_mode=True)  # (C, points)
            for point in range(start // self.cell, (S - 1) // self.cell + 1):
                of_point = pooled[max(point * self.cell - start, 0) : (point + 1) * self.cell - start]
                line = picture[point, : pooled.shape[1]]
                torch.maximum(line, of_point.amax(0).cpu(), out=line)


@contextmanager
def watched(
    model: Transformer, slots: int, maps: Sequence[Head] = (), cells: int = 256, scores: int = SCORES
) -> Iterator[list[Watch]]:
    """Within the block, every layer's attention is watched: one Watch for each, for positions up to `slots` - 1.

    On several ranks each watches its own heads, and `maps` counts those from 0 on each. Takes 16 bytes for each head
    and slot, and while a block of queries is looked at, some times `scores` numbers.
    """
    attentions = [layer.attention for layer in model.layers]
    before: list[Attend] = [attention.attend for attention in attentions]  # type: ignore[union-attr, misc]
    heads, watches = model.args.n_heads // shards(), []
    for i, own in enumerate(before):
        watches.append(Watch(own, heads, slots, [head for layer, head in maps if layer == i], cells, scores))
    try:
        for attention, watch in zip(attentions, watches, strict=True):
            attention.attend = watch.attend  # type: ignore[union-attr]
        yield watches
    finally:
        for attention, own in zip(attentions, before, strict=True):
            attention.attend = own  # type: ignore[union-attr]


@dataclass(frozen=True, eq=False)
class Bin:
    """Distances `start` to `end` - 1; arrays are (layers, heads)."""

    start: int
    end: int
    pairs: int
    """Queries and keys at such a distance, in each head."""
    weight: NDArray[np.float64]
    """Mean weight of a key at such a distance."""
    share: NDArray[np.float64]
    """Of all attention, the part that goes to such distances; over the bins it sums to 1."""


@dataclass(frozen=True, eq=False)
class AttentionByDistance:
    length: int
    documents: tuple[str, ...]
    weight: NDArray[np.float64]
    """(layers, heads, length): the mean weight on the key that stands so many tokens before the query."""
    queries: NDArray[np.int64]
    """(length,): over how many queries that mean is; a query at position p has no key further than p."""
    on_first: NDArray[np.float64]
    """(layers, heads): the mean weight on the document's first token, where heads that look for nothing look."""
    mean_distance: NDArray[np.float64]
    """(layers, heads): tokens, the first token left out."""
    maps: dict[Head, NDArray[np.float32]]
    """Of the first document, (query, key): the largest weight in each cell, at most 256 by 256."""

    def bins(self, to_an_octave: int = 4) -> list[Bin]:
        """Distances in bins of equal width on a logarithmic scale, the small ones each by itself."""
        octaves = np.arange(0, np.log2(self.length) + 1, 1 / to_an_octave)
        edges = sorted({0, self.length, *(edge for edge in np.floor(2**octaves).astype(int) if edge < self.length)})
        sums, found = self.weight * self.queries, []
        for start, end in pairwise(int(edge) for edge in edges):
            here, pairs = sums[:, :, start:end].sum(-1), int(self.queries[start:end].sum())
            found.append(Bin(start, end, pairs, here / pairs, here / self.queries[0]))
        return found


@torch.inference_mode()
def attention_by_distance(
    llama: Llama,
    sources: Sequence[Source],
    length: int | None = None,
    documents: int | None = 4,
    heads: int | Sequence[Head] = 4,
    progress: bool = False,
) -> AttentionByDistance:
    """Reads the first `length` tokens (default: max_seq_len) of some documents, in chunks, and adds up where every
    head looks.

    Of `heads`, pairs of layer and head, the maps of the first document are kept; or of that many, which look furthest:
    one of each layer before a second of any. Raises ValueError where no document is long enough, and for heads that
    there aren't.
    """
    args = llama.model.args
    every = [(layer, head) for layer in range(args.n_layers) for head in range(args.n_heads)]
    unknown = [] if isinstance(heads, int) else [head for head in heads if tuple(head) not in every]
    if unknown or (isinstance(heads, int) and heads < 0):
        raise ValueError(
            f"heads {unknown or heads}: give a number of heads, or pairs of a layer (0 to {args.n_layers - 1}) and a "
            f"head (0 to {args.n_heads - 1})"
        )
    [length] = checked_lengths([args.max_seq_len if length is None else length], args.max_seq_len)
    texts = long_documents(llama.tokenizer, sources, length, documents)
    rows = [ids[:length] for ids in texts.values()]
    with watched(llama.model, length) as watches:
        for ids in tqdm(rows, desc="documents", leave=False, disable=not (progress and llama.ranks.leads)):
            _read(llama, ids)
    sums = _of_all_heads(llama.ranks, torch.stack([watch.by_distance for watch in watches]))  # (layers, heads, length)
    on_first = _of_all_heads(llama.ranks, torch.stack([watch.on_first for watch in watches]))
    queries = np.cumsum(watches[0].queries.numpy()[::-1])[::-1]
    elsewhere = sums - on_first  # slot 0 is as far from a query as the query's own position says
    distances = np.arange(length)
    mean_distance = (elsewhere * distances).sum(-1) / np.maximum(elsewhere.sum(-1), 1e-12)
    if isinstance(heads, int):
        heads = furthest_first(mean_distance)[:heads]
    maps = _maps(llama, rows[0], [(layer, head) for layer, head in heads])
    weight = sums / queries
    return AttentionByDistance(
        length, tuple(texts), weight, queries, on_first.sum(-1) / queries[0], mean_distance, maps
    )


def furthest_first(mean_distance: NDArray[np.float64]) -> list[Head]:
    """Every head: first the furthest-looking of each layer, then the second of each, …"""
    place_in_layer = (-mean_distance).argsort(axis=1, kind="stable").argsort(axis=1)
    every = [(layer, head) for layer, head in np.ndindex(mean_distance.shape)]
    return sorted(every, key=lambda head: (place_in_layer[head], -mean_distance[head]))


def _read(llama: Llama, ids: Sequence[int]) -> None:
    """Through a cache of its own: the model's may be in use."""
    model = llama.model
    tokens = torch.tensor([ids], device=model.norm.weight.device)
    cache = model.new_cache(1, len(ids))
    for at in range(0, len(ids), llama.prefill_chunk):
        model.hidden(tokens[:, at : at + llama.prefill_chunk], at, cache)


def _maps(llama: Llama, ids: Sequence[int], heads: Sequence[Head]) -> dict[Head, NDArray[np.float32]]:
    if not heads:
        return {}
    here = llama.model.args.n_heads // llama.ranks.world_size
    first = llama.ranks.rank * here
    own = [(layer, head - first) for layer, head in heads if first <= head < first + here]
    with watched(llama.model, len(ids), own) as watches:
        _read(llama, ids)
    found = {(layer, head + first): watches[layer].maps[head].numpy() for layer, head in own}
    everyone: dict[Head, NDArray[np.float32]] = {}
    for part in _from_all(llama.ranks, found):
        everyone |= part
    return {head: everyone[head] for head in heads}


def _of_all_heads(ranks: Ranks, own: Tensor) -> NDArray[np.float64]:
    """(layers, this rank's heads, …) to (layers, heads, …), on every rank."""
    return np.concatenate(_from_all(ranks, own.numpy()), axis=1)


def _from_all(ranks: Ranks, own: Any) -> list[Any]:
    """Every rank's object, on every rank."""
    if ranks.control is None:
        return [own]
    found = [None] * ranks.world_size
    dist.all_gather_object(found, own, group=ranks.control)
    return found


# The command ---------------------------------------------------------------------------------------------------------


def rows_of(found: AttentionByDistance, args: ModelArgs) -> Iterator[dict[str, Any]]:
    """The tidy table, a figure a row; `n` counts what the mean is over, pairs or queries."""
    run, bins = {**rope_of(args), "length": found.length}, found.bins()
    for layer, head in np.ndindex(found.on_first.shape):
        of_head = {**run, "layer": layer, "head": head}
        for bin in bins:
            place = {**of_head, "start": bin.start, "end": bin.end}
            yield {**place, "metric": "weight", "n": bin.pairs, "value": bin.weight[layer, head]}
            yield {**place, "metric": "share", "n": bin.pairs, "value": bin.share[layer, head]}
        place, queries = {**of_head, "start": "", "end": ""}, int(found.queries[0])
        yield {**place, "metric": "on_first", "n": queries, "value": found.on_first[layer, head]}
        yield {**place, "metric": "mean_distance", "n": queries, "value": found.mean_distance[layer, head]}


def draw(found: AttentionByDistance, figure: Figure) -> None:
    """Weight by distance, layer by layer; mean distances and weights on the first token; and the maps."""
    maps = list(found.maps.items())[:4]
    figure.set_size_inches(14, 8 if maps else 4.5)
    grid = figure.add_gridspec(2 if maps else 1, 12)
    curves, bins = figure.add_subplot(grid[0, :6]), found.bins()
    centres = [(bin.start * (bin.end - 1)) ** 0.5 if bin.start else 0.5 for bin in bins]
    for layer in range(len(found.weight)):
        each = np.array([bin.weight[layer] for bin in bins])  # (bins, heads)
        curves.plot(centres, each, color=f"C{layer % 10}", linewidth=0.4, alpha=0.5)
        curves.plot(centres, each.mean(-1), color=f"C{layer % 10}", linewidth=2, label=f"layer {layer}")
    curves.plot(centres, [1 / max(centre, 1) for centre in centres], ":", color="0.5", label="1 / distance")
    curves.set(title="mean attention weight; thin: heads", xlabel="distance, 0 at 0.5", xscale="log", yscale="log")
    if len(found.weight) <= 12:
        curves.legend(fontsize="small")
    tables = (
        ("mean distance", found.mean_distance),
        ("weight on the first token", found.on_first),
    )
    for i, (title, values) in enumerate(tables):
        panel = figure.add_subplot(grid[0, 6 + 3 * i : 9 + 3 * i])
        figure.colorbar(panel.imshow(values, aspect="auto"), ax=panel)
        panel.set(title=title, xlabel="head", ylabel="layer")
        layers, heads = values.shape
        panel.set_xticks(range(0, heads, -(-heads // 16)))
        panel.set_yticks(range(0, layers, -(-layers // 16)))
    for i, ((layer, head), picture) in enumerate(maps):
        panel = figure.add_subplot(grid[1, 3 * i : 3 * i + 3])
        # Decades of the weight, so that one strong column doesn't hide the rest.
        panel.imshow(np.log10(picture + 1e-4), extent=(0, found.length, found.length, 0), interpolation="nearest")
        panel.set(title=f"layer {layer}, head {head} (log weight)", xlabel="key", ylabel="query")


def _chosen(heads: str) -> int | list[Head]:
    """The option: a number, or layer:head,layer:head."""
    try:
        if ":" not in heads:
            return int(number(heads, AMOUNT))
        pairs = [pair.split(":") for pair in heads.split(",")]
        return [(int(layer), int(head)) for layer, head in pairs]
    except ValueError as error:
        raise ValueError(f"{heads!r} are no heads: give how many, or which as LAYER:HEAD,LAYER:HEAD") from error


def command(
    *,
    out: Out = "longcontext",
    sources: MaybeSources = None,
    glob: str = "*.py",
    documents: MaybeCount = 4,
    heads: Annotated[int | list[Head], spec("N|LAYER:HEAD,…", _chosen)] = 4,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Mean attention weight by distance, for every head, over the first --max_seq_len tokens of some documents; and
    maps of chosen heads. In blocks: memory is linear in the length.

    Args:
        out: the folder for attention.csv, attention.json and attention.png.
        sources: a text file, a folder, or a corpus.
        glob: the files of a folder that are read: *.md, say.
        documents: how many of those that are long enough (none: all).
        heads: which to draw maps of: 0:3,2:1 for layer 0's head 3 and layer 2's head 1; or how many: those that look
            furthest, one of each layer first.
        json: print JSON instead of the table.
    """
    started, texts = begin(out), read_texts(sources, glob)
    llama = build(**loading)
    found = attention_by_distance(llama, texts, None, documents, heads, progress=True)
    if not llama.ranks.leads:
        return
    made_of: dict[str, Any] = {"sources": sources, "length": found.length, "documents": found.documents}
    made_of |= {"maps": [f"{layer}:{head}" for layer, head in found.maps], "options": loading}
    record = Record("attention", list(rows_of(found, llama.model.args)), made_of)
    save_record(record, out, started, llama, lambda figure: draw(found, figure))
    figures = {"mean_distance": found.mean_distance.tolist(), "on_first": found.on_first.tolist()}
    tell(render(*_table(found)), {"measure": "attention", "out": out, **made_of, **figures}, json)


def _table(found: AttentionByDistance) -> tuple[list[str], list[list[str]]]:
    """A line for each layer: where its heads look, in parts of all attention."""
    starts = [0, 1, 2, 8, 32, 128, 512, 2048, 8192, 32768]
    edges = [start for start in starts if start < found.length]
    edges.append(found.length)
    sums = (found.weight * found.queries).mean(1) / found.queries[0]  # (layers, length)
    header = ["layer"]
    header += [f"{start}" if end == start + 1 else f"{start}–{end - 1}" for start, end in pairwise(edges)]
    rows = [
        [str(layer), *(f"{sums[layer, start:end].sum():.1%}" for start, end in pairwise(edges))]
        for layer in range(len(sums))
    ]
    header += ["first token", "mean distance"]
    for layer, row in enumerate(rows):
        row += [f"{found.on_first[layer].mean():.1%}", f"{found.mean_distance[layer].mean():.1f}"]
    return header, rows
