"""Text to ids and back, against sentencepiece itself, transformers, and plain definitions of what streaming means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import CodeLlamaTokenizer

from fixtures_text import VOCABULARY, characters_of, cut_before_the_first_complete
from llama.tokenizer import Detokenizer, StopStrings, Tokenizer

SPELLED_MARKS = ["<PRE>", "<SUF>", "<MID>", "<EOT>", "<EOT> <EOT>", "<EOT>" + 5 * " <EOT>"]  # ▁ is an implied space
SNIPPETS = ["def f(x):", "return x", "    ", "  ", " ", "\t", "\n", "\r\n", "0123", "'''", "é", "漢字", "🙂", "\u0301"]
TRAPS = [*SPELLED_MARKS, " <PRE>", " <EOT>", "<EOT><EOT>", "<step>", "<s>", "</s>", "<unk>", "☺", "\0", "[INST]"]

code = st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join)
texts = st.one_of(
    code,
    st.text(max_size=30),
    st.lists(st.sampled_from([*SNIPPETS, *TRAPS]) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join),
)


@pytest.fixture(params=["tokenizer", "plain_tokenizer", "step_tokenizer"], scope="session")
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of published tokenizer."""
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """By the pieces of the model file."""
    sp = tokenizer.sp_model
    marks = {i for i in range(len(sp)) if sp.id_to_piece(i).replace("▁<EOT>", "") == ""}
    marks |= {i for i in range(len(sp)) if sp.id_to_piece(i) in ("▁<PRE>", "▁<MID>", "▁<SUF>", "<step>")}
    return marks | {i for i in range(len(sp)) if sp.is_control(i)}


# --- whole texts -------------------------------------------------------------------------------------------------


@given(text=texts)
def test_encode_then_decode_is_the_same_text(any_tokenizer: Tokenizer, text: str) -> None:
    """All but `▁` itself, which to SentencePiece is a space."""
    assert any_tokenizer.decode(any_tokenizer.encode(text, bos=True, eos=True)) == text.replace("▁", " ")


