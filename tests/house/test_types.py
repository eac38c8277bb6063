"""A script outside the repository: what a type checker knows of the package that was installed by the README's line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RIGHT = """
from llama import Dialog, Llama, PromptTooLong, load

llama = Llama.build()
reveal_type(llama.text_completion(["a"], max_gen_len=4)[0].get("generation"))
reveal_type(load(fast=True))
for event in llama.stream([[{"role": "user", "content": "a"}]], max_gen_len=4):
    reveal_type(event.text)
dialog: Dialog = [{"role": "user", "content": "a"}]
llama.chat_completion([dialog])
llama.stream([dialog, "a", [1, 2]])
try:
    llama.stream(["a"])
except PromptTooLong as error:
    reveal_type(error.tokens)
"""
WRONG = """
from llama import Llama

llama = Llama.build(max_seq_len="many")
llama.text_completion(["a"], temprature=0.5)
llama.stream([[{"role": "teacher", "content": "a"}]])
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What `mypy --strict` says of each script. Its cache is kept: PyTorch's types take ten seconds to read."""
    try:
        metadata.version("codellama")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed: pip install -e .")
    folder = tmp_path_factory.mktemp("outside")
    (folder / "right.py").write_text(RIGHT, encoding="utf-8")
    (folder / "wrong.py").write_text(WRONG, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    cache = ROOT / ".mypy_cache" / "outside"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache, "right.py", "wrong.py"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    return {name: [line for line in lines if line.startswith(f"{name}.py:")] for name in ("right", "wrong")}


def test_types_are_found(said: dict[str, list[str]]) -> None:
    """setuptools' editable finder hides them: mypy doesn't run it."""
    assert not [line for line in said["right"] if ": error:" in line]
    found = [re.sub(r'.*Revealed type is "(.*)"', r"\1", line) for line in said["right"]]
    assert found == ["str | None", "llama.generation.Llama", "str", "int"]


def test_a_wrong_call_is_an_error(said: dict[str, list[str]]) -> None:
    errors = [line for line in said["wrong"] if ": error:" in line]
    assert [int(line.split(":")[1]) for line in errors] == [4, 5, 6]
    assert 'incompatible type "str"; expected "int"' in errors[0]
    assert 'Unexpected keyword argument "temprature"' in errors[1]
