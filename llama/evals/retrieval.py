"""Key retrieval: a number stands somewhere in a long prompt; can the model name it at the end?

The protocol is Code Llama's (arXiv 2308.12950, section 3.3 and appendix G): among functions that have nothing to do
with it, at some relative depth, stands one that returns a number of two digits; the prompt ends by asserting what it
returns. The result is a grid, length by depth. Chance is about 1 in 90, and a model that sees only part of its
prompt shows it: the cells whose key lies outside go to chance at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tqdm import tqdm

from llama.evals.intervals import Share, share
from llama.evals.sources import Source, choose, with_text
from llama.evals.syntax import functions
from llama.generation import Llama
from llama.tokenizer import Tokenizer

KEY = '''\
def my_function() -> int:
    """Note that this function is used at the end
    """
    return {key}


'''
QUESTION = "assert my_function() == "
DIGITS = 2
DEPTHS = (0.0, 0.25, 0.5, 0.75)
POOL = 4000  # functions that prompts are made of; enough for variety, few enough to be encoded in seconds

Complete = Callable[[Sequence[str]], Sequence[str]]
"""Prompts to what follows each, of which the first two characters count."""


@dataclass(frozen=True)
class Task:
    prompt: str
    key: str
    tokens: int
    """Of the prompt, bos included."""


@dataclass(frozen=True)
class Cell:
    length: int
    depth: float
    found: Share
    tokens: float
    """Of a prompt, on average; at most `length` with the answer."""


@dataclass(frozen=True)
class Retrieval:
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: tuple[Cell, ...]
    """By length, and within a length by depth."""


def retrieval(
    llama: Llama,
    sources: Sequence[Source],
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    samples: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Retrieval:
    """The grid of a model, greedily. `lengths` are in tokens, prompt and answer together (default: max_seq_len alone).

    Raises ValueError for lengths beyond max_seq_len, and as `retrieval_by`.
    """
    room = llama.model.args.max_seq_len
    lengths = [room] if lengths is None else lengths
    if lengths and max(lengths) > room:
        raise ValueError(f"a length of {max(lengths)}; this model was built for {room}: build with more, or ask less")

    def complete(prompts: Sequence[str]) -> list[str]:
        return [p["generation"] for p in llama.text_completion(prompts, temperature=0.0, max_gen_len=DIGITS)]

    show = progress and llama.ranks.leads
    rows = llama.model.args.max_batch_size
    return retrieval_by(complete, llama.tokenizer, sources, lengths, depths, samples, seed, show, rows)


def retrieval_by(
    complete: Complete,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    samples: int = 64,
    seed: int = 0,
    progress: bool = False,
    rows: int = 1,
) -> Retrieval:
    """The grid of anything that completes text, given `rows` prompts at a time.

    Raises ValueError where a length is too short for key and question, where the sources hold too little code to fill
    it, and for a depth outside 0 to 1.
    """
    if not lengths or not depths or samples < 1 or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"lengths {list(lengths)}, depths {list(depths)}, {samples} samples; give at least one of each, and depths "
            "between 0 and 1"
        )
    filler = Filler(tokenizer, sources, seed)
    cells = []
    with tqdm(total=len(lengths) * len(depths) * samples, desc="keys", leave=False, disable=not progress) as bar:
        for length in lengths:
            for depth in depths:
                tasks = [filler.task(length, depth, sample) for sample in range(samples)]
                hits = 0
                for first in range(0, samples, rows):
                    batch = tasks[first : first + rows]
                    answers = complete([task.prompt for task in batch])
                    hits += sum(a.strip()[:DIGITS] == task.key for a, task in zip(answers, batch, strict=True))
                    bar.update(len(batch))
                tokens = sum(task.tokens for task in tasks) / samples
                cells.append(Cell(length, depth, share(hits, samples), tokens))
    return Retrieval(tuple(lengths), tuple(depths), tuple(cells))


class Filler:
    """Makes prompts out of the functions of held-out code."""

    def __init__(self, tokenizer: Tokenizer, sources: Sequence[Source], seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        found = {f.code.rstrip() + "\n\n\n" for s in with_text(sources) for f in functions(s.text)}
        known = [code for code in found if "my_function" not in code]
        self._pool = [(code, self._cost(code)) for code in choose(known, POOL, lambda code: code, seed)]
        self._fixed = self._cost(KEY.format(key=10)) + self._cost(QUESTION) + DIGITS + 2  # bos, the first space

    def _cost(self, text: str) -> int:
        """Tokens; texts that end in a newline add up."""
        return len(self._tokenizer.encode_infilling(text))

    def task(self, length: int, depth: float, sample: int) -> Task:
        """A prompt of at most `length` tokens with its answer, the key after that part of the filler which comes
        nearest to `depth`. The samples of one number have the same key and filler at every depth."""
        rng = random.Random(f"{self._seed} {length} {sample}")
        key = str(rng.randrange(10, 100))
        parts = list(self._fill(length, rng))
        ends = list(accumulate((cost for _, cost in parts), initial=0))
        at = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
        texts = [text for text, _ in parts]
        prompt = "".join([*texts[:at], KEY.format(key=key), *texts[at:], QUESTION])
        return Task(prompt, key, len(self._tokenizer.encode(prompt, bos=True, eos=False)))

    def _fill(self, length: int, rng: random.Random) -> Iterator[tuple[str, int]]:
        """Functions in random order, none twice, none longer than an eighth of the prompt: or depths would be coarse
        and the end of the room empty."""
        room = length - self._fixed
        short = [part for part in self._pool if part[1] <= length // 8]
        rng.shuffle(short)
        left = room
        for text, cost in short:
            if cost <= left:
                left -= cost
                yield text, cost
        if left == room or left > length // 4:
            raise ValueError(
                f"a prompt of {length} tokens needs {self._fixed} for the key and the question and the rest filled "
                f"with functions of at most {length // 8} tokens; the sources have {len(short)} such functions: give "
                "more source files, or another length"
            )
