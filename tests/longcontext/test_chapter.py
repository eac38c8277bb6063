"""The chapter of docs/ is run as it stands, and its figures are computed again in another way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llama
from llama import Llama
from llama.rope import SPECTRA, default, rotate

CHAPTER = Path(__file__).parents[2] / "docs" / "why_theta_is_a_million.py"
PICTURES = ["1-order", "2-pair", "3-hands", "4-expectation", "5-beyond", "6-precision", "7-share"]
STRETCH = 1.25
CELLS = re.split(r"^(?=# %%)", CHAPTER.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
PROSE = [cell for cell in CELLS if cell.startswith("# %% [markdown]")]
NUMBER = re.compile(r"(?<![\w.,])\d[\d,.]*\d(?!\w)")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chapter")


@pytest.fixture(scope="module")
def printed(out: Path) -> str:
    """What the chapter prints as a script, at a small size, in a folder that is not the repository."""
    sizes = ["--out", str(out / "images"), "--stretch", str(STRETCH), "--documents", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": str(CHAPTER.parents[1])}
    done = subprocess.run(
        [sys.executable, str(CHAPTER), *sizes], cwd=out, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, pattern
    return float(found[1].replace(",", ""))


def test_every_step_is_drawn_and_small_enough_to_keep(printed: str, out: Path) -> None:
    assert re.findall(r"\[picture: why-theta-(.*)\.png\]", printed) == PICTURES
    drawn = sorted(out.rglob("*"))
    assert drawn == [out / "images", *(out / "images" / f"why-theta-{name}.png" for name in PICTURES)]
    for path in drawn[1:]:
        assert path.read_bytes().startswith(b"\x89PNG"), path
        assert path.stat().st_size <= 60_000, f"{path.name} has {path.stat().st_size:,} bytes"


def test_no_figure_of_the_prose_is_without_a_cell_that_prints_it(printed: str) -> None:
    """A figure typed into the prose that no code prints, or that the code has since changed."""
    prose = re.sub(r"`[^`]*`|arXiv [\d.]+|section [\d.]+|table \d+", "", "".join(PROSE))
    figures = set(NUMBER.findall(prose))
    assert {"1,707", "18,438", "27,115", "0.704", "0.700"} <= figures
    assert figures <= set(NUMBER.findall(printed))


@pytest.mark.parametrize("theta", [10_000, 500_000, 1_000_000])
def test_first_dip_is_that_of_complex_arithmetic(theta: int, printed: str) -> None:
    """A dip found late, early, or of a head of another size."""
    dip = int(number(rf"θ = {theta:,}: g\(n\) is first below zero at n = ([\d,]+)", printed))
    expected = np.exp(1j * np.outer(np.arange(dip + 1), theta ** (-np.arange(64) / 64))).real.sum(1)
    assert expected[dip] < 0
    assert (expected[:dip] >= 0).all()


def test_hands_that_complete_a_turn_are_counted(printed: str) -> None:
    """Hands counted by half a turn, or pairs counted twice."""
    for name, theta, trained in (("Llama 2", 1e4, 4096), ("Code Llama", 1e6, 16384)):
        angles = trained / theta ** (np.arange(64) / 64)
        assert number(rf"{name} .* (\d+) of 64", printed) == sum(angles >= 2 * np.pi)


def test_theta_of_equal_shares_is_just_under_a_million(printed: str) -> None:
    """ln(T/2π)/ln(θ) solved wrongly: the share that Llama 2 has at 4,096 tokens must come out at 100,000."""
    theta = number(r"θ = ([\d,]+): 0\.94 million", printed)
    assert np.log(100_000 / (2 * np.pi)) / np.log(theta) == pytest.approx(np.log(4096 / (2 * np.pi)) / np.log(1e4))


@pytest.mark.parametrize("row", ["as trained", "θ = "])
def test_losses_are_those_of_one_pass_without_a_cache(row: str, printed: str) -> None:
    """Bins laid on the wrong side of the trained length, a θ that was not put in, another text."""
    read = re.search(r"Read: (\w+), ([\d,]+) tokens", printed)
    line = re.search(rf"^{row}([\d,]*) +(\d\.\d+) +(\d\.\d+) ", printed, re.MULTILINE)
    assert read
    assert line
    trained = int(number(r"trained on up to ([\d,]+) tokens", printed))
    length = int(read[2].replace(",", ""))
    assert length == pytest.approx(STRETCH * trained, abs=4)
    package = Path(llama.__file__).parent
    files = package.glob("*.py") if read[1] == "core" else (package / read[1]).rglob("*.py")
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(files))
    theta = float(line[1].replace(",", "")) if line[1] else None
    model = Llama.build(max_batch_size=1, rope_theta=theta)
    ids = torch.tensor(model.tokenizer.encode(text, bos=True, eos=False)[:length])
    with torch.inference_mode():
        nats = F.cross_entropy(model.model(ids[None])[0, :-1], ids[1:], reduction="none")
    # nats[p - 1] is that of place p; places 0 to trained - 1 are those that training knew. Of the four bins within, one
    # has a token less than the others.
    assert float(nats[: trained - 1].mean()) == pytest.approx(float(line[2]), abs=0.01)
    assert float(nats[trained - 1 :].mean()) == pytest.approx(float(line[3]), abs=0.002)


# --- in a notebook: one cell after the other, without __file__, and with the options of a kernel --------------------


@pytest.fixture
def run_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "kernel.json", "--out", str(tmp_path / "images")])

    def run() -> None:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for cell in CELLS:
            exec(compile(cell, CHAPTER.name, "exec"), namespace)

    return run


def test_rotation_left_on_is_noticed(run_cells: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cell that computes would say "no order" of a model that has its rotation still."""
    monkeypatch.setitem(SPECTRA, "none", default)
    with pytest.raises(AssertionError):
        run_cells()


def test_score_that_knows_more_than_distance_is_noticed(
    run_cells: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rotation without its sine stretches instead of turning."""
    monkeypatch.setattr("llama.rope.rotate", lambda x, cos, sin: rotate(x, cos, 0 * sin))
    with pytest.raises(AssertionError):
        run_cells()
    assert "[picture: why-theta-1-order.png]" in capsys.readouterr().out  # so it came as far as section 2


def test_without_matplotlib_one_sentence_says_what_to_install(
    run_cells: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install 'codellama\[plot\]'"):
        run_cells()


def test_every_step_is_told_before_it_is_run() -> None:
    """Text and code take turns, and text is nothing but text."""
    told = [cell.startswith("# %% [markdown]") for cell in CELLS]
    assert told == [i % 2 == 0 for i in range(len(CELLS))]
    assert all(line.startswith("#") or not line for cell in PROSE for line in cell.splitlines())
