"""What the tests of text and generation share: a small checkpoint's numbers, the oracle's view of an answer, and spies.

The checkpoint is random, but loud: its scores are far enough apart that greedy decoding has no near-ties, so float32
and the float64 of reference.py must choose the same tokens.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama.config import ModelArgs
from llama.generation import Llama
from reference import llama as reference_llama
from reference import random_weights

VOCABULARY = 1024
ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=VOCABULARY, hidden_dim=96)
SLOTS, ROWS = 128, 4  # max_seq_len and max_batch_size of the fixture tiny_llama


def training_texts() -> list[str]:
    """Some of the standard library: enough for a vocabulary of 1024 pieces."""
    library = Path(os.__file__).parent
    names = ("argparse.py", "ast.py", "textwrap.py", "heapq.py", "bisect.py")
    return [(library / name).read_text(encoding="utf-8") for name in names]


def loud_weights() -> dict[str, Tensor]:
    """Those of the special pieces are 0, so that an answer ends where a test lets it, not by chance."""
    weights = random_weights(ARGS, seed=0)
    weights["output.weight"] *= 4
    weights["output.weight"][:3] = 0  # unk, bos and eos
    weights["output.weight"][-16:] = 0  # the marks, and the steps to them
    return weights


WEIGHTS = loud_weights()


def next_logprobs(ids: Sequence[int]) -> Tensor:
    """The oracle: (T, V) float64 log-probabilities of what follows each beginning of `ids`."""
    return torch.log_softmax(reference_llama(ARGS, WEIGHTS, torch.tensor([list(ids)]))[0], -1)


def greedy(prompt: Sequence[int], n: int) -> list[int]:
    """The oracle's answer of `n` tokens: the likeliest, one after the other."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(next_logprobs(ids)[-1].argmax()))
    return ids[len(prompt) :]


def logprobs_after(prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """The oracle's log-probability of each token of an answer."""
    found = next_logprobs([*prompt, *answer])
    return [float(found[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]


def characters_of(pieces: Iterable[bytes]) -> list[str]:
    """What each of some parts of a UTF-8 text completes, by the standard library."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return [decoder.decode(piece) for piece in pieces]


def cut_before_the_first_complete(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The definition: the text is read letter by letter; with the first that completes a stop string, the longest
    one it completes is cut off."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


class Spy:
    """Counts what a Llama's model is asked for: `read` has the (B, T) of each pass, `scored` the positions that got
    logits."""

    def __init__(self, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, int]] = []
        self.scored: list[int] = []
        hidden, logits = llama.model.hidden, llama.model.logits

        def counting_hidden(tokens: Tensor, *args: object) -> Tensor:
            self.read.append((tokens.shape[0], tokens.shape[1]))
            return hidden(tokens, *args)

        def counting_logits(h: Tensor) -> Tensor:
            self.scored.append(h[..., 0].numel())
            return logits(h)

        monkeypatch.setattr(llama.model, "hidden", counting_hidden)
        monkeypatch.setattr(llama.model, "logits", counting_logits)


def write_script(llama: Llama, monkeypatch: pytest.MonkeyPatch, answer: Sequence[int]) -> None:
    """Lets the model write just `answer`, and eos for ever after, to whatever single prompt it is given next."""
    coming = iter(answer)

    def logits(h: Tensor) -> Tensor:
        scores = torch.zeros(*h.shape[:-1], llama.model.args.vocab_size)
        scores[..., next(coming, llama.tokenizer.eos_id)] = 100.0
        return scores

    monkeypatch.setattr(llama.model, "logits", logits)
