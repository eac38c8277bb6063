"""A SentencePiece tokenizer with the published settings, and the infilling marks at its end.

The published Code Llama tokenizer is byte-pair encoding with byte fallback, no normalisation, one implied leading
space, single digits and kept whitespace. Its 16 last pieces are *ordinary* pieces, reachable by merging: seven steps
on the way, the marks `▁<PRE>`, `▁<SUF>`, `▁<MID>` and `▁<EOT>`, and `▁<EOT>` two to six times over. That user text
can encode to a mark is a trap every Code Llama has to avoid, so the tokenizers made here have the trap as well, at
any vocabulary size.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from llama.system import replacing

MERGE_STEPS = ("▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT")
MARKS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
REPEATS = tuple("▁<EOT>" * times for times in range(2, 7))
STEP = "<step>"
ANCHOR = "☺"


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike[str],
    *,
    infilling: bool = True,
    step: bool = False,
) -> None:
    """Trains on `texts` and writes a SentencePiece model of exactly `vocab_size` pieces; the same texts, the same file.

    unk is 0, bos 1, eos 2, there is no pad, and the bytes are 3 to 258, so that a newline is 13 as in the published
    one. `infilling=False` leaves the 16 pieces out. `step=True` gives `<step>` the last id, in place of the sixfold
    `▁<EOT>` if that is there. Raises ValueError where the texts don't allow for `vocab_size` pieces.
    """
    special = [*MERGE_STEPS, *MARKS, *REPEATS] if infilling else []
    if step:
        special = [*special[:-1], STEP]
    model = _train_base(texts, vocab_size - len(special))
    # Trained without the implied space: the trainer would put one before every line and learn indents of 5 and 9.
    model.normalizer_spec.add_dummy_prefix = True
    # The trainer puts ☺ before the bytes; at the end it leaves them the published ids.
    anchor = next(piece for piece in model.pieces if piece.piece == ANCHOR)
    model.pieces.remove(anchor)
    model.pieces.append(anchor)
    lowest = min(piece.score for piece in model.pieces)
    for below, name in enumerate(special, 1):
        kind = anchor.USER_DEFINED if name == STEP else anchor.NORMAL
        model.pieces.add(piece=name, score=lowest - below, type=kind)
    model.trainer_spec.vocab_size = len(model.pieces)
    if infilling:
        _make_marks_reachable(model)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _make_marks_reachable(model: Any) -> None:
    """Gives the least valuable merges to the pieces that lead to the marks, where a small vocabulary lacks them.

    A merge joins two neighbours whose concatenation is a piece. `<PRE` that stays `▁< P RE` becomes one piece once
    `▁<P` is one, so the first two neighbours of a broken chain are made a piece until none is broken.
    """
    learned = [piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    replaceable = [piece for piece in learned if piece.piece not in {*MERGE_STEPS, *MARKS, *REPEATS}]
    while chain := _broken_chain(model):
        replaceable.pop().piece = chain[0] + chain[1]


def _broken_chain(model: Any) -> list[str]:
    """The pieces of the first mark, or step to one, that does not encode to itself; empty if all do."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for name in MERGE_STEPS + MARKS:
        pieces: list[str] = processor.encode(name.removeprefix("▁"), out_type=str)
        if pieces != [name]:
            return pieces
    return []


def _train_base(texts: Iterable[str], vocab_size: int) -> Any:
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            split_digits=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=[ANCHOR],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"these texts don't give a vocabulary of {vocab_size} pieces besides the marks; "
            f"change vocab_size or the texts ({error})"
        ) from error
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError as error:
        raise ValueError("making a tokenizer needs protobuf: pip install 'codellama[train]'") from error
    model = ModelProto()
    model.ParseFromString(out.getvalue())
    return model


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """A line is a sentence to the trainer; so no piece contains a newline, which is always its byte."""
    for text in texts:
        yield from filter(None, text.split("\n"))
