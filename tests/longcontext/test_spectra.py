"""What follows from a spectrum alone: against direct sums of cosines, the field's known figures, and the formula."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.longcontext.cli import COMMANDS
from llama.longcontext.spectra import (
    FURTHEST,
    command,
    expectation,
    first_zero,
    parameters,
    spectra,
    turning,
    turning_share,
)
from llama.rope import SPECTRA, Spectrum, default, spectrum


def g(inv_freq: torch.Tensor, distance: int) -> float:
    """The definition."""
    return math.fsum(math.cos(distance * w) for w in inv_freq.tolist())


@pytest.mark.parametrize(("theta", "zero"), [(1e4, 1_707), (5e5, 18_438), (1e6, 27_115)])
def test_first_zero_is_the_known_one(theta: float, zero: int) -> None:
    inv_freq = default(128, theta, 1).inv_freq
    assert first_zero(inv_freq) == zero
    assert g(inv_freq, zero) < 0 <= g(inv_freq, zero - 1)
    assert min(g(inv_freq, n) for n in range(0, zero, 1 if zero < 2000 else 97)) >= 0


def test_expectation_is_the_sum_of_cosines() -> None:
    """Also where the range begins and ends within a block of the angle addition."""
    inv_freq = default(64, 1e4, 1).inv_freq
    for start, stop in ((0, 1), (3000, 7001), (1_000_000, 1_001_025)):
        found = expectation(inv_freq, start, stop)
        assert found.shape == (stop - start,)
        for n in (start, (start + stop) // 2, stop - 1):
            assert found[n - start].item() == pytest.approx(g(inv_freq, n), abs=1e-8)


@pytest.mark.parametrize("zero", [1, 1023, 1024, 4095, 4096, 8191, 8192, 100_003, FURTHEST])
def test_first_zero_is_found_wherever_blocks_meet(zero: int) -> None:
    """One pair whose cosine turns negative between zero - 1 and zero."""
    inv_freq = torch.tensor([math.pi / 2 / (zero - 0.5)], dtype=torch.float64)
    assert first_zero(inv_freq) == zero
    assert first_zero(inv_freq, furthest=zero - 1) is None


def test_lowest_expectation_never_rises_and_crosses_zero_at_the_first_zero() -> None:
    """Over every distance, not only the drawn ones."""
    found = spectra(["default"], head_dim=16, trained=512)
    [curve] = found.curves
    inv_freq = default(16, 1e4, 1).inv_freq
    for i, distance in enumerate(found.distances):
        if distance <= 600:
            assert curve.lowest[i] == pytest.approx(min(g(inv_freq, n) for n in range(distance + 1)), abs=1e-9)
    assert curve.first_zero is not None
    assert ((curve.lowest < 0) == (found.distances >= curve.first_zero)).all()


def test_what_stands_still_has_no_zero_and_an_endless_wavelength() -> None:
    [curve] = spectra(["none"], head_dim=8, trained=10).curves
    assert curve.first_zero is None
    assert curve.wavelengths.tolist() == [math.inf] * 4
    assert curve.turning.max() == 0
    assert curve.expectation.tolist() == [4.0] * len(curve.expectation)


@pytest.mark.parametrize(("theta", "within", "share"), [(1e4, 4096, 0.704), (1e6, 100_000, 0.700)])
def test_share_of_turning_pairs_is_the_known_one(theta: float, within: int, share: float) -> None:
    assert turning_share(theta, within) == pytest.approx(share, abs=5e-4)
    counted = float(turning(default(128, theta, 1).inv_freq, within))
    assert 0 <= counted - turning_share(theta, within) <= 1 / 64  # the pair that just turns counts whole
    assert turning_share(theta, 1) == 0
    assert turning_share(1e4, 1e9) == 1


def test_a_pair_turns_within_its_wavelength_and_not_before() -> None:
    inv_freq = torch.tensor([2 * math.pi / 10, 2 * math.pi / 100.5, 0.0], dtype=torch.float64)
    assert [round(3 * float(turning(inv_freq, t))) for t in (9, 10, 11, 100, 101, 10**9)] == [0, 1, 1, 1, 2, 2]


def test_every_scheme_stands_beside_the_others() -> None:
    found = spectra(head_dim=64, trained=512, factor=8.0, other_thetas=[5e5])
    assert [curve.scheme for curve in found.curves] == [*SPECTRA, "default"]
    assert (found.length, found.curves[-1].theta) == (4096, 5e5)
    by_name = {curve.scheme: curve for curve in found.curves[:-1]}
    for curve in found.curves:
        scheme = spectrum(64, curve.theta, curve.scaling, 4096)
        assert curve.inv_freq.tolist() == scheme.inv_freq.tolist()
        assert curve.attention_scale == scheme.attention_scale
        at = list(found.distances).index(512)
        assert curve.expectation[at] == pytest.approx(g(scheme.inv_freq, 512), abs=1e-9)
        assert curve.turning[at] == curve.turning_trained
        assert curve.turning[list(found.distances).index(4096)] == curve.turning_length
    assert by_name["linear"].wavelengths == pytest.approx(8 * by_name["default"].wavelengths)
    assert by_name["yarn"].attention_scale == pytest.approx(0.1 * math.log(8) + 1)
    # The example of divisors of one's own: ntk's.
    assert by_name["longrope"].inv_freq == pytest.approx(by_name["ntk"].inv_freq)
    assert spectra(["linear"], length=16_384).curves[0].scaling == {"rope_type": "linear", "factor": 4.0}


def test_all_of_it_takes_less_than_a_second() -> None:
    spectra(["default"])  # what the first call alone pays
    before = time.process_time()
    spectra(other_thetas=[1e6])
    assert time.process_time() - before < 1


def test_a_scheme_with_a_wish_that_nobody_can_guess_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(head_dim: int, theta: float, length: int, *, factor: float, knob: float, free: int = 3) -> Spectrum:
        return default(head_dim, theta, length)

    monkeypatch.setitem(SPECTRA, "odd", odd)
    with pytest.raises(ValueError, match=r"'odd' must be given knob"):
        parameters("odd", 8, 1e4, 2.0, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schemes": ["su"]}, "'su'; there are default, linear"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"trained": 0}, "trained context of 0"),
        ({"length": 100}, "length of 100 for a trained context of 4096"),
        ({"factor": 0.5}, "factor of at least 1"),
        ({"theta": 1.0}, "theta is"),
    ],
)
def test_numbers_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectra(**options)


MINE = '''
"""A scheme of a user's own."""

