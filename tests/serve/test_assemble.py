"""The assembler: all forms of infilling become the ids of prompts.py; token healing; prompts that are too long."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama import prompts
from llama.generation import EMBEDDED, Llama
from llama.serve.assemble import Assembler, Parts, Pieces, in_turn, parse_template
from llama.tokenizer import Tokenizer

TOKENIZER = Tokenizer(EMBEDDED / "tokenizer.model")
PLAIN = Assembler(TOKENIZER, 512, heal=False)
CODE = [
    ("def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"),
    ("def f():\r\n    x = ", "\r\n    return x\r\n"),
    ("", "suffix"),
    ("    indented", ""),
    ("\tx = (", ")"),
    ("s = 'é ☺ 漢'", " # ü"),
    ("a\n", "\n\n  b"),
]


def expected(prefix: str, suffix: str, suffix_first: bool = False) -> list[int]:
    return prompts.infilling(TOKENIZER, prefix, suffix, suffix_first).tokens


# What clients send: Continue, Tabby and Ollama; llm-vscode; twinny; others without any space.
TEMPLATES = {
    "continue, tabby, ollama": lambda p, s: f"<PRE> {p} <SUF>{s} <MID>",
    "llm-vscode": lambda p, s: "<PRE> " + p + " <SUF>" + s + " <MID>",
    "twinny": lambda p, s: f"<PRE>{p} <SUF> {s} <MID>",
    "bos and a space after it": lambda p, s: f"<s><PRE> {p} <SUF>{s} <MID> ",
    "no space before <MID>": lambda p, s: f"<PRE> {p} <SUF>{s}<MID>",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("prefix", "suffix"), CODE)
def test_raw_templates_in_every_spacing(name: str, prefix: str, suffix: str) -> None:
    if name == "twinny" and prefix[:1] in (" ", ""):
        pytest.skip("can't be told from the other spacing")
    text = TEMPLATES[name](prefix, suffix)
    assert PLAIN.complete(text).prompt.tokens == expected(prefix, suffix)


@pytest.mark.parametrize(("prefix", "suffix"), CODE)
def test_all_forms_of_infilling_are_one(prefix: str, suffix: str) -> None:
    ids = expected(prefix, suffix)
    assert PLAIN.infill(Parts(prefix, suffix)).prompt.tokens == ids
    assert PLAIN.complete(f"{prefix}<FILL_ME>{suffix}").prompt.tokens == ids
    assert PLAIN.complete(ids).prompt.tokens == ids
    spm = expected(prefix, suffix, True)
    assert PLAIN.infill(Parts(prefix, suffix, suffix_first=True)).prompt.tokens == spm
    assert (
        Assembler(TOKENIZER, 512, suffix_first=True, heal=False).complete(f"{prefix}<FILL_ME>{suffix}").prompt.tokens
        == spm
    )
    if prefix.strip():
        assert PLAIN.complete(f"<PRE> <SUF>{suffix} <MID> {prefix}").prompt.tokens == spm


def test_what_stands_after_the_middle_mark_is_its_beginning() -> None:
    middle = TOKENIZER.encode_infilling("retu")
    assert PLAIN.complete("<PRE> a <SUF>b <MID> retu").prompt.tokens == [*expected("a", "b"), *middle]
    assert PLAIN.infill(Parts("a", "b", "retu")).prompt.tokens == [*expected("a", "b"), *middle]


def test_extra_context_stands_before_the_first_mark() -> None:
    ids = PLAIN.infill(Parts("a", "b"), extra="# other.py\nx = 1\n").prompt.tokens
    whole = expected("a", "b")
    assert ids == [whole[0], *TOKENIZER.encode("# other.py\nx = 1\n", False, False), *whole[1:]]


@pytest.mark.parametrize(
    "text", ["<PRE> no suffix <MID>", "x = '<PRE> a <SUF>b <MID>'", "<SUF> <PRE> <MID>", "<PRE><MID><SUF>", "<PRE>"]
)
def test_text_about_marks_is_text(text: str) -> None:
    assert parse_template(text) is None
    assert PLAIN.complete(text).prompt.tokens == TOKENIZER.encode(text, bos=True, eos=False)


def test_two_places_to_fill_are_refused() -> None:
    with pytest.raises(ValueError, match="2 places"):
        PLAIN.complete("a <FILL_ME> b <FILL_ME> c")


def test_no_mark_is_ever_written() -> None:
    marks = {TOKENIZER.prefix_id, TOKENIZER.suffix_id, TOKENIZER.middle_id, TOKENIZER.eot_id}
    for made in (PLAIN.complete("x"), PLAIN.complete([1, 2, 3]), PLAIN.chat([{"role": "user", "content": "x"}])):
        assert marks <= made.prompt.stop


@pytest.mark.parametrize("suffix_first", [False, True])
@pytest.mark.parametrize("extra", ["", "e " * 900])
def test_a_long_prompt_keeps_what_stands_next_to_the_cursor(suffix_first: bool, extra: str) -> None:
    small = Assembler(TOKENIZER, 128, heal=False)
    prefix, suffix = "p " * 500 + "the end of it", "the start of it" + " s" * 500
    made = small.infill(Parts(prefix, suffix, suffix_first=suffix_first), 32, extra=extra)
    text = TOKENIZER.decode(made.prompt.tokens)
    assert "the end of it" in text
    assert "the start of it" in text
    assert len(made.prompt.tokens) <= 128 - 32
    assert len(made.prompt.tokens) > 80
    assert made.cut > 800
    whole = small.infill(Parts("a", "b"), 32)
    assert whole.cut == 0


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 500), st.booleans())
def test_infilling_always_fits(p: int, s: int, e: int, limit: int, suffix_first: bool) -> None:
    small = Assembler(TOKENIZER, 96)
    made = small.infill(Parts("p " * p, "s " * s, suffix_first=suffix_first), limit, extra="e " * e)
    assert len(made.prompt.tokens) + min(limit, 48) <= 96
    assert made.prompt.tokens.count(TOKENIZER.middle_id or 0) == 1


def test_healing_takes_back_the_piece_that_a_word_ends_in() -> None:
    healer = Assembler(TOKENIZER, 512)
    made = healer.infill(Parts("    ret", "\n"))
    [last] = TOKENIZER.encode("    ret", False, False)[-1:]
    assert made.healed == TOKENIZER.token_piece(last).replace("▁", " ")
    before = expected("    ret", "\n")
    at = before.index(TOKENIZER.suffix_id or 0) - 1
    assert made.prompt.tokens == before[:at] + before[at + 1 :]
    assert made.allowed is not None
    mask = made.allowed([])
    assert mask is not None
    pieces = Pieces(TOKENIZER).text
    assert mask[last]
    assert {i for i in range(len(mask)) if mask[i]} == {i for i, t in pieces.items() if t.startswith(made.healed)}
    assert made.allowed([last]) is None


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        ("x = (", {}),  # no word
        ("x = 1\n", {}),
        ("", {}),
        ("    ret", {"heal": False}),
        ("    ret", {"stop": ["t"]}),  # the healed text would be taken for the stop string
        ("    ret", {"stop": ["tail"]}),
        ("é", {}),
    ],
)
def test_where_nothing_is_healed(prefix: str, settings: dict[str, Any]) -> None:
    made = Assembler(TOKENIZER, 512).infill(Parts(prefix, "\n"), **settings)
    assert made.healed == ""
    assert made.prompt.tokens == expected(prefix, "\n")


def test_completions_and_ids_are_healed_only_if_asked() -> None:
    healer = Assembler(TOKENIZER, 512)
    assert healer.complete("    ret").healed == ""
    assert healer.complete("    ret", heal=True).healed != ""
    assert healer.complete(TOKENIZER.encode("    ret", True, False), heal=True).healed == ""


def test_healed_answers_finish_the_word() -> None:
    """The embedded checkpoint, at cursors inside words: the rest of the word is right far more often with healing."""
    llama = Llama.build(max_seq_len=256, max_batch_size=8)
    words = ["return", "self", "import", "class", "raise", "None", "False", "while", "lambda", "except", "isinstance"]
    before = "def check(self, value):\n    if value is None:\n        "
    cases = [(before + word[:cut], word[cut:]) for word in words for cut in range(2, len(word) - 1)]
    right = {}
    for heal in (False, True):
        healer = Assembler(llama.tokenizer, 256, suffix_first=True)
        made = [healer.infill(Parts(prefix, "\n    return value\n"), 8, heal=heal) for prefix, _ in cases]
        right[heal] = 0
        for one, (_, rest) in zip(made, cases, strict=True):
            [text] = [""]
            for event in llama.stream([one.prompt], 4, 0.0, allowed=one.allowed):
                text += event.text
            right[heal] += text[len(one.healed) :].startswith(rest)
    assert right[True] >= 5 + 2 * right[False], right


def test_dialogs_as_clients_send_them() -> None:
    turns = in_turn([
        {"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}, {"role": "system", "content": "f"},
    ])  # fmt: skip
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "a\n\nb"), ("user", "c\n\nd"), ("assistant", "e"), ("user", "f"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="role"):
        in_turn([{"role": "tool", "content": "x"}])


def test_the_first_piece_of_every_length_is_found() -> None:
    """`starting_with` against the definition, for beginnings of many pieces."""
    pieces = Pieces(TOKENIZER)
    for text in itertools.islice(sorted(set(pieces.text.values())), 0, None, 40):
        mask = pieces.starting_with(text)
        same = {i for i, t in pieces.text.items() if t.startswith(text)}
        assert ({i for i in range(len(mask)) if mask[i]} == same) if mask is not None else len(same) == 1