@given(text=texts)
def test_infilling_text_keeps_its_first_space_both_ways(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode_infilling(text)
    assert any_tokenizer.decode_infilling(ids) == text.replace("▁", " ")
    if text and not special_ids(any_tokenizer).intersection(any_tokenizer.sp_model.encode("☺" + text)):
        assert ids == any_tokenizer.sp_model.encode("☺" + text)[2:]


def test_infilling_text_has_no_implied_space(tokenizer: Tokenizer) -> None:
    """encode makes the indentation of a line one space deeper; encode_infilling must not."""
    assert "".join(map(tokenizer.token_piece, tokenizer.encode("    return", bos=False, eos=False))) == "▁▁▁▁▁return"
    assert "".join(map(tokenizer.token_piece, tokenizer.encode_infilling("    return"))) == "▁▁▁▁return"
    assert "".join(map(tokenizer.token_piece, tokenizer.encode_infilling("return"))) == "return"


@given(text=texts, bos=st.booleans(), eos=st.booleans())
def test_text_without_marks_is_encoded_as_by_sentencepiece(
    any_tokenizer: Tokenizer, text: str, bos: bool, eos: bool
) -> None:
    ids = any_tokenizer.sp_model.encode(text)
    assume(not special_ids(any_tokenizer).intersection(ids))
    assert any_tokenizer.encode(text, bos, eos) == [1] * bos + ids + [2] * eos


@given(prefix=code.filter(bool), suffix=code.filter(bool), suffix_first=st.booleans())
def test_infilling_ids_are_transformers(
    tokenizer: Tokenizer, transformers_tokenizer: CodeLlamaTokenizer, prefix: str, suffix: str, suffix_first: bool
) -> None:
    before, after = tokenizer.encode(prefix, bos=False, eos=False), tokenizer.encode_infilling(suffix)
    pre, suf, mid = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id
    mine = [1, pre, suf, *after, mid, *before] if suffix_first else [1, pre, *before, suf, *after, mid]
    assert transformers_tokenizer(prefix, suffix=suffix, suffix_first=suffix_first).input_ids == mine


@pytest.fixture(scope="session")
def transformers_tokenizer(tokenizer_path: Path) -> CodeLlamaTokenizer:
    """From the same file. Infilling puts a space before the prefix by itself; `add_prefix_space`, which transformers 5
    applies to the suffix too, must be off to give the published ids."""
    return CodeLlamaTokenizer.from_pretrained(tokenizer_path.parent, add_prefix_space=False)


# --- marks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", SPELLED_MARKS)
@pytest.mark.parametrize("before", ["", "x = 1\n y"])
def test_d9_a_mark_in_user_text_stays_text(tokenizer: Tokenizer, mark: str, before: str) -> None:
    """The trap is there: sentencepiece alone gives the special id. Ours spells it out."""
    text = f"{before} {mark} z" if before else mark
    special = special_ids(tokenizer)
    assert special.intersection(tokenizer.sp_model.encode(text))
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert not special.intersection(ids)
    assert tokenizer.decode(ids) == text


def test_d9_a_step_in_user_text_stays_text(step_tokenizer: Tokenizer) -> None:
    assert step_tokenizer.step_id in step_tokenizer.sp_model.encode("a<step>b")
    for ids in (step_tokenizer.encode("a<step>b", False, False), step_tokenizer.encode_infilling("a<step>b")):
        assert step_tokenizer.step_id not in ids
    assert step_tokenizer.decode(step_tokenizer.encode("a<step>b", False, False)) == "a<step>b"


@given(text=texts)
def test_d9_no_text_gives_a_special_id(any_tokenizer: Tokenizer, text: str) -> None:
    special = special_ids(any_tokenizer)
    assert not special.intersection(any_tokenizer.encode(text, bos=False, eos=False))
    assert not special.intersection(any_tokenizer.encode_infilling(text))


# --- numbers and errors ------------------------------------------------------------------------------------------


def test_ids_are_looked_up_by_piece(tokenizer: Tokenizer, step_tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.sp_model.id_to_piece(i) for i in range(VOCABULARY)]
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (VOCABULARY, 1, 2, -1)
    marks = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id
    assert marks == tuple(pieces.index(f"▁<{name}>") for name in ("PRE", "SUF", "MID", "EOT"))
    assert tokenizer.can_infill
    assert [tokenizer.token_piece(i) for i in range(VOCABULARY)] == pieces
    assert step_tokenizer.step_id is not None
    assert step_tokenizer.token_piece(step_tokenizer.step_id) == "<step>"
    assert all(tokenizer.byte_of(pieces.index(f"<0x{b:02X}>")) == bytes([b]) for b in range(256))
    assert tokenizer.byte_of(pieces.index("☺")) == b""


def test_ids_that_a_tokenizer_lacks_are_none(tokenizer: Tokenizer, plain_tokenizer: Tokenizer) -> None:
    """sentencepiece answers unk, 0, for them, which must not pass for an id."""
    plain = plain_tokenizer
    assert plain.sp_model.piece_to_id("▁<PRE>") == 0
    assert (plain.prefix_id, plain.middle_id, plain.suffix_id, plain.eot_id) == (None,) * 4
    assert not plain.can_infill
    assert plain.step_id is tokenizer.step_id is None


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer at .*absent\.model.* tokenizer\.model"):
        Tokenizer(tmp_path / "absent.model")
    with pytest.raises(ValueError, match="there is no tokenizer at"):
        Tokenizer(tmp_path)
    for content in (b"", b"<html>Access denied</html>"):
        wrong = tmp_path / "tokenizer.model"
        wrong.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
            Tokenizer(wrong)


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    """Half of a surrogate pair: from JSON, or from a command line that isn't UTF-8."""
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("caf\udce9", bos=True, eos=False)


# --- text as it arrives ------------------------------------------------------------------------------------------

byte_runs = st.lists(
    st.sampled_from([0x80, 0xA0, 0xBF, 0xC3, 0xE4, 0xBD, 0xED, 0xF0, 0x9F, 0xF4, 0x90, 0xFF]), max_size=8
)
ids_of_any_kind = st.lists(
    st.one_of(
        st.integers(0, VOCABULARY - 1).map(lambda i: [i]),
        byte_runs.map(lambda run: [3 + byte for byte in run]),  # the bytes are pieces 3 to 258
        st.sampled_from([[13], [0], [1], [2]]),
    ),
    max_size=12,
).map(lambda parts: [i for part in parts for i in part])


def streamed(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(context=code.filter(bool), ids=ids_of_any_kind)
def test_streamed_text_is_the_difference_from_its_context(tokenizer: Tokenizer, context: str, ids: list[int]) -> None:
    """Whatever the ids are, bytes that are no UTF-8 included: what sentencepiece's text of all has more."""
    before = tokenizer.encode(context, bos=True, eos=False)
    whole = tokenizer.sp_model.decode(before + ids)
    assert whole.startswith(context)
    assert "".join(streamed(Detokenizer(tokenizer), ids)) == whole[len(context) :]


@given(ids=ids_of_any_kind)
def test_streamed_text_that_stands_alone_is_sentencepieces(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(Detokenizer(tokenizer, continues=False), ids)) == tokenizer.sp_model.decode(ids)


@given(text=texts, data=st.data())
def test_a_text_cut_anywhere_streams_to_its_rest(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text, bos=True, eos=False)
    at = data.draw(st.integers(2, len(ids)) if len(ids) > 1 else st.just(len(ids)))
    whole, before = tokenizer.sp_model.decode(ids), tokenizer.sp_model.decode(ids[:at])
    assume(len(ids) > 1)
    assume(whole.startswith(before))  # not within a character
    assert "".join(streamed(Detokenizer(tokenizer), ids[at:])) == whole[len(before) :]


@given(text=texts)
def test_each_token_gives_the_characters_it_completes_and_no_half(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_infilling(text)
    pieces = [tokenizer.byte_of(i) or tokenizer.token_piece(i).replace("▁", " ").encode() for i in ids]
    assert streamed(Detokenizer(tokenizer), ids) == [*characters_of(pieces), ""]


def test_bytes_that_are_no_character_come_out_as_sentencepiece_has_them(tokenizer: Tokenizer) -> None:
    """Also where a run of bytes breaks off, and where the next begins with it."""
    broken = [b"\xe4", b"\xe4\xbd", b"\xe4\xe4\xbd\xa0", b"\xff\xc3\xa9", b"\xf0\x9f\x99\xc3\xa9", b"\xed\xa0\x80"]
    for run in broken:
        ids = [tokenizer.sp_model.piece_to_id(f"<0x{byte:02X}>") for byte in run]
        for rest in ([], tokenizer.encode("x", False, False)):
            assert "".join(streamed(Detokenizer(tokenizer), ids + rest)) == tokenizer.sp_model.decode(ids + rest)


def test_a_character_that_breaks_off_is_held_back_no_longer(tokenizer: Tokenizer) -> None:
    first, x = tokenizer.sp_model.piece_to_id("<0xE4>"), tokenizer.sp_model.piece_to_id("x")
    assert streamed(Detokenizer(tokenizer), [first, x, x, first]) == ["", "\ufffdx", "x", "", "\ufffd"]


def test_pieces_without_text_do_not_use_up_the_implied_space(tokenizer: Tokenizer) -> None:
    ids = [1, 2, *tokenizer.encode(" x", bos=False, eos=False)]
    assert "".join(streamed(Detokenizer(tokenizer, continues=False), ids)) == tokenizer.sp_model.decode(ids) == " x"


def test_d5_a_streamed_line_keeps_its_indentation(tokenizer: Tokenizer) -> None:
    """Decoded on its own, what follows the newline has lost a space."""
    ids = tokenizer.encode_infilling("    return x")
    assert tokenizer.token_piece(ids[0]).startswith("▁")
    assert tokenizer.sp_model.decode(ids) == "   return x"
    assert "".join(streamed(Detokenizer(tokenizer), ids)) == "    return x"
    assert tokenizer.decode_infilling(ids) == "    return x"


# --- stop strings ------------------------------------------------------------------------------------------------

letters = st.text("ab\n", max_size=25)
some_stops = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


@given(text=letters, stops=some_stops, data=st.data())
def test_stop_strings_cut_alike_however_the_text_is_divided(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    search = StopStrings(stops)
    out = [search.push(part) for part in parts]
    out.append(search.flush())
    assert ("".join(out), search.found) == cut_before_the_first_complete(text, stops)
    assert search.certain == len("".join(out))


@given(text=letters, stops=some_stops)
def test_no_more_text_is_held_back_than_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    search = StopStrings(stops)
    for n in range(1, len(text) + 1):
        search.push(text[n - 1])
        if search.found:
            return
        beginnings = {stop[:i] for stop in stops for i in range(1, len(stop))}
        could_begin = max((len(b) for b in beginnings if text[:n].endswith(b)), default=0)
        assert search.certain == n - could_begin
        assert search.length == n


def test_nothing_comes_after_a_stop_string() -> None:
    search = StopStrings(["END"])
    assert [search.push("a E"), search.push("ND b"), search.push("c"), search.flush()] == ["a ", "", "", ""]
    assert search.found


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["x", ""])
