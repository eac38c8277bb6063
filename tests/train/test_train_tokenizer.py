"""The tokenizers made here have the published settings, layout and traps, at any size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from fixtures_text import training_texts
from llama.train.tokenizer import train_tokenizer

LAST_SIXTEEN = [
    "▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT",
    "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>",
    "▁<EOT>▁<EOT>", "▁<EOT>▁<EOT>▁<EOT>", "▁<EOT>▁<EOT>▁<EOT>▁<EOT>", "▁<EOT>▁<EOT>▁<EOT>▁<EOT>▁<EOT>",
    "▁<EOT>▁<EOT>▁<EOT>▁<EOT>▁<EOT>▁<EOT>",
]  # fmt: skip


@pytest.fixture(scope="module", params=[512, 2000])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SentencePieceProcessor:
    """SentencePiece itself, without our Tokenizer's care, at a size with almost no room for merges and a roomy one."""
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    train_tokenizer(training_texts(), request.param, path)
    found = SentencePieceProcessor(model_file=str(path))
    assert found.vocab_size() == request.param
    return found


def pieces(model: SentencePieceProcessor) -> list[str]:
    return [model.id_to_piece(i) for i in range(model.vocab_size())]


def test_layout_is_the_published_one(model: SentencePieceProcessor) -> None:
    found = pieces(model)
    assert found[:3] == ["<unk>", "<s>", "</s>"]
    assert found[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert found[-16:] == LAST_SIXTEEN
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert len(set(found)) == len(found)
    scores = [model.get_score(i) for i in range(259, model.vocab_size())]
    assert min(scores[:-16]) > scores[-16]
    assert scores[-16:] == sorted(scores[-16:], reverse=True)


def test_user_text_reaches_every_mark_by_merging(model: SentencePieceProcessor) -> None:
    for mark in LAST_SIXTEEN:
        spelled = mark.replace("▁", " ")
        wanted = model.vocab_size() - 16 + LAST_SIXTEEN.index(mark)
        assert model.encode(spelled.removeprefix(" ")) == [wanted]  # the implied space makes it whole
        assert model.encode("0" + spelled)[-1] == wanted
        assert not model.is_control(wanted)
        assert not model.is_unknown(wanted)


def test_anchor_is_one_piece_whatever_surrounds_it(model: SentencePieceProcessor) -> None:
    """Infilling text is encoded after ☺ and two ids are dropped, so nothing may merge with it."""
    for after in ("", "def f", " x", "☺", "\n"):
        assert model.encode("☺" + after, out_type=str)[:2] == ["▁", "☺"]


def test_anchor_and_digits_never_merge_however_common_their_neighbours(tmp_path: Path) -> None:
    texts = [*training_texts(), *["x = 2026 ☺def year():\n    return 2026\n"] * 5000]
    train_tokenizer(texts, 800, tmp_path / "tokenizer.model")
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert "☺" in model.encode("x = 1 ☺def year", out_type=str)
    assert model.encode("x2026", out_type=str)[-4:] == ["2", "0", "2", "6"]


def test_settings_show_in_what_is_encoded(model: SentencePieceProcessor) -> None:
    assert model.encode("\n")[-1] == 13  # a newline is its byte, with the published id
    assert "▁▁▁▁" in model.encode("x\n    y", out_type=str)
    assert model.encode("漢", out_type=str)[1:] == ["<0xE6>", "<0xBC>", "<0xA2>"]


def test_indents_are_multiples_of_four_columns(model: SentencePieceProcessor) -> None:
    """Guards against training with an implied space before each line, which makes pieces of 5 and 9 columns instead."""
    learned = sorted(piece for piece in pieces(model)[259:] if set(piece) == {"▁"})
    assert {"▁" * 4, "▁" * 8} <= set(learned)
    assert "▁" * 5 not in learned
    assert model.encode("a\n        b", out_type=str) == ["▁a", "<0x0A>", "▁" * 8, "b"]


@given(text=st.text() | st.text(alphabet=" \t\n☺<EOT>PRSUFMID☂ﬁ."))
def test_every_text_survives(model: SentencePieceProcessor, text: str) -> None:
    """Nothing is normalised or dropped; `▁` itself is a space to SentencePiece."""
    assert model.decode(model.encode(text)) == text.replace("▁", " ")


def test_infilling_and_step_pieces_are_optional(tmp_path: Path) -> None:
    def last_pieces(**options: bool) -> list[str]:
        train_tokenizer(training_texts(), 600, tmp_path / "tokenizer.model", **options)
        model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        assert model.vocab_size() == 600
        return pieces(model)[-16:]

    assert last_pieces(step=True) == [*LAST_SIXTEEN[:-1], "<step>"]
    assert set(last_pieces(infilling=False)).isdisjoint(LAST_SIXTEEN)
    with_step = last_pieces(infilling=False, step=True)
    assert set(with_step).isdisjoint(LAST_SIXTEEN)
    assert with_step[-1] == "<step>"


def test_same_texts_give_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_tokenizer(training_texts(), 800, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("vocab_size", [200, 100_000])
def test_impossible_sizes_are_refused_and_leave_no_file(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match="change vocab_size or the texts"):
        train_tokenizer(training_texts()[:1], vocab_size, tmp_path / "tokenizer.model")
    assert list(tmp_path.iterdir()) == []


def test_marks_are_reachable_even_where_other_merges_compete(tmp_path: Path) -> None:
    """Texts in which `UF`, `<S`, `RE>` and the like are the best merges there are."""
    rng = random.Random(0)
    parts = ["UF", "<S", "RE>", "EO", "T>", "<P", "ID>", "S", "P", "M", "E", "<", ">", " ", "I", "D", "O"]
    texts = ["".join(rng.choices(parts, k=6)) for _ in range(2000)]
    train_tokenizer(texts, 380, tmp_path / "tokenizer.model")
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for i, mark in enumerate(LAST_SIXTEEN[7:11]):
        assert model.encode(mark.removeprefix("▁")) == [380 - 9 + i]
