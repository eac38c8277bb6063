"""Tables in other dtypes: the cosine's error against mpmath and the known figures, the logits against the oracle."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch

from fixtures_text import ARGS, WEIGHTS, training_texts
from llama import parallel
from llama.evals.sources import File
from llama.generation import Llama
from llama.longcontext import precision as module
from llama.longcontext.cli import COMMANDS
from llama.longcontext.precision import RECIPES, Precision, cos_errors, precision, rotated
from llama.rope import Spectrum, default, rotation_tables, spectrum
from reference import llama as reference_llama

SOURCES = [File(f"{i}.py", text[:2000]) for i, text in enumerate(training_texts()[:3])]
CODE_LLAMA = default(128, 1e6, 1)


def test_our_tables_are_exact_to_a_millionth_at_position_a_million() -> None:
    """The head of the published models; the core's own tables are the same numbers."""
    positions = torch.tensor([1, 4_097, 100_000, 999_983, 1_048_576])
    cos, sin = RECIPES["ours"].tables(CODE_LLAMA, positions)
    with mpmath.workdps(40):
        for row, position in enumerate(positions.tolist()):
            for i in range(64):
                angle = position * mpmath.mpf(10) ** (mpmath.mpf(-6 * i) / 64)
                assert abs(mpmath.cos(angle) - cos[row, i].item()) < 1e-6
                assert abs(mpmath.sin(angle) - sin[row, i].item()) < 1e-6
    core = rotation_tables(Spectrum(CODE_LLAMA.inv_freq, 1.3), 5000, torch.device("cpu"))
    ours = RECIPES["ours"].tables(Spectrum(CODE_LLAMA.inv_freq, 1.3), torch.arange(5000))
    assert torch.equal(ours[0], core[0])
    assert torch.equal(ours[1], core[1])


@pytest.mark.parametrize(
    ("recipe", "known"),
    [
        ("float32_angles", (2.6e-4, 1.2e-3, 7.1e-3)),
        ("bfloat16_table", (2.1e-3, 2.7e-3, 7.3e-3)),
        ("bfloat16_inv_freq", (1.9, 2.0, 2.0)),
        ("bfloat16_positions", (2.0, 2.0, 2.0)),
    ],
)
def test_errors_of_cos_are_the_known_ones(recipe: str, known: tuple[float, ...]) -> None:
    """The largest up to a position. How float32 rounds a power differs between libraries, by less than half."""
    errors = cos_errors(CODE_LLAMA, torch.arange(100_001), RECIPES[recipe])
    found = [float(errors[: end + 1].max()) for end in (4_096, 16_384, 100_000)]
    assert found == pytest.approx(known, rel=0.5)


def test_errors_are_measured_in_parts_and_with_the_scale() -> None:
    positions = torch.arange(40_000)
    whole = cos_errors(Spectrum(CODE_LLAMA.inv_freq, 2.0), positions, RECIPES["float32_angles"])
    assert torch.equal(
        whole[20_000:], cos_errors(Spectrum(CODE_LLAMA.inv_freq, 2.0), positions[20_000:], RECIPES["float32_angles"])
    )
    plain = cos_errors(CODE_LLAMA, positions, RECIPES["float32_angles"])
    assert whole.max().item() == pytest.approx(2 * plain.max().item(), rel=1e-2)


@pytest.fixture
def found(tiny_llama: Llama) -> Precision:
    return precision(tiny_llama, SOURCES, offsets=(0, 100_000, 1_048_576), documents=2, bins=2)


def test_a_text_moved_by_our_tables_keeps_its_logits_and_by_others_not(found: Precision) -> None:
    """A rotation that knew more than distances, or tables read at the wrong rows, would change ours as well."""
    changes = {(c.recipe, c.offset, c.start - c.offset): c for c in found.changes}
    assert len(found.documents) == 2
    assert len(changes) == 5 * 3 * 2
    for (recipe, offset, start), change in changes.items():
        assert change.end - change.start == (63 if start == 0 else 64)  # of 128 tokens, 127 foretell one
        if recipe == "ours":
            assert change.logit_change < 1e-3
            assert change.kl.value < 1e-8
            assert change.other_first.value == 0
            if offset == 0:
                assert change.logit_change == 0
        elif offset == 1_048_576:
            assert change.logit_change > 10 * changes["ours", offset, start].logit_change
    late = changes["bfloat16_positions", 100_000, 63]
    assert late.other_first.value > 0.5
    assert late.kl.value > 0.1


