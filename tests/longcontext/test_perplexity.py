"""Perplexity by position and by window against the oracle in float64, and the mistakes that such figures invite."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures_text import Spy, next_logprobs, training_texts
from llama import parallel
from llama.config import ModelArgs
from llama.evals.compression import losses_of, nats_of
from llama.evals.positions import long_documents
from llama.evals.sources import File
from llama.generation import Llama
from llama.longcontext.perplexity import (
    command,
    key_tokens,
    perplexity,
    read_texts,
    trained_length,
    warn_beyond,
)
from llama.tokenizer import Tokenizer

TEXTS = training_texts()
FILES = [File("a.py", TEXTS[0][2000:2300]), File("b.py", TEXTS[1][2000:2150]), File("short.py", "import os\n")]
LENGTHS = (12, 32)


def loss_by_the_oracle(llama: Llama, ids: list[int], length: int, stride: int) -> list[float]:
    """-ln p of each token, from the first window that reaches it."""
    starts = range(0, len(ids), stride)
    tables = {start: next_logprobs([llama.tokenizer.bos_id, *ids[start : start + length - 1]]) for start in starts}
    losses: list[float] = []
    for at, token in enumerate(ids):
        first = next(start for start in starts if start + length - 1 > at)
        losses.append(-float(tables[first][at - first, token]))
    return losses


def copying(multiple: int = 1) -> Callable[..., list[dict[str, list[float | None]]]]:
    """The scores of a model that knows a token, if its id is such a multiple, just where it has seen it before."""

    def score(rows: Sequence[list[int]]) -> list[dict[str, list[float | None]]]:
        known = [[t % multiple == 0 and t in ids[:p] for p, t in enumerate(ids)] for ids in rows]
        return [{"logprobs": [None, *(-0.5 if k else -6.0 for k in row[1:])]} for row in known]

    return score


def ids_of(llama: Llama, file: File) -> list[int]:
    return llama.tokenizer.encode(file.text, bos=False, eos=False)


@pytest.mark.parametrize("stride", [None, 4])
def test_windows_are_those_of_the_oracle(tiny_llama: Llama, stride: int | None) -> None:
    """Guards the window's place, its bos, and the weights: token-weighted, in documents of unequal length."""
    found = perplexity(tiny_llama, FILES, LENGTHS, stride=stride, bins=4)
    texts = [ids_of(tiny_llama, file) for file in FILES[:2]]
    assert found.documents == ("a.py", "b.py")
    assert found.tokens == sum(map(len, texts))
    by_length = {}
    for window, length in zip(found.windows, LENGTHS, strict=True):
        assert (window.length, window.stride) == (length, stride or length // 2)
        direct = [loss_by_the_oracle(tiny_llama, ids, length, window.stride) for ids in texts]
        by_length[length] = sum(map(sum, direct)) / found.tokens
        assert window.nats_per_token.value == pytest.approx(by_length[length], rel=1e-6)
        assert window.perplexity.value == pytest.approx(math.exp(by_length[length]), rel=1e-5)
        assert window.perplexity.low <= window.perplexity.value <= window.perplexity.high
        assert window.nats_per_token.n == 2
        assert window.saved.value == pytest.approx(by_length[12] - by_length[length], abs=1e-6)


def test_positions_are_those_of_one_pass(tiny_llama: Llama) -> None:
    found = perplexity(tiny_llama, FILES, LENGTHS, bins=3).positions
    tables = []
    for file in FILES[:2]:
        ids = [tiny_llama.tokenizer.bos_id, *ids_of(tiny_llama, file)][:32]
        rows = next_logprobs(ids)
        tables.append([-float(rows[p - 1, ids[p]]) for p in range(1, 32)])
    for b in found.bins:
        here = [loss for table in tables for loss in table[b.start - 1 : b.end - 1]]
        assert b.nats_per_token.value == pytest.approx(sum(here) / len(here), rel=1e-6)
    assert (found.bins[0].start, found.bins[-1].end) == (1, 32)


def test_windows_are_not_averaged(tiny_llama: Llama) -> None:
    """The trap: the last window of a document is short, and a mean of windows would weigh its tokens more."""
    ids = ids_of(tiny_llama, FILES[0])[:34]
    file = File("a.py", tiny_llama.tokenizer.decode(ids))
    found = perplexity(tiny_llama, [file], [32], stride=31, bins=2).windows[0]
    direct = loss_by_the_oracle(tiny_llama, ids, 32, 31)
    mean_of_windows = (sum(direct[:31]) / 31 + sum(direct[31:]) / 3) / 2
    assert found.nats_per_token.value == pytest.approx(sum(direct) / 34, rel=1e-6)
    assert abs(found.nats_per_token.value - mean_of_windows) > 0.05


def test_every_length_has_the_same_documents_and_tokens(tiny_llama: Llama) -> None:
    """The trap: short documents, which only the short windows could read, are easier or harder than the others."""
    alone = perplexity(tiny_llama, FILES[:2], LENGTHS, bins=2)
    beside = perplexity(tiny_llama, [*FILES, File("x.py", "x = 1\n" * 4)], LENGTHS, bins=2)
    assert beside == alone
    for window in beside.windows:
        every = losses_of(tiny_llama, [ids_of(tiny_llama, file) for file in FILES[:2]], window.length)
        assert sum(map(len, every)) == beside.tokens


def test_plain_perplexity_hides_what_longppl_shows(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: nine tokens in ten need no long context. Two models with one plain perplexity, of which only the
    second uses its context, differ in the tokens that an evaluator finds to need it."""
    short = np.array([1.0] * 9 + [6.0])
    deaf, listening = np.array([0.5] * 9 + [6.0]), np.array([1.0] * 9 + [1.5])
    assert deaf.sum() == listening.sum()
    mask = key_tokens(listening, short)
    assert mask.tolist() == [False] * 9 + [True]
    assert listening[mask].mean() < deaf[mask].mean() - 4
    assert key_tokens(np.array([2.5, 0.1, 1.9]), np.array([9.0, 1.9, 4.0])).tolist() == [False, False, True]
    # End to end: a token is one of them where the long window holds it a second time, and the short one does not.
    monkeypatch.setattr(tiny_llama, "score", copying())
    found = perplexity(tiny_llama, FILES, LENGTHS, bins=2)
    texts = [ids_of(tiny_llama, file) for file in FILES[:2]]
    short_losses, long_losses = (np.concatenate(losses_of(tiny_llama, texts, length)) for length in LENGTHS)
    keys = key_tokens(long_losses, short_losses)
    assert found.key_tokens == keys.sum() > 0
    assert [w.key_nats_per_token and w.key_nats_per_token.value for w in found.windows] == pytest.approx([6.0, 0.5])
    assert found.windows[1].nats_per_token.value == pytest.approx(long_losses.mean())


def test_evaluator_chooses_the_key_tokens(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Llama(tiny_llama.model, tiny_llama.tokenizer)
    monkeypatch.setattr(evaluator, "score", copying(multiple=2))
    own = perplexity(tiny_llama, FILES, LENGTHS, bins=2)
    judged = perplexity(tiny_llama, FILES, LENGTHS, bins=2, evaluator=evaluator)
    assert judged.windows[0].nats_per_token == own.windows[0].nats_per_token
    assert judged.key_tokens == perplexity(evaluator, FILES, LENGTHS, bins=2).key_tokens > own.key_tokens == 0
    assert (own.windows[1].key_perplexity, judged.windows[1].key_perplexity is None) == (None, False)


def test_evaluator_with_another_tokenizer_is_refused(tiny_llama: Llama, plain_tokenizer: Tokenizer) -> None:
    other = Llama(tiny_llama.model, plain_tokenizer)
    with pytest.raises(ValueError, match="another tokenizer"):
        perplexity(tiny_llama, FILES, LENGTHS, bins=2, evaluator=other)


def test_chunk_and_batch_change_nothing(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(tiny_llama, FILES, (48, 100), bins=4)
    monkeypatch.setattr(tiny_llama.loop, "chunk", 7)
    monkeypatch.setattr(tiny_llama.model, "cache", tiny_llama.model.new_cache(1, 128))
    parts = perplexity(tiny_llama, FILES, (48, 100), bins=4)
    for one, other in zip(
        [w.perplexity for w in whole.windows] + [b.nats_per_token for b in whole.positions.bins],
        [w.perplexity for w in parts.windows] + [b.nats_per_token for b in parts.positions.bins],
        strict=True,
    ):
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), rel=1e-6)


def test_logits_are_never_kept_whole(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(tiny_llama, monkeypatch)
    monkeypatch.setattr(tiny_llama.loop, "chunk", 16)
    perplexity(tiny_llama, FILES, (96,), bins=2)
    assert max(spy.scored) <= 16


def test_losses_add_up_to_those_of_the_evals(tiny_llama: Llama) -> None:
    """One protocol of windows in the whole package."""
    texts = [ids_of(tiny_llama, file) for file in FILES]
    own = [math.fsum(losses) for losses in losses_of(tiny_llama, texts, 24, 10)]
    assert own == nats_of(tiny_llama, texts, 24, 10)


def test_context_beyond_the_trained_one_is_warned_of_with_a_scheme(tiny_llama: Llama) -> None:
    with pytest.warns(
        UserWarning, match=r'beyond the 16 .*"yarn", "factor": 2, "original_max_position_embeddings": 16'
    ):
        perplexity(tiny_llama, FILES, LENGTHS, bins=2, trained=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perplexity(tiny_llama, FILES[:1], [12], bins=2, trained=12)
        warn_beyond(100, None)


def test_trained_length_is_what_the_files_say() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert trained_length(ModelArgs(rope_scaling=yarn)) == 16384
    assert trained_length(ModelArgs()) is None


def test_longer_windows_that_are_worse_are_warned_of(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is lost beyond 32 tokens, in every document."""

    def score(rows: Sequence[list[int]]) -> list[dict[str, list[float | None]]]:
        return [{"logprobs": [None, *(-2.0 if p < 32 else -9.0 for p in range(1, len(ids)))]} for ids in rows]

    monkeypatch.setattr(tiny_llama, "score", score)
    with pytest.warns(UserWarning, match=r"context of 64 than with one of 32.*original_max_position_embeddings\W+32"):
        found = perplexity(tiny_llama, [File(f"{i}.py", TEXTS[i][2000:2300]) for i in range(5)], [32, 64], bins=2)
    assert found.windows[1].saved.high < 0
    assert found.key_tokens == 0, "what a window helps by chance, beyond the trained context, is no key token"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perplexity(tiny_llama, FILES[:2], [32, 64], bins=2)  # two documents may both be worse by chance


def test_what_cannot_be_is_refused(tiny_llama: Llama) -> None:
    longest = len(ids_of(tiny_llama, File("l.py", "x = 1\n"))) + 1
    with pytest.raises(ValueError, match=rf"no document has 128 tokens, the longest {longest} \(l.py\)"):
        perplexity(tiny_llama, [File("l.py", "x = 1\n"), File("s.py", "x")], [16, 128])
    with pytest.raises(ValueError, match="nothing to measure on"):
        perplexity(tiny_llama, [File("a.py", "")], [16])
    for lengths in ([], [1], [129], [2.5]):
        with pytest.raises(ValueError, match="whole number of 2 to 128"):
            perplexity(tiny_llama, FILES, lengths)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a stride of 12; with windows of 12 tokens it must be 1 to 11"):
        perplexity(tiny_llama, FILES, LENGTHS, stride=12)
    with pytest.raises(ValueError, match="8 tokens of each document; give at least the longest length, 32"):
        perplexity(tiny_llama, FILES, LENGTHS, tokens=8)


def test_documents_are_cut_to_the_tokens_asked_for(tiny_llama: Llama) -> None:
    found = perplexity(tiny_llama, FILES, LENGTHS, bins=2, tokens=40)
    assert found.tokens == 2 * 39, "bos is none of a document's own"
    assert len(long_documents(tiny_llama.tokenizer, FILES, 12, n=1)) == 1


def test_any_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("# B\r\n", encoding="utf-8", newline="")
    (tmp_path / "a.py").write_text("a = 1\n", encoding="utf-8")
    (tmp_path / "blank.md").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin.md").write_bytes(b"\xe9")
    assert [(f.path, f.text) for f in read_texts(str(tmp_path), "*.md")] == [("deep/b.md", "# B\r\n")]
    assert [f.path for f in read_texts(str(tmp_path))] == ["a.py"]
    assert [f.path for f in read_texts(str(tmp_path / "deep" / "b.md"))] == ["b.md"]
    with pytest.raises(ValueError, match=r"no text in UTF-8 in files that match \*.txt"):
        read_texts(str(tmp_path), "*.txt")
    with pytest.raises(ValueError, match="there is no file or folder"):
        read_texts(str(tmp_path / "nowhere"))


def test_command_leaves_a_table_a_record_and_a_picture(tmp_path: Path, tiny_checkpoint: Path, told: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    parallel.start()
    for file in FILES:
        (tmp_path / file.path).write_text(file.text, encoding="utf-8")
    out = tmp_path / "out"
    command(
        sources=str(tmp_path), lengths=(12, 32), bins=2, out=str(out), ckpt_dir=str(tiny_checkpoint), rope_theta=1e6
    )
    [(table, printed)] = told
    rows = list(csv.DictReader((out / "perplexity.csv").open(encoding="utf-8")))
    assert printed["rows"][0]["value"] == float(rows[0]["value"])
    assert {(r["scheme"], r["theta"], r["n"]) for r in rows} == {("default", "1000000.0", "2")}
    windows = {(r["length"], r["stride"]) for r in rows if r["metric"] == "perplexity"}
    assert windows == {("12", "6"), ("32", "16")}
    assert [(r["start"], r["end"]) for r in rows if r["metric"] == "bits_per_byte"] == [("1", "16"), ("16", "32")]
    assert all(float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in rows)
    facts = json.loads((out / "perplexity.json").read_text(encoding="utf-8"))
    assert (facts["documents"], facts["model"]["rope_theta"]) == (["a.py", "b.py"], 1e6)
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert "32" in table[-1]
