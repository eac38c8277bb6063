"""Key retrieval as a grid, length by depth: how far back a model finds what it was told, and how long it really is.

The protocol is the paper's (arXiv 2308.12950, section 3.3 and appendix G), as llama/evals/retrieval.py has it: the
prompts of one sample hold the same functions and the same key, and differ in nothing but where the key stands. So they
begin alike, up to the key that comes first. Put in alphabetical order, prompts that begin alike follow each other; each
is read from where it leaves those whose keys and values stand in the cache already. Nothing is approximated:
the same tokens at the same positions give the same keys and values. What that saves is counted. It can't be much, as
all that stands behind a key depends on the key: with depths 0, 0.25, 0.5 and 0.75, three parts of sixteen.

A grid is summed up by its *effective length*: the largest of the measured lengths at which at least 85.6 % of the keys
are found, those of all depths together. (The bar is RULER's, arXiv 2404.06654: what Llama 2 7B reaches at the 4,096
tokens that it was made for.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from typing_extensions import Unpack

from llama.decoding import FEWEST
from llama.evals.record import Record, begin, save_record, tell
from llama.evals.retrieval import DEPTHS, DIGITS, Complete, Retrieval, retrieval_by
from llama.evals.sources import Source
from llama.evals.table import percent, render
from llama.front import load as build
from llama.generation import Llama
from llama.longcontext.perplexity import read_texts, rope_of, trained_length, warn_beyond
from llama.lookup import agreeing
from llama.options import Count, Lengths, Loading, MaybeCount, MaybeSources, Out, Seed, Shares
from llama.prompts import completion
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

EFFECTIVE = 0.856
"""The share of keys that makes a length an effective one."""


@dataclass(frozen=True)
class Grid:
    """A grid, and what it took. Tokens are those of prompts; the one that each answer adds is not counted."""

    found: Retrieval
    effective_length: int | None
    """None where no length reaches the bar."""
    prompts: int
    """That were asked; two depths at which the key falls between the same functions are one prompt."""
    prompt_tokens: int
    tokens_read: int
    """Of those, the ones that were not in the cache already."""


def retrieval_grid(
    llama: Llama,
    sources: Sequence[Source],
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    samples: int = 64,
    seed: int = 0,
    trained: int | None = None,
    progress: bool = False,
) -> Grid:
    """The grid of a model, greedily. `lengths` are in tokens, prompt and answer together (default: max_seq_len alone).

    Prompts are asked one at a time, and of each only what the cache does not hold is read. Warns of lengths beyond
    `trained` (default: what the checkpoint says of itself). Raises ValueError as `llama.evals.retrieval` does.
    """
    room = llama.model.args.max_seq_len
    lengths = [room] if lengths is None else lengths
    if lengths and max(lengths) > room:
        raise ValueError(f"a length of {max(lengths)}; this model was built for {room}: build with more, or ask less")
    if lengths:
        warn_beyond(max(lengths), trained_length(llama.model.args) if trained is None else trained)
    spent: list[tuple[int, int]] = []

    def complete(prompts: Sequence[str]) -> list[str]:
        return ask_one_by_one(llama, prompts, spent, progress)

    found = retrieval_in_order(complete, llama.tokenizer, sources, lengths, depths, samples, seed)
    whole, read = (sum(column) for column in zip(*spent, strict=True))
    return Grid(found, effective_length(found), len(spent), whole, read)


def retrieval_in_order(
    complete: Complete,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    samples: int = 64,
    seed: int = 0,
) -> Retrieval:
    """`retrieval_by` of anything that completes texts, which is given every prompt once, all together, in alphabetical
    order."""
    answers: dict[str, str] = {}

    def note(prompts: Sequence[str]) -> list[str]:
        answers.update(dict.fromkeys(prompts, ""))
        return [""] * len(prompts)

    retrieval_by(note, tokenizer, sources, lengths, depths, samples, seed)
    order = sorted(answers)
    answers.update(zip(order, complete(order), strict=True))
    return retrieval_by(
        lambda prompts: [answers[prompt] for prompt in prompts], tokenizer, sources, lengths, depths, samples, seed
    )


def ask_one_by_one(
    llama: Llama, prompts: Sequence[str], spent: list[tuple[int, int]], progress: bool = False
) -> list[str]:
    """The two tokens that follow each prompt, as text. `spent` gets the number of each prompt's tokens, and how many of
    them were not in the cache."""
    answers: list[str] = []
    cache = llama.model.own_cache()
    asked = [completion(llama.tokenizer, prompt) for prompt in prompts]
    total = sum(len(prompt.tokens) for prompt in asked)
    hide = not (progress and llama.ranks.leads)
    with tqdm(total=total, desc="keys", unit="token", unit_scale=True, leave=False, disable=hide) as bar:
        for prompt in asked:
            known = max(agreeing(row, prompt.tokens[:-1]) for row in cache.tokens)
            known = known if known >= FEWEST else 0
            events = list(llama.stream([prompt], DIGITS, temperature=0.0, seed=0))
            answers.append("".join(event.text for event in events))
            spent.append((len(prompt.tokens), len(prompt.tokens) - known))
            bar.update(len(prompt.tokens))
    return answers


def effective_length(found: Retrieval, bar: float = EFFECTIVE) -> int | None:
    """The largest measured length at which the share of keys found, those of all depths together, is at least `bar`;
    None where there is none. What happens at shorter lengths is not asked."""
    reached = [length for length in found.lengths if rate(found, length) >= bar]
    return max(reached, default=None)


def rate(found: Retrieval, length: int) -> float:
    """The share of keys found at a length, those of all depths together."""
    cells = [cell.found for cell in found.cells if cell.length == length]
    return sum(cell.hits for cell in cells) / sum(cell.n for cell in cells)


def tidy(found: Retrieval) -> list[dict[str, Any]]:
    """A row for each cell, with its Wilson interval."""
    return [
        {
            "length": cell.length, "depth": cell.depth, "metric": "found", "n": cell.found.n, "value": cell.found.rate,
            "low": cell.found.low, "high": cell.found.high,
        }
        for cell in found.cells
    ]  # fmt: skip


def heat_map(axes: Axes, found: Retrieval, title: str) -> AxesImage:
    """Draws a grid, the shortest length on top, each cell with its share in percent."""
    rates = {(cell.length, cell.depth): cell.found.rate for cell in found.cells}
    grid = [[rates[length, depth] for depth in found.depths] for length in found.lengths]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("depth of the key")
    axes.set_xticks(range(len(found.depths)), [f"{depth:g}" for depth in found.depths])
    axes.set_yticks(range(len(found.lengths)), [f"{length:,}" for length in found.lengths])
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            color = "black" if value > 0.6 else "white"
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", color=color, fontsize="small")
    return image


def command(
    *,
    out: Out = "longcontext",
    sources: MaybeSources = None,
    lengths: Lengths = (512,),
    depths: Shares = DEPTHS,
    samples: Count = 64,
    seed: Seed = 0,
    trained: MaybeCount = None,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """Key retrieval by the prompt's length and the key's depth: OUT/retrieval.csv, .json and .png.

    Args:
        out: a folder for the three files.
        sources: a .py file, a folder of them, or a corpus.
        lengths: tokens of prompt and answer: 512,1024,2048.
        depths: where the number stands, from 0 (first) to 1 (last): 0,0.25,0.5.
        samples: prompts for each length and depth.
        seed: of prompts and numbers.
        trained: the context that the checkpoint was trained on, so that a longer one gets a warning.
        json: print JSON instead of the table.
    """
    started, texts = begin(out), read_texts(sources)
    options: Loading = {"max_seq_len": max(lengths, default=512), "max_batch_size": 1, **loading}
    llama = build(**options)
    grid = retrieval_grid(llama, texts, lengths, depths, samples, seed, trained, progress=True)
    if not llama.ranks.leads:
        return
    values = asdict(grid)
    del values["found"]
    made_of = {
        "options": {"sources": sources, "lengths": list(lengths), "depths": list(depths), "samples": samples},
        "seed": seed,
        "rule": f"the largest length at which {EFFECTIVE:.1%} of the keys are found, those of all depths together",
        **values,
    }
    rows = [{**rope_of(llama.model.args), **row} for row in tidy(grid.found)]

    def draw(figure: Figure) -> None:
        image = heat_map(figure.subplots(), grid.found, f"keys found; effective length {grid.effective_length}")
        figure.axes[0].set_ylabel("tokens")
        figure.colorbar(image, ax=figure.axes, label="keys found")

    cells = {(cell.length, cell.depth): percent(cell.found) for cell in grid.found.cells}
    header = ("length \\ depth", *(f"{depth:g}" for depth in grid.found.depths))
    table = render(header, [(size, *(cells[size, depth] for depth in depths)) for size in lengths])
    table += f"\neffective length {grid.effective_length}: {made_of['rule']}"
    table += f"\nread {grid.tokens_read:,} of {grid.prompt_tokens:,} tokens; the others stood in the cache"
    save_record(Record("retrieval", rows, made_of), out, started, llama, draw)
    tell(table, {"measure": "retrieval", "out": out, **loading, **made_of, "rows": rows}, json)
