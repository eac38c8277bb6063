"""From documents to rows: whole sequences, each once, hardly any padding, the mixture that was asked for."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama.tokenizer import Tokenizer
from llama.train.corpus import Source
from llama.train.documents import Document
from llama.train.sequences import (
    PADDING,
    Mixture,
    encode_corpus,
    encode_document,
    encode_plain,
    pack,
    read_rows,
    write_rows,
)

LENGTH = 129
NAMES = ("bisect.py", "heapq.py", "textwrap.py", "shutil.py")


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return [Source(name, (Path(os.__file__).parent / name).read_text(encoding="utf-8")) for name in NAMES]


def is_gap(tokenizer: Tokenizer, ids: list[int]) -> bool:
    return tokenizer.prefix_id in ids


def is_dialog(tokenizer: Tokenizer, ids: list[int]) -> bool:
    return tokenizer.decode(ids).startswith("[INST]")


def test_sequences_fit_their_rows_and_begin_with_bos(tokenizer: Tokenizer, sources: list[Source]) -> None:
    for ids in encode_corpus(tokenizer, sources, LENGTH, Mixture(), "0"):
        assert 2 <= len(ids) <= LENGTH
        assert ids.index(tokenizer.bos_id) == 0
        assert ids.count(tokenizer.bos_id) == 1
        assert PADDING not in ids


def test_mixture_is_what_was_asked_for(tokenizer: Tokenizer, sources: list[Source]) -> None:
    def kinds(mixture: Mixture) -> tuple[float, float, float]:
        found = encode_corpus(tokenizer, sources, LENGTH, mixture, "0")
        documents = [ids for ids in found if not is_dialog(tokenizer, ids)]
        gaps = [ids for ids in documents if is_gap(tokenizer, ids)]
        first = [ids for ids in gaps if ids[2] == tokenizer.suffix_id]
        return len(gaps) / len(documents), len(first) / max(1, len(gaps)), len(found) - len(documents)

    gaps, suffix_first, dialogs = kinds(Mixture())
    assert abs(gaps - 0.5) < 0.1
    assert abs(suffix_first - 0.5) < 0.15
    assert dialogs > 0
    assert kinds(Mixture(infilling=0, dialogs=0)) == (0, 0, 0)
    gaps, suffix_first, _ = kinds(Mixture(infilling=1, suffix_first=1))
    assert gaps > 0.97  # a document that no longer fits stays whole
    assert suffix_first > 0.97


def test_a_document_that_no_longer_fits_with_a_gap_stays_whole(tokenizer: Tokenizer) -> None:
    document = Document("x = 1\n" * 20, ends=True)
    plain = tokenizer.encode(document.text, bos=True, eos=True)
    for seed in range(10):
        assert encode_document(tokenizer, document, len(plain), Mixture(infilling=1), random.Random(seed)) == plain
        assert encode_document(tokenizer, document, 2 * len(plain), Mixture(infilling=1), random.Random(seed)) != plain


def test_functions_are_documents_that_end(tokenizer: Tokenizer, sources: list[Source]) -> None:
    mixture = Mixture(infilling=0, functions=1, dialogs=0)
    texts = {
        tokenizer.decode(ids)
        for ids in encode_corpus(tokenizer, sources, LENGTH, mixture, "0")
        if ids[-1] == tokenizer.eos_id
    }
    assert any(text.startswith("def heappush(heap, item):") and text.endswith("len(heap)-1)\n") for text in texts)
    alone = encode_corpus(tokenizer, sources, LENGTH, replace(mixture, functions=0), "0")
    assert alone == encode_plain(tokenizer, sources, LENGTH)


def test_plain_sequences_are_the_files(tokenizer: Tokenizer, sources: list[Source]) -> None:
    text = "".join(tokenizer.decode(ids) for ids in encode_plain(tokenizer, sources, LENGTH))
    assert text == "".join(source.text for source in sources)


def test_a_seed_fixes_the_sequences(tokenizer: Tokenizer, sources: list[Source]) -> None:
    first, again, other = (encode_corpus(tokenizer, sources, LENGTH, Mixture(), seed) for seed in ("0", "0", "1"))
    assert first == again
    assert first != other


def test_rows_hold_every_sequence_whole_and_once(tokenizer: Tokenizer, sources: list[Source]) -> None:
    sequences = encode_corpus(tokenizer, sources, LENGTH, Mixture(), "0")
    rows = pack(sequences, LENGTH, "0")
    assert rows.shape[1] == LENGTH
    found: list[list[int]] = []
    for row in rows.tolist():
        ids = row[: row.index(PADDING)] if PADDING in row else row
        assert set(row[len(ids) :]) <= {PADDING}
        starts = [at for at, token in enumerate(ids) if token == tokenizer.bos_id]
        found += [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert sorted(found) == sorted(sequences)


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(2, 100, 1000).tolist()
    rows = pack([[1] * length for length in lengths], 100, "0")
    assert len(rows) <= 1.06 * sum(lengths) / 100


def test_rows_begin_with_short_sequences_too() -> None:
    """Laid in largest first, so without shuffling no row would begin with a short one, as every prompt does."""
    rows = pack([[1, *[5] * (9 if i % 2 else 4)] for i in range(100)], 15, "0")
    assert 10 < sum(row[5] == 1 for row in rows.tolist()) < 40


def test_rows_come_back_from_disk(tmp_path: Path) -> None:
    rows = np.array([[1, 65535], [2, 0]], dtype=np.uint16)
    write_rows(tmp_path / "rows.npy", rows)
    back = read_rows(tmp_path / "rows.npy")
    assert isinstance(back, np.memmap)
    assert back.dtype == np.uint16
    assert back.tolist() == rows.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]
