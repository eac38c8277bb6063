"""What rounding does to a rotation, by position.

A token at position p is turned by the angle p·w, and cos only wants what is left of it after whole turns. So an error
in w, or in the angle, grows with p: float32 has 24 bits, of which the angle 100,000 leaves 7 for the fraction, and
bfloat16, with 8 bits, can't even tell position 256 from 257. The core makes its tables in float64 and keeps them in
float32. Here they are made in other ways that are in use, and their cosines are compared with float64.

What that does to a model is measured on a text that is moved. A rotary model sees distances only, so a text that
begins at position 100,000 must get the logits that it gets at position 0, and whatever changes is the tables' error,
not the model's inexperience with long contexts. A window of text is read with the rows of the tables that belong to
the later position. So position 1,048,576 costs what position 0 does, and no cache has to reach there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Unpack

from llama.config import ModelArgs
from llama.evals.intervals import Estimate, ratio
from llama.evals.positions import long_documents
from llama.evals.record import Record, begin
from llama.evals.sources import Source
from llama.evals.table import render
from llama.front import load as build
from llama.generation import Llama
from llama.longcontext.perplexity import checked_lengths, metric, read_texts, report, rope_of
from llama.model import Transformer
from llama.options import Amounts, Count, Loading, MaybeCount, MaybeSources, Out, one_of, several
from llama.rope import Spectrum, spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OFFSETS = (0, 4_096, 16_384, 100_000, 1_048_576)
_CHUNK = 256
"""Positions whose logits are compared at a time: two times V numbers of 8 bytes for each."""


@dataclass(frozen=True)
class Recipe:
    """The dtype of each step from frequencies to tables. What comes out is given to the model in float32."""

    inv_freq: torch.dtype = torch.float32
    positions: torch.dtype = torch.float32
    angles: torch.dtype = torch.float32
    table: torch.dtype = torch.float32

    def tables(self, scheme: Spectrum, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, D/2) float32 at some positions (T,)."""
        w = scheme.inv_freq.to(self.inv_freq).to(self.angles)
        angles = torch.outer(positions.to(self.positions).to(self.angles), w)
        both = (angles.cos() * scheme.attention_scale, angles.sin() * scheme.attention_scale)
        cos, sin = (table.to(self.table).float() for table in both)
        return cos, sin


RECIPES = {
    "ours": Recipe(torch.float64, torch.float64, torch.float64),
    "float32_angles": Recipe(),
    "bfloat16_table": Recipe(table=torch.bfloat16),
    "bfloat16_inv_freq": Recipe(inv_freq=torch.bfloat16),
    "bfloat16_positions": Recipe(positions=torch.bfloat16),
}
"""The core's way, and four others: the published code's; that with tables cast to the weights' dtype; a model cast
to bfloat16 with its `inv_freq` buffer in it; positions made in the weights' dtype."""


@dataclass(frozen=True)
class Change:
    """What a recipe does to positions `start` to `end` - 1 of documents that begin at position `offset`."""

    recipe: str
    offset: int
    start: int
    end: int
    cos_error: float
    """The largest distance of a cosine to float64's."""
    logit_change: float
    """The largest of any logit."""
    kl: Estimate
    """Nats a token, of the distributions at position 0 with our tables from these. Intervals are over documents."""
    nats_per_token: Estimate
    """The loss itself."""
    other_first: Estimate
    """The share of tokens after which another token is the likeliest."""


@dataclass(frozen=True)
class Precision:
    length: int
    documents: tuple[str, ...]
    changes: tuple[Change, ...]


def cos_errors(scheme: Spectrum, positions: Tensor, recipe: Recipe) -> Tensor:
    """(T,): the largest distance, over the pairs, of a recipe's cosine to float64's at each of some positions (T,)."""
    found = []
    for part in torch.split(positions, 2**14):  # 64 pairs of 2^14 positions are 8 MB in float64
        exact = torch.outer(part.double(), scheme.inv_freq).cos_() * scheme.attention_scale
        found.append((recipe.tables(scheme, part)[0].double() - exact).abs_().amax(-1))
    return torch.cat(found)


