"""The C++ of llama/kernels against float64 arithmetic: every kind of weight, every width of vectors, rests of rows.

What these guard against: a column in another place than its weight's, what is left of a row that is no whole number of
steps, numbers read behind a weight's last row, sums that depend on how many vectors there are; and a compiler that is
missing, fails, or makes something that multiplies wrongly.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels import library, matrix
from llama.kernels.matrix import BFLOAT16, FEW, FLOAT32, INT4, INT4_DYNAMIC, INT8, INT8_DYNAMIC, NF4, Matrix

NF4_LEVELS = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
NF4_LEVELS += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # QLoRA, appendix E, to four digits
SHAPES = [(4, 256), (9, 704), (33, 64), (1, 2048), (6, 1152), (13, 4224), (551, 256), (70, 4224)]
"""Whole tiles of rows and rests of them, and more than sixteen whole ones for each of two threads; columns that are
whole steps of every width, ones that leave a rest, and more than share a unit."""
KINDS = {"float32": 0, "bfloat16": 0, "int8": 0, "int8-dynamic": 0}
KINDS |= {"int4:32": 32, "int4:64": 64, "int4:128": 128, "int4-dynamic:32": 32, "int4-dynamic:128": 128, "nf4": 64}


def weight(kind: str, N: int, C: int) -> tuple[Matrix, Tensor]:
    """A random weight and what it is in float64, by plain indexing."""
    group = KINDS[kind]
    if group == 0 and not kind.startswith("int8"):
        plain = torch.randn(N, C).to(getattr(torch, kind))
        return Matrix.of(plain), plain.double()
    if kind.startswith("int8"):
        codes, scale = torch.randint(-128, 128, (N, C), dtype=torch.int8), torch.rand(N, 1).bfloat16()
        return Matrix(INT8 if kind == "int8" else INT8_DYNAMIC, codes, C, scale), codes.double() * scale.double()
    codes = torch.randint(0, 256, (N, C // 2), dtype=torch.uint8)
    both = torch.stack((codes // 16, codes % 16), -1).view(N, C)
    scale, zero = torch.rand(N, C // group).bfloat16(), torch.randn(N, C // group).bfloat16()
    if kind == "nf4":
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)[both.long()]
        return Matrix(NF4, codes, C, scale), levels * wide(scale, group)
    which = INT4_DYNAMIC if "dynamic" in kind else INT4
    return Matrix(which, codes, C, scale, zero), (both.double() - 8) * wide(scale, group) + wide(zero, group)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_that_in_float64(kind: str, shape: tuple[int, int]) -> None:
    if KINDS[kind] and shape[1] % KINDS[kind]:
        pytest.skip("columns are whole groups")
    torch.manual_seed(0)
    found, exact = weight(kind, *shape)
    x = torch.randn(FEW, shape[1]) * torch.logspace(-3, 3, FEW)[:, None]
    x[0] *= 1e-30
    x[1, ::7] *= 100
    right, doubt = rounded_and_doubt(x, kind)
    digits = 2e-6
    size = right.abs() @ exact.abs().T  # what rounding is relative to
    if kind == "nf4":  # the levels are rounded, and given to four digits above
        digits, size = 5e-5 + 0.5 / largest_level(), right.abs() @ wide(found.scale, 64).abs().T
    elif kind.startswith("int"):
        size = size + 128 * right.abs().sum(1, keepdim=True) * exact.abs().amax(1)[None] / 100
    for n in (1, 2, 3, 4, 5, 8, FEW):
        error = (found(x[:n]).double() - right[:n] @ exact.T).abs() - doubt[:n] @ exact.abs().T
        assert (error <= digits * size[:n]).all(), (n, float((error / size[:n]).max()))


def wide(of_groups: Tensor | None, group: int) -> Tensor:
    assert of_groups is not None
    return of_groups.double().repeat_interleave(group, 1)


def in_rows() -> bool:
    """Whether weights of 4 bits are multiplied as fours.h does it."""
    return bool(library.load().multiplies_bytes() or library.load().has_tiles())


def largest_level() -> int:
    """What nf4's level 1 is as a whole number."""
    return 2047 if in_rows() else 8191


def rounded(x: Tensor, kind: str) -> Tensor:
    return rounded_and_doubt(x, kind)[0]


