"""The model card: what a checkpoint is, with the figures that its run measured and no others."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llama.config import ModelArgs
from llama.train.atomic import replacing


@dataclass(frozen=True)
class Figures:
    """What a run measured. `loss` and `bits_per_byte` are of the held-out files and the checkpoint as written."""

    python: str
    files: int
    text_bytes: int
    held_out_files: int
    held_out_bytes: int
    parameters: int
    steps: int
    tokens: int
    tokens_a_pass: int
    minutes: float
    loss: float
    bits_per_byte: float


_CARD = """\
# The embedded checkpoint

A Code Llama small enough to live in a repository and to answer on any CPU: for trying the library, for its tests, and
for experiments that a laptop can repeat. It writes what looks like Python. It does not program.

| | |
|---|---|
| architecture | Llama: dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads ({args.n_kv_heads} for keys and \
values), SwiGLU {args.hidden_dim}, RoPE theta {args.rope_theta:g} |
| parameters | {parameters:,}, in bfloat16 |
| context | {args.max_seq_len} tokens |
| vocabulary | {args.vocab_size} SentencePiece pieces, the 16 infilling pieces included |
| jobs | completion, infilling (PSM and SPM), `[INST]` dialogs |

## Training
The standard library of CPython {python}, Python files only: {files} files, {text_bytes:,} bytes of text, of which
test suites are at most 15 %. Documents are pieces of files and single functions. Half of them had a gap to fill in
(Code Llama's infilling stage: 90 %), half of these in suffix-prefix-middle order; a tenth of the sequences are dialogs
made from a function and the first sentence of its docstring. In one stage: {tokens:,} tokens in {steps:,} steps and
{minutes:.0f} minutes on a CPU, where the corpus, encoded once with all its forms, is {tokens_a_pass:,} tokens.

## Measured
On {held_out_files} files of the standard library that were held out ({held_out_bytes:,} bytes, chosen by a hash of
their path), cut into documents of up to {args.max_seq_len} tokens, by the checkpoint as it lies here, in float32:
**{loss:.3f}** nats a token, **{bits_per_byte:.3f}** bits a byte.

## Make it again
```
python -m llama.train --out llama/assets/tiny --steps {steps}
```
The same Python version has the same corpus, tokenizer and rows of tokens; sums in another order (other threads, another
processor) make the weights differ in their last digits, and in time in more.

## What it can't do
Solve a problem, call a library correctly from memory, or answer questions in words: {parameters:,} parameters hold the
look of Python, not its meaning. It knows no language but Python, nothing beyond {args.max_seq_len} tokens, and may
repeat passages of the standard library word for word. Don't run what it writes.

## Licence
The weights and the tokenizer are part of this project and under its licence. They were made from the source code of
CPython, which is under the PSF License Agreement (Copyright Python Software Foundation, all rights reserved).
"""


def write_card(path: str | os.PathLike[str], args: ModelArgs, figures: Figures) -> None:
    with replacing(path) as temporary:
        temporary.write_text(_CARD.format(args=args, **vars(figures)), encoding="utf-8")
