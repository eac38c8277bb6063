"""A script prints once, however many ranks run it: what ranks other than the first print is dropped until `stop`."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.golden import NAMES, ROOT, golden
from llama import Llama, parallel
from llama.control import SILENCES, set_silence
from parallel.ranks import on_ranks

PUBLISHED = '''
from typing import Optional

import fire

from llama import Llama


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float = 0.2,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_batch_size: int = 4,
    max_gen_len: Optional[int] = None,
):
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    prompts = [
        # For these prompts, the expected answer is the natural continuation of the prompt
        """\
def fizzbuzz(n: int):""",
        """\
import argparse

def main(string: str):
    print(string)
    print(string[::-1])

if __name__ == "__main__":"""
    ]
    results = generator.text_completion(
        prompts,
        max_gen_len=max_gen_len,
        temperature=temperature,
        top_p=top_p,
    )
    for prompt, result in zip(prompts, results):
        print(prompt)
        print(f"> {result['generation']}")
        print("\\n==================================\\n")


if __name__ == "__main__":
    fire.Fire(main)
'''
"""As the scripts of the published package are written: no rank is mentioned in it."""


def torchrun(ranks: int, *words: str | Path) -> str:
    """The standard output of a script on so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *words], env={**os.environ, **hidden}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_of_the_published_package_prints_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "example_completion.py"
    script.write_text(PUBLISHED, encoding="utf-8")
    tokenizer = tiny_checkpoint / "tokenizer.model"
    words = ["--ckpt_dir", tiny_checkpoint, "--tokenizer_path", tokenizer, "--temperature", "0", "--max_gen_len", "5"]
    out = torchrun(2, script, *words)
    assert out.count("def fizzbuzz(n: int):\n> ") == out.count("import argparse\n") == 1
    assert out.count("==================================\n") == out.count("\n> ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_our_scripts_print_once_on_two_ranks(name: str) -> None:
    """In float32 two ranks write what one writes."""
    assert torchrun(2, ROOT / f"example_{name}.py", "--temperature", "0") == golden(name).read_text(encoding="utf-8")


def _built(init_method: str, folder: Path, silence: bool) -> str:
    """What reaches a rank's standard output: before `build`, until `stop`, and after it."""
    sys.stdout = terminal = io.StringIO()
    print("before", end=" ")
    parallel.start(init_method=init_method, device="cpu", silence=None)
    Llama.build(folder, max_seq_len=16, silence=silence)
    print("within", end=" ")
    parallel.stop()
    print("after", end="")
    assert sys.stdout is terminal
    return terminal.getvalue()


def test_a_rank_is_silent_from_build_to_stop(tiny_checkpoint: Path) -> None:
    assert on_ranks(_built, 2, tiny_checkpoint, True) == ["before within after", "before after"]


def test_all_ranks_print_where_they_are_asked_to(tiny_checkpoint: Path) -> None:
    assert on_ranks(_built, 2, tiny_checkpoint, False) == ["before within after"] * 2


def _started(init_method: str) -> tuple[str, str]:
    """`start` silences, `build` of another mind would end that, and a Llama of one's own parts leaves it as it is."""
    sys.stdout = terminal = io.StringIO()
    parallel.start(init_method=init_method, device="cpu")
    print("a", end="")
    parallel.start(silence=None)
    print("b", end="")
    parallel.start(silence=False)
    print("c", end="")
    llama = Llama.build(max_seq_len=16, silence=False)
    Llama(llama.model, llama.tokenizer)
    print("d", end="")
    parallel.start()
    print("e", end="")
    sys.stdout.write("f")
    sys.stdout.flush()
    return terminal.getvalue(), str(sys.__stdout__ is sys.stdout)


def test_the_last_call_decides() -> None:
    (first, _), (second, _) = on_ranks(_started, 2)
    assert first == "abcdef"
    assert second == "cd"


def _in_groups(init_method: str) -> str:
    sys.stdout = terminal = io.StringIO()
    parallel.start(1, init_method=init_method, device="cpu")
    print("here", end="")
    return terminal.getvalue()


def test_of_several_groups_one_process_prints() -> None:
    """As in the published package, where every process but the first of a machine is silent."""
    assert on_ranks(_in_groups, 2) == ["here", ""]


def test_one_process_is_never_silenced() -> None:
    before = sys.stdout
    parallel.start(device="cpu")
    assert sys.stdout is before
    assert not SILENCES


# --- exactly undone, whoever has replaced sys.stdout meanwhile ----------------------------------------------------


@contextlib.contextmanager
def a_terminal() -> Iterator[io.StringIO]:
    """In place of the terminal. Not a fixture, since pytest puts its own there once more before a test begins."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            yield out
        finally:
            set_silence(False)


def test_what_a_user_puts_in_place_of_it_stays() -> None:
    with a_terminal() as terminal:
        set_silence(True)
        sys.stdout = mine = io.StringIO()
        set_silence(False)
        assert sys.stdout is mine
        print("mine", end="")
        assert (mine.getvalue(), terminal.getvalue()) == ("mine", "")


def test_what_another_has_kept_speaks_again() -> None:
    """A block that redirects what is printed began in silence, and ends after it: it puts the silent one back."""
    with a_terminal() as terminal:
        set_silence(True)
        with contextlib.redirect_stdout(io.StringIO()) as inner:
            print("inner", end="")
            set_silence(False)
            print(" and inner", end="")
        print("outer", end="", flush=True)
        sys.stdout.writelines([" and", " outer"])
        assert inner.getvalue() == "inner and inner"
        assert terminal.getvalue() == "outer and outer"
        set_silence(True)
        print("nothing")
        set_silence(False)
        print("!", end="")
        assert terminal.getvalue() == "outer and outer!"


def test_silence_in_a_block_that_redirects_ends_with_it() -> None:
    with a_terminal() as terminal:
        with contextlib.redirect_stdout(io.StringIO()) as inner:
            set_silence(True)
            print("dropped")
        print("outer", end=" ")
        set_silence(True)
        set_silence(True)
        print("dropped")
        set_silence(False)
        print("outer", end="")
        assert (inner.getvalue(), terminal.getvalue()) == ("", "outer outer")
        assert not SILENCES


def test_a_silent_output_is_a_file_like_any_other() -> None:
    """Scripts write bytes, hand it to other programs, and print what this terminal could not show."""
    with a_terminal() as terminal:
        set_silence(True)
        print("\udcff \N{SNOWMAN}", 5, flush=True)
        sys.stdout.buffer.write(b"bytes")
        assert not sys.stdout.isatty()
        subprocess.run([sys.executable, "-c", "print('dropped')"], stdout=sys.stdout, check=True)
        assert isinstance(sys.stdout, io.TextIOBase)
        assert not sys.stdout.closed
        assert terminal.getvalue() == ""
