"""The README is run as it stands: its Python, and the commands that need no published checkpoint."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from llama.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("codellama")
]


def test_there_is_something_to_run() -> None:
    assert len(COMMANDS) >= 4
    assert sum(language == "python" for language, _ in BLOCKS) >= 1


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """One block after the other, as a reader would paste them."""
    names: dict[str, Any] = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip(), "the stream printed nothing"
    assert len(names["answers"]) == len(names["texts"])


RUN_HERE = [c for c in COMMANDS if "CodeLlama-" not in c and "--help" not in c and c != "codellama serve"]


@pytest.mark.parametrize("command", RUN_HERE)
def test_command_of_the_readme_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = "def area(width, height):\n    return <FILL>\n" + "\n" * 9 + "    return \n"  # 12 lines
    (tmp_path / "shapes.py").write_text(shapes, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Write a function.\n/reset\n")))
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setattr("llama.front._kernels_are_ready", lambda device: False)
    main()
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip()
