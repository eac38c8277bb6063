"""AutoTokenizer, given the files that a conversion writes, gives the ids of our prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.interop.tokenizer import write_tokenizer
from llama.prompts import Message, completion, dialog, infilling
from llama.tokenizer import Tokenizer

KINDS = ["infilling", "plain", "step"]
TEXTS = [
    "def f(x):\n    return x",
    "    x = 1\n",
    " a",
    "\n\tb",
    "x ☺ y",
    "héllo 漢\r\n",
    "12345",
    "",
    "a" + " " * 23 + "b",
    "=====\n=======",
]
GAPS = [
    ("def f(x):\n    ", "\n    return x\n"),
    ("    a = ", " + 1\n"),
    ("x", "y"),
    ("a\r\n", "b"),
    ('def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n"),
]


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Tokenizer,
    plain_tokenizer: Tokenizer,
    step_tokenizer: Tokenizer,
) -> dict[str, tuple[Tokenizer, Any]]:
    """Each kind of tokenizer, ours and theirs."""
    from transformers import AutoTokenizer

    pairs = {}
    for kind, ours in zip(KINDS, (tokenizer, plain_tokenizer, step_tokenizer), strict=True):
        folder = tmp_path_factory.mktemp(kind)
        (folder / "model").write_bytes(ours.sp_model.serialized_model_proto())
        written = write_tokenizer(folder / "model", folder, 4096)
        assert written.n_words == ours.n_words
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        pairs[kind] = ours, AutoTokenizer.from_pretrained(folder)
    return pairs


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_code_llamas(both: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = both[kind]
    assert type(theirs).__name__ == "CodeLlamaTokenizer"
    assert theirs.vocab_size == ours.n_words
    assert theirs.convert_ids_to_tokens(list(range(ours.n_words))) == [ours.token_piece(i) for i in range(ours.n_words)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.pad_token is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_ids_of_our_prompt(both: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = both[kind]
    for text in TEXTS:
        ids = completion(ours, text).tokens
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == text


@given(st.text("  \n\tabdefginorstux_()=:.,'\"0123☺é", max_size=60))
def test_any_text_has_the_ids_of_our_prompt(both: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    ours, theirs = both["infilling"]
    assert theirs(text)["input_ids"] == completion(ours, text).tokens


@pytest.mark.parametrize("kind", ["infilling", "step"])
def test_fill_me_gives_the_ids_of_our_infilling_prompt(both: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = both[kind]
    for prefix, suffix in GAPS:
        assert theirs(f"{prefix}<FILL_ME>{suffix}")["input_ids"] == infilling(ours, prefix, suffix).tokens
        assert theirs(prefix)["input_ids"] == completion(ours, prefix).tokens  # nothing of it stays behind


def test_without_marks_nothing_is_added_to_the_vocabulary(both: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, theirs = both["plain"]
    assert len(theirs) == ours.n_words
    text = "a<FILL_ME>b"
    assert theirs(text)["input_ids"] == completion(ours, text).tokens


DIALOGS = [
    ["user", "Hello"],
    ["system", " be brief \n", "user", " Hi "],
    ["user", " a\n", "assistant", " b ", "user", "c"],
    ["system", "s", "user", "a", "assistant", "b\n\n  x", "user", "c", "assistant", "", "user", "é"],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", DIALOGS, ids=str)
def test_the_chat_template_gives_the_ids_of_our_dialog(
    both: dict[str, tuple[Tokenizer, Any]], kind: str, said: list[Any]
) -> None:
    ours, theirs = both[kind]
    messages = [Message(role=role, content=content) for role, content in zip(said[::2], said[1::2], strict=True)]
    for prompt_is_asked_for in (False, True):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt_is_asked_for, return_dict=False)
        assert ids == dialog(ours, messages).tokens


@pytest.mark.parametrize("kind", ["infilling", "step"])
@pytest.mark.parametrize(
    "said", [["user", "a [INST] b"], ["user", "<step>"], ["assistant", "a"], ["user", "a", "user", "b"]], ids=str
)
def test_the_chat_template_refuses_what_our_dialog_refuses(
    both: dict[str, tuple[Tokenizer, Any]], kind: str, said: list[Any]
) -> None:
    ours, theirs = both[kind]
    messages = [Message(role=role, content=content) for role, content in zip(said[::2], said[1::2], strict=True)]
    with pytest.raises(ValueError, match=r"tags|roles"):
        dialog(ours, messages)
    with pytest.raises(Exception, match=r"tags|roles"):
        theirs.apply_chat_template(messages)


def test_no_code_comes_with_the_files(tmp_path: Path, tokenizer_path: Path) -> None:
    """`trust_remote_code` stands there for another effect that it has (see tokenizer.py)."""
    write_tokenizer(tokenizer_path, tmp_path, 4096)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".model"}
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
