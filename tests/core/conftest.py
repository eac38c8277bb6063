"""`codellama …` in this process, its input scripted and what it prints read back."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import pytest
from commands import Outcome, Run

from llama import Llama, cli, parallel


@pytest.fixture
def codellama(
    tiny_llama: Llama, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """A function that runs a command line, by default on the small checkpoint with short answers."""

    def run(*words: str, stdin: str = "", defaults: bool = True, kernels: bool = False) -> Outcome:
        options = ["--ckpt_dir", str(tiny_checkpoint)] if defaults else []
        options += ["--temperature", "0", "--max_gen_len", "8"] if defaults and words[0] != "info" else []
        at = words.index("--") if "--" in words else len(words)
        monkeypatch.setattr(sys, "argv", ["codellama", *words[:at], *options, *words[at:]])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setattr("llama.front._kernels_are_ready", lambda device: kernels)
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        finally:
            parallel.start()  # a command leaves the groups at its end
        out, err = capsys.readouterr()
        return code, out, err

    return run
