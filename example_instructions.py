"""Answers questions about code.

torchrun --nproc_per_node 1 example_instructions.py --ckpt_dir CodeLlama-7b-Instruct/ \
    --tokenizer_path CodeLlama-7b-Instruct/tokenizer.model --max_seq_len 512 --max_batch_size 4

Needs an Instruct checkpoint. Without --ckpt_dir it uses the small checkpoint that comes with the package; `python
example_instructions.py` is enough.
"""

from __future__ import annotations

from llama import Dialog, Llama, Message
from llama.cli import run_script


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    max_gen_len: int | None = None,
) -> None:
    llama = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    dialogs: list[Dialog] = [
        [Message(role="user", content="Write a Python function `is_empty` that returns True if a list has no items.")],
        [
            Message(role="system", content="Answer with Python code alone."),
            Message(role="user", content="Write a Python function `join_path` that joins two parts of a path."),
        ],
    ]
    results = llama.chat_completion(dialogs, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    for dialog, result in zip(dialogs, results, strict=True):
        for message in dialog:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        answer = result["generation"]
        print(f"> {answer['role'].capitalize()}: {answer['content']}")
        print("\n==================================\n")


if __name__ == "__main__":
    run_script(main)