@contextmanager
def rotated(model: Transformer, cos: Tensor, sin: Tensor) -> Iterator[None]:
    """Within the block, the model turns what stands at slot t by row t of these tables (at least T rows, D/2)."""
    device = model.norm.weight.device
    tables = cos.to(device), sin.to(device)
    before = vars(model).get("rotation")  # where another has replaced it already
    model.rotation = lambda length: tables  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.rotation
        if before is not None:
            model.rotation = before  # type: ignore[method-assign]


@torch.inference_mode()
def precision(
    llama: Llama,
    sources: Sequence[Source],
    length: int | None = None,
    offsets: Sequence[int] = OFFSETS,
    documents: int | None = 8,
    bins: int = 1,
    recipes: Sequence[str] = tuple(RECIPES),
    progress: bool = False,
) -> Precision:
    """The first `length` tokens (default: max_seq_len) of some documents, read at each of the `offsets` with tables
    of each of the `recipes`, in `bins` equal parts, and compared with our tables at position 0.

    A scheme that depends on the length is made for the last position, for all alike. No cache is used, so a window
    is read in one pass. Raises ValueError for offsets, recipes and bins that can't be, and where no document is long
    enough.
    """
    unknown = [name for name in recipes if name not in RECIPES]
    if unknown or not recipes:
        raise ValueError(f"recipes {unknown or list(recipes)} are unknown; give some of {', '.join(RECIPES)}")
    if not offsets or not all(offset == int(offset) >= 0 for offset in offsets):
        raise ValueError(f"offsets are {list(offsets)}; give at least one position, each a whole number of 0 or more")
    offsets, room = [int(offset) for offset in offsets], llama.model.args.max_seq_len
    [length] = checked_lengths([room if length is None else length], room)
    if not 1 <= bins < length:
        raise ValueError(f"{bins} bins for {length} tokens; give 1 to {length - 1}")
    texts = long_documents(llama.tokenizer, sources, length, documents)
    model, args = llama.model, llama.model.args
    scheme = spectrum(args.head_dim, args.rope_theta, args.rope_scaling, max(offsets) + length)
    places = torch.arange(length)
    edges = [(length - 1) * i // bins for i in range(bins + 1)]
    rows = [torch.tensor([ids[:length]], device=model.norm.weight.device) for ids in texts.values()]
    with rotated(model, *RECIPES["ours"].tables(scheme, places)):
        exact = [model.hidden(tokens) for tokens in rows]
    found = []
    asked = [(name, offset) for name in recipes for offset in offsets]
    for name, offset in tqdm(asked, desc="tables", leave=False, disable=not (progress and llama.ranks.leads)):
        positions = places + offset
        errors = cos_errors(scheme, positions, RECIPES[name])
        with rotated(model, *RECIPES[name].tables(scheme, positions)):
            # Each (4, T - 1): the last token has none to foretell.
            changes = [_changes(model, tokens, h) for tokens, h in zip(rows, exact, strict=True)]
        for start, end in pairwise(edges):
            here = [change[:, start:end] for change in changes]
            sums = torch.stack([change.sum(-1) for change in here])  # (documents, 4)
            counts = [end - start] * len(here)
            _, kl, loss, other = (ratio(column.tolist(), counts) for column in sums.unbind(-1))
            largest = max(float(change[0].max()) for change in here)
            of = name, offset, offset + start, offset + end
            found.append(Change(*of, float(errors[start:end].max()), largest, kl, loss, other))
    return Precision(length, tuple(texts), tuple(found))


def _changes(model: Transformer, tokens: Tensor, exact: Tensor) -> Tensor:
    """(4, T - 1) float64 on the CPU, of one row: the largest change of a logit against those of the `exact` hidden
    states, the KL divergence, the loss, and 1 where another token is the likeliest."""
    hidden, parts = model.hidden(tokens)[0, :-1], []
    pieces = (torch.split(whole, _CHUNK) for whole in (exact[0, :-1], hidden, tokens[0, 1:]))
    for a, b, following in zip(*pieces, strict=True):
        before, after = model.logits(a).cpu().double(), model.logits(b).cpu().double()
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        change = (before - after).abs().amax(-1)
        loss = -q.gather(-1, following.cpu()[:, None])[:, 0]
        parts.append(torch.stack([change, (p.exp() * (p - q)).sum(-1), loss, p.argmax(-1).ne(q.argmax(-1)).double()]))
    return torch.cat(parts, dim=-1)


# The command ---------------------------------------------------------------------------------------------------------


def rows_of(found: Precision, args: ModelArgs) -> Iterator[dict[str, Any]]:
    """The tidy table, a figure a row; `n` counts documents. What is a maximum has no interval."""
    for change in found.changes:
        place = {**rope_of(args), "length": found.length, "recipe": change.recipe, "offset": change.offset}
        place |= {"start": change.start, "end": change.end}
        for name in ("cos_error", "logit_change"):
            value = getattr(change, name)
            yield {**place, "metric": name, "n": len(found.documents), "value": value, "low": "", "high": ""}
        for name in ("kl", "nats_per_token", "other_first"):
            yield {**place, **metric(name, getattr(change, name))}


def draw(found: Precision, figure: Figure) -> None:
    """The cosine's error, the largest change of a logit and the KL divergence, by position."""
    figure.set_size_inches(13, 4.5)
    panels = figure.subplots(1, 3)
    titles = {"cos_error": "error of cos", "logit_change": "largest change of a logit", "kl": "KL, nats a token"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for recipe in dict.fromkeys(change.recipe for change in found.changes):
            here = [change for change in found.changes if change.recipe == recipe]
            values = [getattr(change, name) for change in here]
            heights = [v.value if isinstance(v, Estimate) else v for v in values]
            points = [(change.end, height) for change, height in zip(here, heights, strict=True) if height > 0]
            panel.plot([x for x, _ in points], [y for _, y in points], "o-", markersize=3, label=recipe)
        panel.set(title=title, xlabel="position", xscale="log", yscale="log")
    panels[0].legend(fontsize="small")


def command(
    *,
    out: Out = "longcontext",
    sources: MaybeSources = None,
    glob: str = "*.py",
    offsets: Amounts = OFFSETS,
    documents: MaybeCount = 8,
    bins: Count = 1,
    recipes: Annotated[tuple[str, ...], several("RECIPE", one_of(RECIPES))] = tuple(RECIPES),
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """What the dtype of the rotation's tables does to cosines and to logits, by position.

    The first --max_seq_len tokens of some documents are read as if they stood at each of the offsets.

    Args:
        out: the folder for precision.csv, precision.json and precision.png.
        sources: a text file, a folder, or a corpus.
        glob: the files of a folder that are read: *.md, say.
        offsets: positions at which the documents begin: 0,4096,100000. For one long text: --offsets 0 --bins 8.
        documents: how many of those that are long enough (none: all).
        bins: into how many parts the positions of a document are divided.
        recipes: some of these.
        json: print JSON instead of the table.
    """
    started, texts = begin(out), read_texts(sources, glob)
    llama = build(**loading)
    found = precision(llama, texts, None, offsets, documents, bins, recipes, progress=True)
    made_of: dict[str, Any] = {"sources": sources, "length": found.length, "documents": found.documents}
    made_of |= {"recipes": {name: asdict(RECIPES[name]) for name in recipes}, "options": loading}
    record = Record("precision", list(rows_of(found, llama.model.args)), made_of)
    header = (f"{len(found.documents)} documents", "positions", "error of cos", "logits", "KL", "loss", "other token")
    rows = [
        (
            change.recipe,
            f"{change.start:,}–{change.end - 1:,}",
            f"{change.cos_error:.1e}",
            f"{change.logit_change:.1e}",
            f"{change.kl.value:.1e}",
            f"{change.nats_per_token.value:.3f}",
            f"{change.other_first.value:.1%}",
        )
        for change in found.changes
    ]
    report(llama, record, out, started, render(header, rows), lambda figure: draw(found, figure), json)