def test_figures_are_those_of_the_oracle(found: Precision, tiny_llama: Llama) -> None:
    """At position 0, where a bfloat16 inv_freq is just another spectrum, for which the oracle computes in float64."""
    w = spectrum(ARGS.head_dim, ARGS.rope_theta, None, 128).inv_freq
    sums = {0: [0.0, 0.0, 0.0], 63: [0.0, 0.0, 0.0]}
    largest = dict.fromkeys(sums, 0.0)
    for path in found.documents:
        text = next(source.text for source in SOURCES if source.path == path)
        ids = torch.tensor([tiny_llama.tokenizer.encode(text, bos=True, eos=False)[:128]])
        exact = reference_llama(ARGS, WEIGHTS, ids)[0]
        other = reference_llama(ARGS, WEIGHTS, ids, inv_freq=w.bfloat16().double())[0]
        p, q = exact.log_softmax(-1), other.log_softmax(-1)
        for start, end in ((0, 63), (63, 127)):
            here, following = slice(start, end), ids[0, start + 1 : end + 1]
            sums[start][0] += float((p.exp() * (p - q))[here].sum())
            sums[start][1] -= float(q[here].gather(-1, following[:, None]).sum())
            sums[start][2] += float((exact[here].argmax(-1) != other[here].argmax(-1)).sum())
            largest[start] = max(largest[start], float((exact - other)[here].abs().max()))
    for start, (kl, loss, changed) in sums.items():
        [change] = [c for c in found.changes if (c.recipe, c.offset, c.start) == ("bfloat16_inv_freq", 0, start)]
        n = 2 * (change.end - change.start)
        assert change.kl.value == pytest.approx(kl / n, rel=1e-3)
        assert change.nats_per_token.value == pytest.approx(loss / n, rel=1e-4)
        assert change.other_first.value == pytest.approx(changed / n, abs=1 / n)  # a near-tie may fall otherwise
        assert change.logit_change == pytest.approx(largest[start], rel=1e-2)
        assert change.kl.value > 1e-6


def test_positions_at_a_time_change_nothing(
    found: Precision, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 10)
    again = precision(tiny_llama, SOURCES, offsets=(0, 100_000, 1_048_576), documents=2, bins=2)
    for one, other in zip(again.changes, found.changes, strict=True):
        assert one.kl.value == pytest.approx(other.kl.value, rel=1e-6, abs=1e-9)
        assert one.nats_per_token.value == pytest.approx(other.nats_per_token.value, rel=1e-6)
        assert one.cos_error == other.cos_error


def test_the_models_own_rotation_comes_back(tiny_llama: Llama) -> None:
    """After an error too, and within another block."""
    model, ids = tiny_llama.model, torch.tensor([[1, 5, 9, 40]])
    own = model(ids)
    zero = torch.ones(4, ARGS.head_dim // 2), torch.zeros(4, ARGS.head_dim // 2)
    with pytest.raises(KeyError), rotated(model, *zero):  # noqa: PT012
        still = model(ids)
        with rotated(model, *RECIPES["ours"].tables(spectrum(8, 1e4, None, 4), torch.arange(4))):
            assert torch.equal(model(ids), own)
        assert torch.equal(model(ids), still)
        raise KeyError
    assert not torch.allclose(still, own)
    assert torch.equal(model(ids), own)
    assert "rotation" not in vars(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offsets": ()}, "at least one position"),
        ({"offsets": (-1,)}, "0 or more"),
        ({"offsets": (0.5,)}, "whole number"),
        ({"recipes": ["float8"]}, "float8.*ours"),
        ({"recipes": []}, "give some of"),
        ({"bins": 128}, "128 bins"),
        ({"length": 129}, "129.*max_seq_len"),
        ({"length": 0}, "0"),
    ],
)
def test_what_cannot_be_measured_is_named(tiny_llama: Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        precision(tiny_llama, SOURCES, **options)


def test_command_writes_a_table_a_record_and_a_picture(tmp_path: Path, tiny_checkpoint: Path, told: list[Any]) -> None:
    for source in SOURCES:
        (tmp_path / source.path).write_text(source.text, encoding="utf-8")
    parallel.start()
    out = tmp_path / "out"
    names = ("ours", "bfloat16_table")
    options: dict[str, Any] = {"ckpt_dir": str(tiny_checkpoint), "max_seq_len": 64, "documents": 1}
    COMMANDS["precision"](out=str(out), sources=str(tmp_path), offsets=(70_000,), recipes=names, **options)
    [(table, printed)] = told
    assert [line.split()[0] for line in table[1:]] == ["ours", "bfloat16_table"]
    assert printed["recipes"]["bfloat16_table"]["table"] == "torch.bfloat16"
    with open(out / "precision.csv", newline="", encoding="utf-8") as file:
        rows = {(row["recipe"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == 2 * 5
    assert float(rows["ours", "cos_error"]["value"]) < 1e-6 < float(rows["bfloat16_table", "cos_error"]["value"])
    assert (rows["ours", "kl"]["start"], rows["ours", "kl"]["length"]) == ("70000", "64")
    assert json.loads((out / "precision.json").read_text(encoding="utf-8"))["model"]["rope_theta"] == 10_000.0
    assert (out / "precision.png").read_bytes().startswith(b"\x89PNG")