def rounded_and_doubt(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x as a kind of weights meets it, but for what is left of a row after whole steps. With 8 and 4 bits each 2,048
    columns are rounded to whole numbers, of which the largest has 16 bits, or 8; with int4-dynamic before that each
    group to 8; with 16, on a processor that multiplies in bfloat16, to that. And by how much more each may be off,
    being half way between two of them."""
    wide, kernels = x.double(), library.load()
    doubt = torch.zeros_like(wide)
    if kind.startswith("int4-dynamic"):
        groups = x.view(len(x), -1, KINDS[kind])
        unit = groups.abs().amax(2, keepdim=True) / 127
        numbers = groups.double() * (1 / unit)
        wide = (numbers.round() * unit).flatten(1)
        doubt = (((numbers - numbers.round()).abs() > 0.4999) * unit).flatten(1).double()
        if in_rows():
            return wide, doubt
        x = wide.float()
    if kind == "bfloat16" and (kernels.multiplies_bfloat16() or kernels.has_tiles()):
        whole = x.shape[1] // (2 * kernels.lanes()) * (2 * kernels.lanes())
        wide[:, :whole] = x[:, :whole].bfloat16().double()
    elif kind.startswith(("int", "nf")):
        dynamic = kind == "int8-dynamic"
        in_bytes = (dynamic and kernels.multiplies_bytes()) or (kind.startswith("int8") and kernels.has_tiles())
        step = 32 if KINDS[kind] and in_rows() else (4 if in_bytes else 8) * kernels.lanes()
        whole = x.shape[1] // step * step
        for first in range(0, whole, 2048):
            shared = x[:, first : min(first + 2048, whole)]
            largest = 127 if dynamic else 16383 if kind == "nf4" and in_rows() else 32639
            unit = shared.abs().amax(1, keepdim=True) / largest
            numbers, here = shared.double() * (1 / unit), slice(first, first + shared.shape[1])
            wide[:, here] = numbers.round() * unit
            doubt[:, here] += ((numbers - numbers.round()).abs() > 0.4999) * unit
    return wide, doubt


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_have_room(kind: str, sign: int) -> None:
    """Whole numbers of 32 bits hold what comes of the largest weights and the largest vectors, all of one sign."""
    found, _ = weight(kind, 3, 4096)
    assert found.codes is not None
    code, largest = {"int8": (-128, -128), "int4": (255, 7), "nf4": (255, 1)}.get(kind[:4].rstrip(":"), (2, 2))
    found.codes.fill_(code)
    if found.zero is not None:
        found.zero.fill_(0)
    scales = found.scale.double().mean(1) if found.scale is not None else torch.ones(3).double()
    out = found(torch.full((5, 4096), 3.0 * sign)).double()
    torch.testing.assert_close(out, (3 * sign * largest * 4096 * scales).expand(5, 3), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", ["int8", "int4:32", "nf4"])
@pytest.mark.parametrize("outlier", [0, 30, 3000])
def test_rounding_together_loses_less_than_bfloat16(kind: str, outlier: float) -> None:
    """One unit for 2,048 columns makes less than half of the error that bfloat16 vectors have, also beside numbers that
    are thousands of times as large as most."""
    torch.manual_seed(0)
    found, exact = weight(kind, 64, 8192)
    if kind == "nf4":  # its levels as they are multiplied
        levels = (exact / wide(found.scale, 64) * largest_level()).round()
        exact = levels / largest_level() * wide(found.scale, 64)
    x = torch.randn(FEW, 8192)
    x[:, 5::4096] *= outlier or 1
    right = x.double() @ exact.T
    error = (found(x).double() - right).norm()
    assert error < 0.5 * (x.bfloat16().double() @ exact.T - right).norm()


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_none(kind: str) -> None:
    """And zeros, and numbers that are hardly there, are no trouble."""
    C = 640 if KINDS[kind] == 128 else 704
    found, _ = weight(kind, 5, C)
    for bad, at in ((torch.nan, 77), (torch.inf, 77), (-torch.inf, 5), (torch.nan, C - 1), (torch.inf, C - 2)):
        x = torch.randn(6, C)
        x[4, at] = bad
        out = found(x)
        assert not out[4].isfinite().any()
        assert out[:4].isfinite().all()
    assert torch.equal(found(torch.zeros(1, C)), torch.zeros(1, 5))
    assert found(torch.full((1, C), 1e-42)).abs().max() < 1e-30


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_of_a_vector_does_not_depend_on_those_beside_it(kind: str) -> None:
    columns = {0: 1180, 128: 1152}.get(KINDS[kind], 1216)  # not whole steps, where groups allow it
    found, _ = weight(kind, 21, columns)
    x = torch.randn(FEW, columns)
    together = found(x)
    for n in (1, 2, 3, 4, 5, 7, 9):  # tiles of every width
        assert torch.equal(found(x[:n]), together[:n])


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [3, 35])
def test_nothing_is_read_behind_the_last_row(kind: str, N: int, before_a_wall: Callable[[Tensor], Tensor]) -> None:
    C = 640
    found, exact = weight(kind, N, C)
    parts = {"codes": found.codes, "scale": found.scale, "zero": found.zero}
    kept = {name: before_a_wall(part) for name, part in parts.items() if part is not None}
    for name, part in kept.items():
        setattr(found.struct, name, part.data_ptr())
    x = torch.randn(5, C)
    for n in (1, 5):
        torch.testing.assert_close(found(x[:n]).double(), rounded(x[:n], kind) @ exact.T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("in_bfloat16", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_many_vectors_are_multiplied_by_the_same_weight(
    kind: str, in_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a prompt is, some rows of the weight at a time: in float32, and where the processor has it in bfloat16."""
    monkeypatch.setattr(matrix, "multiplies_bfloat16", lambda: in_bfloat16)
    monkeypatch.setattr(matrix, "WIDENED", 640 * 10)
    found, exact = weight(kind, 33, 640)
    x = torch.randn(FEW + 1, 640)
    right = x.double() @ exact.T
    if kind.startswith("int4-dynamic"):
        groups = x.double().view(len(x), -1, KINDS[kind])
        unit = groups.abs().amax(2, keepdim=True) / 127
        right = ((groups / unit).round() * unit).flatten(1) @ exact.T
    out = found(x)
    assert out.dtype == torch.float32
    loss = float((out.double() - right).norm() / right.norm())
    most = 5e-3 if in_bfloat16 and kind != "float32" else 1e-4
    if kind == "int8-dynamic" or ("dynamic" in kind and in_bfloat16):  # x is bfloat16 before it is rounded to 8 bits
        most = 1e-2
    assert loss < most


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", [(1, 128, 1), (33, 640, 70), (130, 2048, 31), (70, 8320, 33)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float32"])
def test_a_prompts_products_by_tiles(kind: str, shape: tuple[int, int, int]) -> None:
    """Rests of blocks of rows, of tiles and of sixteen vectors; more columns than a block of 128 rows has room for."""
    N, C, n = shape
    found, exact = weight(kind, N, C)
    x = (torch.randn(n, C) * torch.logspace(-3, 3, n)[:, None]).bfloat16()
    x[0, 3] *= 1e-30
    right = x.double()
    if "dynamic" in kind:
        groups = right.view(n, -1, KINDS[kind] or C)
        unit = groups.abs().amax(2, keepdim=True) / 127
        right = ((groups / unit).round() * unit).flatten(1)
        if KINDS[kind]:
            right = right.bfloat16().double()
    out, doubt = found._many_by_tiles(x).double(), 2**-8 * (right @ exact.T).abs()
    if kind not in ("bfloat16", "int8", "int8-dynamic"):  # weights are rounded to bfloat16
        doubt += 6 * 2**-9 * (right.square() @ exact.square().T).sqrt()
    size = right.abs() @ exact.abs().T
    if "dynamic" in kind:  # a number half way between two may go the other way
        doubt += 2 * unit.amax(1) * exact.abs().amax(1)
    assert ((out - right @ exact.T).abs() <= doubt + 3e-5 * size).all()
    bad = x.clone()
    bad[0, 7] = torch.nan
    lost = ~found._many_by_tiles(bad).isfinite()
    assert lost[0].all()
    assert not lost[1:].any()
    for few in {1, n // 2 or 1, n}:  # what comes of a vector does not depend on those beside it
        assert torch.equal(found._many_by_tiles(x[:few]).double(), out[:few])


@pytest.mark.usefixtures("tiles")
def test_pytorchs_own_products_are_right_before_and_after_tiles() -> None:
    """Both tell a processor's thread which shapes its tiles have; neither may count on its own still being there."""
    x, q = torch.randn(70, 128).bfloat16(), torch.randn(1, 2, 300, 64).bfloat16()
    found, exact = weight("bfloat16", 96, 128)
    assert found.codes is not None

    def own() -> list[Tensor]:
        return [F.linear(x, found.codes), F.scaled_dot_product_attention(q, q, q, is_causal=True)]

    right, few, many = own(), found(x[:5]), found._many_by_tiles(x)
    for _ in range(3):
        for again, before in zip(own(), right, strict=True):
            assert torch.equal(again, before)
        assert torch.equal(found(x[:5]), few)
        torch.testing.assert_close(own()[0].double(), x.double() @ exact.T, rtol=1e-2, atol=1e-1)
        assert torch.equal(found._many_by_tiles(x), many)


def test_leading_dimensions_and_dtypes() -> None:
    found, exact = weight("bfloat16", 12, 64)
    x = torch.randn(2, 3, 64)
    assert found(x).shape == (2, 3, 12)
    assert torch.equal(found(x.transpose(0, 1)), found(x).transpose(0, 1))  # not contiguous
    assert found(x.bfloat16()).dtype == torch.bfloat16
    assert found(x[:, :0]).shape == (2, 0, 12)
    torch.testing.assert_close(found(x[0, :1]).double(), rounded(x[0, :1], "bfloat16") @ exact.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [70, 49_001], ids=["one piece each", "pieces for who comes first"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_processors_threads_share_a_product(kind: str, rows: int) -> None:
    """More threads than there are parts of its rows, and than there are processors: bit by bit the same."""
    found, exact = weight(kind, rows, 128)
    x, before, made = torch.randn(9, 128), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 3, 2):
            torch.set_num_threads(threads)
            made.append(found(x))
            for n in (1, 2):
                assert torch.equal(found(x[:n]), made[-1][:n])
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert torch.equal(made[0], other)
    torch.testing.assert_close(made[0].double(), rounded(x, kind) @ exact.T, rtol=1e-3, atol=1e-2)


# The compiler --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder with nothing in it, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(library.OFF, raising=False)
    for function in (library.load, library.available):
        function.cache_clear()
    yield tmp_path / "codellama"
    for function in (library.load, library.available):
        function.cache_clear()


def test_without_a_compiler_a_sentence_says_so_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"neither g\+\+ nor clang\+\+ here: install one .*CXX"):
        library.load()
    with pytest.warns(UserWarning, match=r"neither g\+\+ nor clang.*PyTorch's own operators multiply"):
        assert not library.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library.available()


def test_a_compiler_that_fails_leaves_nothing_behind(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{library.shutil.which('g++')} -DLANES=3")
    with pytest.raises(ValueError, match=r"could not compile .*kernels\.cpp \(.*error.*CXX"):
        library.load()
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("W::finish(m, row + r * gap, totals", "1.1f * W::finish(m, row + r * gap, totals", "multiplies wrongly"),
        ("total += omp_get_thread_num();", "total += 0 * omp_get_thread_num();", "threads mixed up"),
    ],
)
def test_kernels_that_are_wrong_are_not_used_and_not_kept(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, said: str
) -> None:
    source = library.SOURCE.read_text(encoding="utf-8")
    assert right in source
    spoiled = fresh.parent / "spoiled.cpp"
    spoiled.write_text(source.replace(right, wrong), encoding="utf-8")
    for part in library.PARTS[1:]:
        shutil.copy(part, fresh.parent)
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-O0"))
    path = library._place()
    with monkeypatch.context() as patch:
        patch.setattr(library, "SOURCE", spoiled)
        library.build(path)
    with pytest.raises(ValueError, match=rf"{said}.*name another compiler in CXX"):
        library.load()
    assert not path.exists()


@pytest.mark.parametrize("path", ["/nothing/is/here/g++", "/dev/null"])
def test_a_compiler_that_cannot_be_run_is_said(fresh: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("CXX", path)
    with pytest.raises(ValueError, match="can't be compiled or loaded here"):
        library.load()


def test_what_was_compiled_is_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.build(library._place(), ("-O0",))
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
    monkeypatch.setattr(library, "build", lambda *_: pytest.fail("compiled again"))
    assert library.load().lanes() in (4, 8, 16)


def test_an_environment_variable_leaves_products_to_pytorch(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.OFF, "1")
    monkeypatch.setattr(library, "build", lambda *_: pytest.fail("compiled all the same"))
    assert not library.available()


def test_kinds_are_the_same_in_both_languages() -> None:
    source = library.SOURCE.read_text(encoding="utf-8")
    assert "enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT8_DYNAMIC, INT4, INT4_DYNAMIC, NF4 };" in source
    assert tuple(range(7)) == (FLOAT32, BFLOAT16, INT8, INT8_DYNAMIC, INT4, INT4_DYNAMIC, NF4)
