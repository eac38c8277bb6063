"""From documents to rows: whole sequences, each once, hardly any padding, the mixture that was asked for."""

from __future__ import annotations

import ast
import os
import random
import re
from collections import Counter
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
)

LENGTH = 129
EVERYTHING = Mixture(dialogs=0.3, keys=0.2)
NAMES = ("bisect.py", "heapq.py", "textwrap.py", "shutil.py")


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return [Source(name, (Path(os.__file__).parent / name).read_text(encoding="utf-8")) for name in NAMES]


@pytest.fixture(scope="module")
def library(sources: list[Source]) -> list[Source]:
    """Enough files for several kinds of documents."""
    folder = Path(os.__file__).parent
    names = [path.name for path in sorted(folder.glob("[a-f]*.py"))[:40]]
    return [*sources, *(Source(name, (folder / name).read_text(encoding="utf-8")) for name in names)]


def is_gap(tokenizer: Tokenizer, ids: list[int]) -> bool:
    return tokenizer.prefix_id in ids


def shown(ids: list[int]) -> list[int]:
    """The ids a model reads, whether it is to learn them or not."""
    return [~token if token < 0 else token for token in ids]


def kind(tokenizer: Tokenizer, ids: list[int]) -> str:
    text = tokenizer.decode(shown(ids))
    return "dialogs" if text.startswith("[INST]") else "keys" if "assert my_function() ==" in text else "code"


def test_sequences_fit_their_rows_and_begin_with_bos(tokenizer: Tokenizer, sources: list[Source]) -> None:
    for ids in map(shown, encode_corpus(tokenizer, sources, LENGTH, EVERYTHING, "0")):
        assert 2 <= len(ids) <= LENGTH
        assert ids.index(tokenizer.bos_id) == 0
        assert ids.count(tokenizer.bos_id) == 1
        assert PADDING not in ids


def test_gaps_are_as_many_as_asked_for(tokenizer: Tokenizer, sources: list[Source]) -> None:
    def parts(mixture: Mixture) -> tuple[float, float]:
        found = list(encode_corpus(tokenizer, sources, LENGTH, mixture, "0"))
        gaps = [ids for ids in found if is_gap(tokenizer, ids)]
        return len(gaps) / len(found), sum(ids[2] == tokenizer.suffix_id for ids in gaps) / max(1, len(gaps))

    gaps, suffix_first = parts(Mixture(infilling=0.5))
    assert abs(gaps - 0.5) < 0.1
    assert abs(suffix_first - 0.5) < 0.15
    assert parts(Mixture(infilling=0)) == (0, 0)
    gaps, suffix_first = parts(Mixture(infilling=1, suffix_first=1))
    assert gaps > 0.97  # a document that no longer fits stays whole
    assert suffix_first > 0.97


def test_gaps_of_lines_are_as_many_as_asked_for(tokenizer: Tokenizer) -> None:
    document = Document("ab\ncd\nef\ngh\n", ends=True)

    def end_at_a_line(line_gaps: float) -> float:
        mixture = Mixture(infilling=1, suffix_first=0, line_gaps=line_gaps)
        found = [encode_document(tokenizer, document, 100, mixture, random.Random(seed)) for seed in range(400)]
        suffixes = [ids[ids.index(tokenizer.suffix_id) + 1 : ids.index(tokenizer.middle_id)] for ids in found]
        return sum(tokenizer.decode_infilling(ids)[:1] in ("", "\n") for ids in suffixes) / len(found)

    assert end_at_a_line(1) == 1
    by_chance = end_at_a_line(0)
    assert by_chance < 0.6
    assert abs(end_at_a_line(0.5) - (1 + by_chance) / 2) < 0.1


@pytest.mark.parametrize("length", [LENGTH, 400])
@pytest.mark.parametrize("mixture", [EVERYTHING, Mixture(dialogs=0.05), Mixture(keys=0.5)])
def test_shares_are_of_the_tokens_that_fit(
    length: int, mixture: Mixture, tokenizer: Tokenizer, library: list[Source]
) -> None:
    """Counted in what comes out: in short rows long dialogs have been left out, in long ones keys take far more tokens
    than functions."""
    tokens: Counter[str] = Counter()
    for ids in encode_corpus(tokenizer, library, length, mixture, "0"):
        tokens[kind(tokenizer, ids)] += len(ids)
    assert tokens.total() > 5000
    assert tokens["dialogs"] / tokens.total() == pytest.approx(mixture.dialogs, abs=0.02)
    assert tokens["keys"] / tokens.total() == pytest.approx(mixture.keys, abs=0.02)


