"""The model card: what a checkpoint is, with the figures that its stages measured and no others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama.system import replacing
from llama.train.collection import TOTALS
from llama.train.stages import STAGES, Result, Run

_CARD = """\
# A small Code Llama

Small enough to live in a repository and to answer on any CPU: for trying the library, for its tests, and for
experiments that a laptop can repeat. {can}

| | |
|---|---|
| architecture | Llama: dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads ({args.n_kv_heads} for keys and \
values), SwiGLU {args.hidden_dim}, RoPE theta {args.rope_theta:g} |
| parameters | {last.parameters:,}, in bfloat16 |
| context | trained on up to {context} tokens |
| vocabulary | {args.vocab_size} SentencePiece pieces, the 16 infilling pieces included |
| jobs | completion, infilling (PSM and SPM){dialogs} |

## Training
On {corpus},
Python files only{exercises},
in {minutes:.0f} minutes of training. A document with a gap has its middle moved to its end, half of them in
suffix-prefix-middle order; keys are numbers hidden among functions and asked for at the end; dialogs ask for code by
its docstring, head or comment, and only their answers are learned. Tokens are counted as often as they were read.

| stage | tokens | steps | minutes | length | theta | with a gap | keys | dialogs | exercises | \
held-out loss | bits a byte |
|---|---|---|---|---|---|---|---|---|---|---|---|
{stages}

The last two are of held-out files, cut into documents of up to the stage's length, by the stage's checkpoint as it was
written, in float32: nats a token, and bits for each byte of text.
{measured}
## Make it again
```
{commands}
```
The same Python version has the same corpus, tokenizer and rows of tokens; sums in another order (other threads, another
processor) make the weights differ in their last digits, and in time in more.

## What it can't do
{cannot} It knows no language but Python, and may repeat passages of what it was trained on word for word. Don't run
what it writes outside of a sandbox.

## Licence
The weights and the tokenizer are part of this project and under its licence. They were made from source code under the
licences of its authors:

| package | version | licence | bytes |
|---|---|---|---|
{packages}
"""


_LOOKS = "It writes what looks like Python. It does not program."
_PROGRAMS = (
    "It writes short functions and classes of the kind that beginners'\n"
    "books ask for, and most of what lies outside of that world only looks right."
)
_NO_MEANING = (
    "Solve a problem, call a library correctly from memory, or answer questions in words: {parameters:,} parameters\n"
    "hold the look of Python, not its meaning."
)
_NO_NEWS = (
    "Solve a problem of a kind that it has not practised, write longer programs, call a library correctly from\n"
    "memory, or answer questions in words."
)


def write_card(path: str | os.PathLike[str], run: Run, results: Sequence[Result], measured: str = "") -> None:
    """Writes the card of the last of `results`, the stages that led to it, in order. `measured`, if given, is what
    its section of that name says."""
    last = results[-1]
    corpus = "the standard library" if run.corpus is None else "permissively licensed packages and the standard library"
    practised = any(STAGES[result.stage].mixture.exercises for result in results)
    option = "" if run.corpus is None else " --corpus CORPUS"
    text = _CARD.format(
        args=run.args(STAGES[last.stage]),
        last=last,
        context=max(result.length for result in results),
        dialogs=", `[INST]` dialogs" if any(_asks(result) for result in results) else "",
        can=_PROGRAMS if practised else _LOOKS,
        cannot=(_NO_NEWS if practised else _NO_MEANING).format(parameters=last.parameters),
        exercises=", and on exercises that a generator made and their tests have passed" if practised else "",
        corpus=corpus,
        minutes=sum(result.minutes for result in results),
        stages="\n".join(_stage(result) for result in results),
        commands="\n".join(
            f"codellama train {r.stage} OUT{option} --seed {run.seed} --steps {r.steps}" for r in results
        ),
        packages="\n".join(_packages(run)),
        measured=f"\n## Measured\n{measured}" if measured else "",
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _asks(result: Result) -> bool:
    mixture = STAGES[result.stage].mixture
    return mixture.dialogs + mixture.questions > 0


def _stage(result: Result) -> str:
    mixture = STAGES[result.stage].mixture
    return (
        f"| {result.stage} | {result.tokens:,} | {result.steps:,} | {result.minutes:.1f} | {result.length} | "
        f"{result.rope_theta:g} | {mixture.infilling:.0%} | {mixture.keys:.0%} | "
        f"{mixture.dialogs + mixture.questions:.0%} | {mixture.exercises + mixture.questions:.0%} | "
        f"**{result.loss:.3f}** | **{result.bits_per_byte:.3f}** |"
    )


def _packages(run: Run) -> Iterator[str]:
    if run.corpus is None:
        yield f"| {run.made_of} | | PSF-2.0 | |"
        return
    for name, fact in json.loads(Path(run.corpus, TOTALS).read_text(encoding="utf-8"))["packages"].items():
        if fact["split"] == "train":
            yield f"| {name} | {fact['version']} | {fact['licence']} | {fact['bytes']:,} |"
