"""Continues pieces of Python.

torchrun --nproc_per_node 1 example_completion.py --ckpt_dir CodeLlama-7b/ \
    --tokenizer_path CodeLlama-7b/tokenizer.model --max_seq_len 128 --max_batch_size 4

Without --ckpt_dir it uses the small checkpoint that comes with the package; `python example_completion.py` is enough.
"""

from __future__ import annotations

from llama import Llama
from llama.cli import run_script


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
) -> None:
    llama = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    prompts = [
        # A function is told by its head: what it is called, what it takes, what it promises.
        'def read_lines(path):\n    """Return the lines of the text file at path, without line ends."""\n',
        # A class: the first method shows how the rest may go.
        "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    ]
    results = llama.text_completion(prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    for prompt, result in zip(prompts, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    run_script(main)