def test_no_text_comes_twice_in_a_pass(tokenizer: Tokenizer) -> None:
    """Each function names itself, whatever becomes of it."""
    files = [
        "\n\n".join(f'def name_{n}_{m}_(x):\n    """Return x."""\n    y = x\n    return y' for m in range(20)) + "\n"
        for n in range(30)
    ]
    sources = [Source(str(n), text) for n, text in enumerate(files)]
    seen: Counter[str] = Counter()
    for ids in encode_corpus(tokenizer, sources, 200, replace(EVERYTHING, infilling=0), "0"):
        text = tokenizer.decode(shown(ids)).rpartition("[/INST]")[2]
        seen.update(re.findall(r"def (name_\d+_\d+_)\(x\):\n", text))
    assert len(seen) > 200
    assert max(seen.values()) == 1


def test_of_a_dialog_the_answer_alone_is_learned(tokenizer: Tokenizer, library: list[Source]) -> None:
    seen = 0
    for ids in encode_corpus(tokenizer, library, LENGTH, EVERYTHING, "0"):
        learned = [token for token in ids if token >= 0]
        if kind(tokenizer, ids) != "dialogs":
            assert learned == ids
            continue
        seen += 1
        assert ids[: len(ids) - len(learned)] == [token for token in ids if token < 0]  # the question is all before
        assert tokenizer.decode(shown(ids)[: len(ids) - len(learned)]).endswith("[/INST]")
        assert learned[-1] == tokenizer.eos_id
        ast.parse(tokenizer.decode(learned).strip())
    assert seen > 5
    for ids in encode_corpus(tokenizer, library, LENGTH, replace(EVERYTHING, answers_only=False), "0"):
        assert min(ids) > 0


def test_a_key_that_fits_in_no_row_is_named(tokenizer: Tokenizer, sources: list[Source]) -> None:
    with pytest.raises(ValueError, match="rows of 40 tokens have no room for a key"):
        list(encode_corpus(tokenizer, sources, 40, Mixture(keys=0.5), "0"))


@pytest.mark.parametrize("parts", [{"keys": 1.5}, {"infilling": -0.1}, {"keys": 0.6, "dialogs": 0.6}])
def test_a_mixture_of_more_than_all_is_refused(parts: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="part of 1"):
        Mixture(**parts)  # type: ignore[arg-type]


def test_a_document_that_no_longer_fits_with_a_gap_stays_whole(tokenizer: Tokenizer) -> None:
    document = Document("x = 1\n" * 20, ends=True)
    plain = tokenizer.encode(document.text, bos=True, eos=True)
    for seed in range(10):
        assert encode_document(tokenizer, document, len(plain), Mixture(infilling=1), random.Random(seed)) == plain
        assert encode_document(tokenizer, document, 2 * len(plain), Mixture(infilling=1), random.Random(seed)) != plain


def test_functions_are_documents_that_end(tokenizer: Tokenizer, sources: list[Source]) -> None:
    mixture = Mixture(infilling=0, functions=1)
    texts = {
        tokenizer.decode(ids)
        for ids in encode_corpus(tokenizer, sources, LENGTH, mixture, "0")
        if ids[-1] == tokenizer.eos_id
    }
    assert any(text.startswith("def heappush(heap, item):") and text.endswith("len(heap)-1)\n") for text in texts)
    alone = encode_corpus(tokenizer, sources, LENGTH, replace(mixture, functions=0), "0")
    assert list(alone) == [ids for ids, _ in encode_plain(tokenizer, sources, LENGTH)]


def test_plain_sequences_are_the_files(tokenizer: Tokenizer, sources: list[Source]) -> None:
    found = list(encode_plain(tokenizer, sources, LENGTH))
    text = "".join(source.text for source in sources)
    assert "".join(tokenizer.decode(ids) for ids, _ in found) == text
    assert sum(size for _, size in found) == len(text.encode())


def test_a_seed_fixes_the_sequences(tokenizer: Tokenizer, sources: list[Source]) -> None:
    first, again, other = (
        list(encode_corpus(tokenizer, sources, LENGTH, EVERYTHING, seed)) for seed in ("0", "0", "1")
    )
    assert first == again
    assert first != other


def test_rows_hold_every_sequence_whole_and_once(tokenizer: Tokenizer, sources: list[Source]) -> None:
    sequences = list(map(shown, encode_corpus(tokenizer, sources, LENGTH, EVERYTHING, "0")))
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