from llama.rope import Spectrum, default


def half_as_fast(head_dim, theta, length, *, factor, strength=2.0):
    return Spectrum(default(head_dim, theta, length).inv_freq / strength)
'''


def test_command_writes_a_table_a_record_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[Any]
) -> None:
    """And takes a scheme from a user's file."""
    monkeypatch.setitem(SPECTRA, "half_as_fast", default)  # so that it is taken out again
    del SPECTRA["half_as_fast"]
    (tmp_path / "my.py").write_text(MINE, encoding="utf-8")
    schemes = ("default", f"{tmp_path / 'my.py'}:half_as_fast")
    COMMANDS["spectra"](out=str(tmp_path / "out"), schemes=schemes, head_dim=16, trained=64, factor=2)
    [(table, printed)] = told
    assert (printed["measure"], printed["length"], printed["head_dim"]) == ("spectra", 128, 16)
    assert [line.split()[0].strip(",") for line in table[1:]] == ["default", "half_as_fast", "default"]
    with open(tmp_path / "out" / "spectra.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = {(r["scheme"], r["theta"], r["metric"], r["at"]): r["value"] for r in rows}
    assert len(values) == len(rows), "a figure stands twice"
    slow = float(values["half_as_fast", "10000.0", "inv_freq", "0"])
    assert (slow, float(values["default", "10000.0", "inv_freq", "0"])) == (0.5, 1.0)
    zero = first_zero(default(16, 1e6, 1).inv_freq)
    assert values["default", "1000000.0", "first_zero", ""] == str(zero)
    record = json.loads((tmp_path / "out" / "spectra.json").read_text(encoding="utf-8"))
    assert record["schemes"][1]["rope_scaling"] == {"rope_type": "half_as_fast", "factor": 2}
    assert (tmp_path / "out" / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_command_takes_head_and_theta_of_a_checkpoint(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(out=str(tmp_path), schemes=("default",), ckpt_dir=str(tiny_checkpoint), other_thetas=(), json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["head_dim"], printed["theta"]) == (8, 10_000.0)
