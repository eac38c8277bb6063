"""Fills in what is missing between the two sides of <FILL>.

torchrun --nproc_per_node 1 example_infilling.py --ckpt_dir CodeLlama-7b/ \
    --tokenizer_path CodeLlama-7b/tokenizer.model --max_seq_len 192 --max_batch_size 4

Needs a checkpoint that was trained to infill: 7B, 13B or 70B, base or Instruct. Without --ckpt_dir it uses the small
checkpoint that comes with the package; `python example_infilling.py` is enough.
"""

from __future__ import annotations

from llama import Llama
from llama.cli import run_script


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 192,
    max_gen_len: int | None = 128,
    max_batch_size: int = 4,
) -> None:
    llama = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    prompts = [
        'def count_words(text):\n    """Return a dictionary of how often each word occurs in text."""\n'
        "    counts = {}\n    for word in text.split():\n<FILL>\n    return counts\n",
        'def sum_even(numbers):\n    """Return the sum of the even numbers in numbers."""\n    total = 0\n'
        "    for number in numbers:\n<FILL>\n            total += number\n    return total\n",
    ]
    prefixes = [prompt.split("<FILL>")[0] for prompt in prompts]
    suffixes = [prompt.split("<FILL>")[1] for prompt in prompts]
    results = llama.text_infilling(prefixes, suffixes, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    for prompt, result in zip(prompts, results, strict=True):
        print("=================Prompt=================")
        print(prompt)
        print("============Filled in===================")
        print(result["full_text"])


if __name__ == "__main__":
    run_script(main)
