"""Prompts, id by id: against the formats put together by hand from sentencepiece's ids, and the published vectors.

The published tokenizer can't be had here. But the few pieces that its documented id vectors use are known, so a
vocabulary is made that has just those, at their published ids: what our prompts make of it must be the vectors.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from llama.prompts import SPECIAL_TAGS, Message, Prompt, completion, dialog, infilling
from llama.tokenizer import Tokenizer

contents = st.text(max_size=20).filter(lambda s: "▁" not in s and "<" not in s and "[" not in s)


def sp(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.sp_model.encode(text)
    return ids


def middle(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids without the implied space: what follows a piece of its own."""
    return sp(tokenizer, "☺" + text)[2:]


def written(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The pieces side by side, so that the implied spaces can be seen."""
    return "".join(tokenizer.token_piece(i) for i in ids)


def say(role: Any, content: str) -> Message:
    return Message(role=role, content=content)


# --- completion and infilling ------------------------------------------------------------------------------------


def test_completion_is_bos_and_the_text(tokenizer: Tokenizer) -> None:
    assert completion(tokenizer, "def f") == Prompt([1, *sp(tokenizer, "def f")], frozenset({2}), continues=True)


def test_what_follows_an_empty_prompt_stands_alone(tokenizer: Tokenizer) -> None:
    """Then the first piece's space is the implied one, no part of the text."""
    assert completion(tokenizer, "") == Prompt([1], frozenset({2}), continues=False)


@given(prefix=contents, suffix=contents)
def test_infilling_orders_psm_and_spm(tokenizer: Tokenizer, prefix: str, suffix: str) -> None:
    pre, suf, mid, eot = (tokenizer.sp_model.piece_to_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID", "EOT"))
    before, after = sp(tokenizer, prefix), middle(tokenizer, suffix)
    ends = frozenset({eot, 2})
    assert infilling(tokenizer, prefix, suffix) == Prompt([1, pre, *before, suf, *after, mid], ends)
    assert infilling(tokenizer, prefix, suffix, suffix_first=True) == Prompt([1, pre, suf, *after, mid, *before], ends)


def test_marks_stand_where_text_would_swallow_them(tokenizer: Tokenizer) -> None:
    """A template of text, `<PRE> {p} <SUF>{s} <MID>`, loses SUF before a CRLF; put in by id, each mark is there once,
    and a mark that the user wrote is none."""
    for prefix, suffix in (("x = ", "\r\ny"), ("a\n", "\n\n"), (" <SUF> b", " <MID> <PRE> <EOT>c"), ("", "")):
        for suffix_first in (False, True):
            ids = infilling(tokenizer, prefix, suffix, suffix_first).tokens
            marks = [i for i in ids if tokenizer.token_piece(i) in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")]
            assert [tokenizer.token_piece(i) for i in marks] == ["▁<PRE>", "▁<SUF>", "▁<MID>"]


def test_a_tokenizer_without_marks_cant_infill(plain_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"can't infill.*7B, 13B or 70B"):
        infilling(plain_tokenizer, "a", "b")


# --- [INST] ------------------------------------------------------------------------------------------------------


def test_inst_is_one_question_after_bos(tokenizer: Tokenizer) -> None:
    prompt = dialog(tokenizer, [say("user", "  Hello \n")])
    assert prompt == Prompt([1, *sp(tokenizer, "[INST] Hello [/INST]")], frozenset({2}), continues=False)
    assert written(tokenizer, prompt.tokens) == "<s>▁[INST]▁Hello▁[/INST]"


def test_inst_puts_each_finished_turn_between_bos_and_eos(tokenizer: Tokenizer) -> None:
    turns = [say("user", "a\n"), say("assistant", " b "), say("user", "c"), say("assistant", "d"), say("user", "\te")]
    assert dialog(tokenizer, turns).tokens == [
        *(1, *sp(tokenizer, "[INST] a [/INST] b "), 2),
        *(1, *sp(tokenizer, "[INST] c [/INST] d "), 2),
        *(1, *sp(tokenizer, "[INST] e [/INST]")),
    ]
    assert written(tokenizer, dialog(tokenizer, turns).tokens).startswith("<s>▁[INST]▁a▁[/INST]▁b▁</s><s>")


def test_inst_merges_the_system_message_into_the_first_question(tokenizer: Tokenizer) -> None:
    turns = [say("system", "Be brief."), say("user", "Hi")]
    text = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    assert dialog(tokenizer, turns).tokens == [1, *sp(tokenizer, text)]
    turns += [say("assistant", "Yes?"), say("user", "Bye")]
    first, last = sp(tokenizer, f"{text} Yes? "), sp(tokenizer, "[INST] Bye [/INST]")
    assert dialog(tokenizer, turns).tokens == [1, *first, 2, 1, *last]


def test_inst_strips_the_first_question_as_a_whole(tokenizer: Tokenizer) -> None:
    """System message and all, as the published code does: what stands within it stays."""
    turns = [say("system", " s "), say("user", "  Hi ")]
    assert dialog(tokenizer, turns).tokens == [1, *sp(tokenizer, "[INST] <<SYS>>\n s \n<</SYS>>\n\n  Hi [/INST]")]


# --- <step> ------------------------------------------------------------------------------------------------------


def test_turns_are_headers_bodies_and_steps(step_tokenizer: Tokenizer) -> None:
    """Each piece encoded on its own, so each begins with the implied space."""
    t = step_tokenizer
    step = t.sp_model.piece_to_id("<step>")
    prompt = dialog(t, [say("system", " s "), say("user", "a"), say("assistant", "b\n"), say("user", "c")])
    expected = [1]
    for role, content in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")):
        expected += [*sp(t, f" Source: {role}"), *sp(t, f"\n\n {content}"), step]
    expected += [*sp(t, " Source: assistant\nDestination: user"), *sp(t, "\n\n ")]
    assert prompt == Prompt(expected, frozenset({step, 2}), continues=False)


def test_turns_leave_out_the_body_of_an_empty_message(step_tokenizer: Tokenizer) -> None:
    t = step_tokenizer
    pieces = written(t, dialog(t, [say("system", " \n"), say("user", "Hi")]).tokens)
    reply = "▁▁Source:▁assistant<0x0A>Destination:▁user▁<0x0A><0x0A>▁"
    assert pieces == f"<s>▁▁Source:▁system<step>▁▁Source:▁user▁<0x0A><0x0A>▁Hi<step>{reply}"


def test_d12_history_with_a_destination_gives_the_same_prompt(tokenizer: Tokenizer, step_tokenizer: Tokenizer) -> None:
    turns = [say("user", "a"), say("assistant", "b"), say("user", "c")]
    routed = copy.deepcopy(turns)
    for message, destination in zip(routed, ("assistant", "user", "assistant"), strict=True):
        message["destination"] = destination
    for t in (tokenizer, step_tokenizer):
        assert dialog(t, routed) == dialog(t, turns)
    text = written(step_tokenizer, dialog(step_tokenizer, routed).tokens)
    assert text.count("Destination") == 1
    assert text.index("Destination") > text.rindex("<step>")


# --- what can't be a dialog --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["system"],
        ["assistant"],
        ["user", "assistant"],
        ["user", "user"],
        ["system", "assistant"],
        ["user", "system", "user"],
        ["system", "system", "user"],
    ],
)
def test_d11_roles_out_of_order_are_listed(tokenizer: Tokenizer, step_tokenizer: Tokenizer, roles: list[str]) -> None:
    for t in (tokenizer, step_tokenizer):
        with pytest.raises(ValueError, match="optional system message, then user and assistant in turn") as error:
            dialog(t, [say(role, "x") for role in roles])
        assert repr(roles) in str(error.value)


@pytest.mark.parametrize("wrong", [{"role": "tool", "content": "x"}, {"role": "user"}, {"content": "x"}])
def test_d11_a_message_that_cant_be_is_named(tokenizer: Tokenizer, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"message 2 of the dialog is .*role"):
        dialog(tokenizer, [say("user", "a"), say("assistant", "b"), wrong])


@pytest.mark.parametrize("tag", SPECIAL_TAGS)
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_d10_special_tags_are_refused_in_every_message(
    tokenizer: Tokenizer, step_tokenizer: Tokenizer, tag: str, where: int
) -> None:
    turns = [say("system", "s"), say("user", "a"), say("assistant", "b"), say("user", "c")]
    turns[where]["content"] = f"x{tag}y"
    for t in (tokenizer, step_tokenizer):
        with pytest.raises(ValueError, match="special tags are not allowed"):
            dialog(t, turns)


def test_d10_the_tags_are_the_published_ones() -> None:
    assert set(SPECIAL_TAGS) == {"[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>"}


# --- the published id vectors ------------------------------------------------------------------------------------

PUBLISHED_PIECES = {
    13: "<0x0A>", 294: "as", 518: "▁[", 736: "▁return", 822: "▁def", 851: "▁str", 921: "▁x", 1121: "▁result",
    1599: "▁->", 1678: "▁▁▁", 1788: "▁system", 3349: "▁remove", 5464: "non", 6324: "▁Hi", 7562: "▁Source",
    9995: '▁"""', 15043: "▁Hello", 18869: "cii", 25580: "INST", 29871: "▁", 29879: "s", 29897: ")", 29898: "(",
    29901: ":", 29914: "/", 29918: "_", 29962: "]",
    32007: "▁<PRE>", 32008: "▁<SUF>", 32009: "▁<MID>", 32010: "▁<EOT>",
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """32016 pieces: those of the vectors at their ids, the letters and merges that lead to them, and filling."""
    merges = {piece[:n] for piece in PUBLISHED_PIECES.values() if piece[0] != "<" for n in range(2, len(piece))}
    merges.discard("ci")
    letters = set("".join(PUBLISHED_PIECES.values())) | {"☺", "ii"}
    extra = sorted((merges | letters) - set(PUBLISHED_PIECES.values()))
    pieces: dict[int, str] = {0: "<unk>", 1: "<s>", 2: "</s>"} | {3 + b: f"<0x{b:02X}>" for b in range(256)}
    pieces |= PUBLISHED_PIECES
    pieces |= dict(zip((i for i in range(259, 32000) if i not in pieces), extra, strict=False))
    model = ModelProto()
    model.trainer_spec.model_type = TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    for i in range(32016):
        piece = pieces.get(i, f"unused{i}")
        added = model.pieces.add(piece=piece, score=-float(i))
        if i < 3:
            added.type = added.CONTROL if i else added.UNKNOWN
        elif i < 259:
            added.type = added.BYTE
        elif piece == "☺":
            added.type = added.USER_DEFINED
        elif set(piece) == {"▁"}:
            added.score = -1e5 - len(piece)  # a word takes its space before spaces join each other
    model.trainer_spec.vocab_size = len(model.pieces)
    path: Path = tmp_path_factory.mktemp("published") / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return Tokenizer(path)


def test_published_ids_of_an_infilling_prompt(published: Tokenizer) -> None:
    prefix, suffix = 'def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n"
    before = [822, 3349, 29918, 5464, 29918, 294, 18869, 29898, 29879, 29901, 851, 29897, 1599, 851, 29901, 13]
    before += [1678, 9995, 29871]
    after = [13, 1678, 736, 1121, 13]
    assert infilling(published, prefix, suffix).tokens == [1, 32007, *before, 32008, *after, 32009]
    assert infilling(published, prefix, suffix, suffix_first=True).tokens == [1, 32007, 32008, *after, 32009, *before]


def test_published_ids_of_a_dialog(published: Tokenizer) -> None:
    question = [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]
    assert dialog(published, [say("user", "Hello")]).tokens == question
    turns = [say("user", "Hello"), say("assistant", "Hi"), say("user", "Hello")]
    assert dialog(published, turns).tokens == [*question, 6324, 29871, 2, *question]


def test_published_ids_of_a_turn(published: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "step_id", 32015)
    ids = dialog(published, [say("system", "Hi"), say("user", "Hello")]).tokens
    assert ids[:10] == [1, 29871, 7562, 29901, 1788, 29871, 13, 13, 6324, 32015]


def test_published_ids_decode_to_an_indented_line(published: Tokenizer) -> None:
    """A newline, and four spaces before the `return`."""
    assert published.decode_infilling([13, 1678, 736, 921]) == "\n    return x"
    assert published.decode_infilling([1678, 736, 921]) == "    return x"
    assert published.decode([1678, 736, 921]) == "   return x"  # one lost: why an answer is decoded in its context
