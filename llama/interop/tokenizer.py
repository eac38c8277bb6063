"""The tokenizer files of a Hugging Face folder, made from a tokenizer.model.

`AutoTokenizer` must give the ids that ours gives: of a text, of `prefix<FILL_ME>suffix`, of a dialog. tokenizer.json
says the SentencePiece model in the words of the `tokenizers` library: pieces, merges in the order of their scores, a
space before every text, bytes for what is in no piece. tokenizer_config.json names the class that knows `<FILL_ME>`,
CodeLlamaTokenizer, and holds the dialog format as a template.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llama.interop.huggingface import write_json
from llama.prompts import SPECIAL_TAGS
from llama.tokenizer import Tokenizer

_REFUSE_TAGS = (
    "{% for message in messages %}{% for tag in ["
    + ", ".join(f"'{tag}'" for tag in SPECIAL_TAGS)
    + "] %}{% if tag in message['content'] %}"
    "{{ raise_exception('special tags are not allowed as part of the prompt: ' + tag) }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
_REFUSE_ROLES = (
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for message in turns %}{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('roles must be an optional system, then user and assistant in turn') }}"
    "{% endif %}{% endfor %}"
)
# A system message opens the first question, and only the two together are stripped.
INST_TEMPLATE = (
    _REFUSE_TAGS + _REFUSE_ROLES + "{% set system = '' if turns|length == messages|length else "
    "'<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Each part is encoded by itself, with a space before it; within one text that space is written out.
STEP_TEMPLATE = (
    _REFUSE_TAGS + _REFUSE_ROLES + "{{ bos_token }}{% for message in messages %}"
    "{{ ' Source: ' + message['role'] }}"
    "{% if message['content'].strip() %}{{ ' \\n\\n ' + message['content'].strip() }}{% endif %}{{ '<step>' }}"
    "{% endfor %}{% if messages[-1]['role'] == 'user' %}"
    "{{ ' Source: assistant\\nDestination: user \\n\\n ' }}{% endif %}"
)


def write_tokenizer(tokenizer_path: Path, folder: Path, max_length: int) -> Tokenizer:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json into `folder`, and returns the tokenizer.

    `max_length` is the trained context in tokens, which transformers warns beyond. Raises ValueError where
    `tokenizer_path` is no SentencePiece model.
    """
    tokenizer = Tokenizer(tokenizer_path)
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    write_json(folder / "tokenizer.json", _tokenizer_json(tokenizer))
    marks = ("prefix", "▁<PRE>"), ("middle", "▁<MID>"), ("suffix", "▁<SUF>"), ("eot", "▁<EOT>"), ("fill", "<FILL_ME>")
    settings = {
        "tokenizer_class": "CodeLlamaTokenizer",
        # Without this word, transformers 5 takes no more than pieces and merges from tokenizer.json and puts spaces
        # in other places: one before a suffix, none before a text that begins with one. No code comes with it.
        "trust_remote_code": True,
        "bos_token": tokenizer.token_piece(tokenizer.bos_id),
        # Where eos is an ordinary piece, the file's own settings name it, and replace this.
        "eos_token": tokenizer.token_piece(tokenizer.eos_id) if tokenizer.eos_id >= 0 else None,
        "unk_token": tokenizer.token_piece(tokenizer.sp_model.unk_id()),
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **{f"{name}_token": mark if tokenizer.can_infill else None for name, mark in marks},
        "chat_template": INST_TEMPLATE if tokenizer.step_id is None else STEP_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return tokenizer


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    model = tokenizer.sp_model
    pieces = [tokenizer.token_piece(i) for i in range(tokenizer.n_words)]
    specials = [i for i in range(tokenizer.n_words) if model.is_control(i) or model.is_unknown(i)]
    merges, unreachable = _merges(tokenizer, pieces)
    if tokenizer.step_id is not None:
        specials.append(tokenizer.step_id)
    added = sorted({*((i, True) for i in specials), *((i, False) for i in unreachable if i not in specials)})
    bos = pieces[tokenizer.bos_id]
    first: list[dict[str, Any]] = [
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, pieces[i], special) for i, special in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                space,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[model.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def _added_token(i: int, piece: str, special: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": piece, **plain, "special": special}


def _merges(tokenizer: Tokenizer, pieces: list[str]) -> tuple[list[tuple[str, str]], list[int]]:
    """Which two pieces join to a third, the best score first; and the longer pieces that no two join to, which
    SentencePiece finds as they stand (user-defined ones)."""
    model = tokenizer.sp_model
    ids = {
        piece: i
        for i, piece in enumerate(pieces)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
    }
    found: list[tuple[float, int, int, str, str]] = []
    unreachable = []
    for piece, i in ids.items():
        halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        found += [(-model.get_score(i), ids[left], ids[right], left, right) for left, right in pairs]
        if len(piece) > 1 and not pairs:
            unreachable.append(i)
    return [(left, right) for *_, left, right in sorted(found)], unreachable
