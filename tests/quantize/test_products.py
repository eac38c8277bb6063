"""Products by quantised weights: against float64 arithmetic on what is stored, for every operator, shape and dtype.

The operators are PyTorch's private ones. Those that a test names by hand guard against: codes in another order than the
operator's (of halves of bytes, of blocks of rows, of the rest after the last whole block), scales of the wrong group,
numbers of columns that an operator gets wrong, and a fallback that differs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from llama.kernels import matrix
from llama.quantize import operators
from llama.quantize.codes import MIDDLE, one_in_a_byte, two_in_a_byte
from llama.quantize.operators import FEW, Stored, plain
from llama.quantize.schemes import SCHEMES, Quantized, Scheme, scheme_of

WORDS = ["int8", "int8-dynamic", "int4:32", "int4:64", "int4:128", "int4-dynamic:32", "int4-dynamic:128", "nf4"]
SHAPES = [(64, 128), (256, 128), (48, 256), (112, 128), (33, 128), (1, 128), (1008, 256)]
"""Whole blocks of the operators' rows, rests of 16, 32 and 48, and numbers of rows that no operator takes."""
ROWS = [1, 3, FEW, FEW + 1, 70]
NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
NF4 += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # QLoRA, appendix E, to four digits


def scheme(word: str) -> Scheme:
    if word == "nf4":
        pytest.importorskip("bitsandbytes")
    return scheme_of(word)


def weights(N: int, K: int, seed: int = 0) -> Tensor:
    """Normal, with rows and columns of very different size, so that a scale of the wrong row or group shows."""
    draw = torch.Generator().manual_seed(seed)
    loud = torch.exp(torch.randn(N, 1, generator=draw) + torch.randn(1, K, generator=draw))
    return torch.randn(N, K, generator=draw) * loud


def dequantized(word: str, stored: Stored) -> Tensor:
    """The weight in float64, from what the table in schemes.py says of the stored tensors."""
    codes = stored["codes"]
    if codes.dtype == torch.int8:
        return codes.double() * stored["scale"].double()
    N, half = codes.shape
    first, second = codes // 16, codes % 16
    pairs = torch.stack([first, second], dim=2).reshape(N, 2 * half)
    if word == "nf4":
        levels = torch.tensor(NF4, dtype=torch.float64)
        return levels[pairs.long()] * stored["absmax"].double().repeat_interleave(64, 1)
    group = 2 * half // stored["scale"].shape[1]
    scale, zero = (stored[key].double().repeat_interleave(group, 1) for key in ("scale", "zero"))
    return (pairs.double() - 8) * scale + zero


@pytest.fixture(params=["kernels", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products by llama/kernels, and by what stands in where no compiler is."""
    if request.param == "operators":
        monkeypatch.setattr(operators, "available", lambda: False)
    return str(request.param)


@pytest.fixture
def groups_are_rounded(way: str) -> None:
    """int4-dynamic by kernels that round each group of activations; without products of bytes in vectors of 512 bits
    they are int4's, which round a row by one scale (docs/LOG.md)."""
    if way == "kernels" and not (torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()):
        pytest.skip("this processor lacks AVX512-VNNI, which int4-dynamic's own kernels need")


def is_plain(product: Quantized) -> bool:
    multiply = product.operator.multiply
    return "plain" in getattr(multiply, "func", multiply).__qualname__


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("word", WORDS)
def test_product_is_that_by_the_dequantised_weight(word: str, shape: tuple[int, int]) -> None:
    stored = scheme(word).quantize(weights(*shape))
    whole = dequantized(word, stored)
    for dtype in (torch.bfloat16, torch.float32):
        product = scheme(word).product(stored, dtype)
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).to(dtype)
            out = product(x)
            assert out.dtype == dtype
            assert out.shape == (rows, shape[0])
            # Three roundings to bfloat16 (of x, of a weight, of the sum) of 2**-8 each, at worst all one way; where it
            # is dynamic those of x to 8 bits, half a step of the largest / 127 of its row, or group.
            size = x.double().abs() @ whole.abs().T
            bound = size * 3.1 * 2**-8
            if "dynamic" in word:
                group = scheme(word).group or shape[1]
                half_steps = x.double().abs().view(rows, -1, group).amax(2) / 254
                bound = bound + half_steps @ whole.abs().view(shape[0], -1, group).sum(2).T
            assert ((out.double() - x.double() @ whole.T).abs() <= bound + 1e-6).all(), (dtype, rows)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("word", WORDS)
def test_error_is_of_rounding_and_has_no_direction(word: str) -> None:
    """A scale that is a little off would pass any bound of single products: all of them would be off alike."""
    stored = scheme(word).quantize(torch.randn(256, 256))
    whole = dequantized(word, stored)
    x = torch.randn(64, 256).bfloat16()
    for rows in (x[:8], x):
        out, right = scheme(word).product(stored)(rows).double(), rows.double() @ whole.T
        slope = float((out * right).sum() / right.square().sum())
        # bitsandbytes' kernel has its levels in bfloat16, and they are the same few for all weights; int4-dynamic's
        # roundings of eight vectors are 2,048, each of which meets all rows of the weight.
        assert slope == pytest.approx(1, abs=1e-3 if word == "nf4" or "int4-dynamic" in word else 3e-4)
        spread = float((out - right).square().sum() / right.square().sum()) ** 0.5
        assert spread < (0.012 if "dynamic" in word else 0.004)


@pytest.mark.parametrize("word", WORDS)
def test_kernels_or_operators_are_used(word: str, way: str) -> None:
    """Else all other tests would compare plain arithmetic with itself."""
    if way == "operators" and not (torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()):
        pytest.skip("this CPU lacks what some of PyTorch's operators need")
    product = scheme(word).product(scheme(word).quantize(weights(64, 128)))
    assert not is_plain(product)
    # A step in one call needs the codes themselves.
    assert (product.matrix is not None) == (way == "kernels")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("N", [64, 48, 80, 96, 33])
def test_what_is_stored_comes_back_bit_by_bit(word: str, N: int) -> None:
    stored = scheme(word).quantize(weights(N, 256))
    again = scheme(word).product({key: tensor.clone() for key, tensor in stored.items()}).stored
    assert again.keys() == stored.keys()
    for key, tensor in stored.items():
        assert again[key].dtype == tensor.dtype
        assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("word", WORDS)
def test_plain_arithmetic_stands_in_where_no_operator_does(word: str) -> None:
    own = scheme(word)
    stored = own.quantize(weights(64, 128))
    whole, x = dequantized(word, stored), torch.randn(5, 128)
    fallback = plain(own.decode)
    packed = fallback.pack(stored)
    error = (fallback.multiply(packed, x) - x.double() @ whole.T).abs()
    assert (error <= 1e-3 * (x.double().abs() @ whole.abs().T)).all()  # nf4's levels have four digits above
    assert fallback.unpack(packed) is stored


@pytest.mark.parametrize("K", [8, 24, 40, 65])
def test_int8_of_columns_that_the_operator_gets_wrong(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_weight_int8pack_mm` reads beyond a row's end where K is no multiple of 16, and may end the process."""
    monkeypatch.setattr(operators, "available", lambda: False)
    stored = SCHEMES["int8"].quantize(weights(5, K))
    product = SCHEMES["int8"].product(stored)
    assert is_plain(product)
    x = torch.randn(3, K)
    torch.testing.assert_close(product(x), (x.double() @ dequantized("int8", stored).T).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("word", WORDS)
def test_shapes_of_activations(word: str) -> None:
    stored = scheme(word).quantize(weights(32, 128))
    product = scheme(word).product(stored)
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    flat = product(x.flatten(0, 1))
    assert torch.equal(product(x), flat.view(2, 3, 32))
    assert torch.equal(product(x.transpose(0, 1)), flat.view(2, 3, 32).transpose(0, 1))  # not contiguous
    assert product(x[:, :0]).shape == (2, 0, 32)
    assert product(x[0, 0]).shape == (32,)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("word", ["int8-dynamic", "int4-dynamic"])
def test_dynamic_rows_do_not_depend_on_their_neighbours(word: str) -> None:
    """One scale for all activations would let a loud row, or padding, change what is computed of the others."""
    product = SCHEMES[word].product(SCHEMES[word].quantize(weights(64, 128)))
    for rows in (4, matrix.FEW + 1):
        x = torch.randn(rows, 128)
        quiet = product(x)
        x[1:] *= 1000
        assert torch.equal(product(x)[:1], quiet[:1])
        assert torch.equal(product(torch.zeros(rows, 128)), torch.zeros(rows, 64))


@pytest.mark.usefixtures("groups_are_rounded")
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_loud_number_costs_its_group_alone(group: int) -> None:
    """int4-dynamic rounds each group of activations by a scale of its own, for few rows and for many alike, and on a
    device without operators of its own: an outlier, which models have, leaves the other groups as they are."""
    word = f"int4-dynamic:{group}"
    stored = scheme_of(word).quantize(torch.randn(64, 384))
    stored["codes"][:, : group // 2] = stored["codes"][:, :1]  # the first group's are all one, of a 0
    stored["zero"][:, 0], stored["scale"][:, 0] = 0, 0
    x = torch.randn(matrix.FEW + 5, 384)
    unit = x.view(len(x), -1, group).abs().amax(2, keepdim=True) / 127
    right = ((x.view(len(x), -1, group) / unit).round().double() * unit).flatten(1) @ dequantized(word, stored).T
    x[:, 3] = 1e4  # that meets zeros
    emulated = operators.int4_dynamic(group)[-1]
    for out in (
        *(scheme_of(word).product(stored, torch.float32)(rows) for rows in (x[:3], x[:9], x)),
        emulated.multiply(emulated.pack(stored), x),
    ):
        error = (out.double() - right[: len(out)]).norm() / right[: len(out)].norm()
        assert error < 8e-3  # of bfloat16, three times; one scale for all would make it 1


@pytest.mark.usefixtures("groups_are_rounded")
@pytest.mark.parametrize("group", [32, 64, 128])
def test_small_numbers_beside_a_large_one_are_rounded_away(group: int) -> None:
    """By every way there is: what is less than half of a group's 127th part is 0, and the 127 itself meets zeros."""
    word = f"int4-dynamic:{group}"
    stored = scheme_of(word).quantize(torch.randn(64, 384))
    stored["zero"].zero_()
    stored["codes"][:, :: group // 2] = stored["codes"][:, :: group // 2] & 15 | MIDDLE << 4
    x = torch.full((matrix.FEW + 5, 384), 0.45)
    x[:, ::group] = 127
    ways = [scheme_of(word).product(stored, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for operator in operators.int4_dynamic(group)[1:]:
        if operator.takes(stored):
            packed = operator.pack(stored)
            ways.append(lambda rows, operator=operator, packed=packed: operator.multiply(packed, rows.bfloat16()))
    for multiply in ways:
        for rows in (x[:2], x[:9], x):
            assert torch.equal(multiply(rows).float(), torch.zeros(len(rows), 64))


@pytest.mark.parametrize("in_bytes", [True, False])
def test_whole_number_products_are_those_of_floats(in_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, and as on a CPU that multiplies bytes and one that doesn't. Codes of 7 bits: of 8, a CPU without
    VNNI, which is never asked to, adds pairs of products that don't fit into 16 bits."""
    monkeypatch.setattr(matrix, "multiplies_bytes", lambda: in_bytes)
    stored = SCHEMES["int8"].quantize(weights(64, 128))
    stored["codes"] //= 2
    x = torch.randn(matrix.FEW + 5, 128)
    scale = x.abs().amax(1, keepdim=True) / 127
    right = (x / scale).round().double() * scale @ (stored["codes"].double() * stored["scale"].double()).T
    for operator in (operators.INT_MM, operators.INT8_DYNAMIC_KERNEL):
        torch.testing.assert_close(operator.multiply(operator.pack(stored), x).double(), right, rtol=1e-4, atol=1e-4)


def test_half_bytes() -> None:
    codes = torch.tensor([[1, 2, 3, 15], [0, 7, 8, 9]], dtype=torch.uint8)
    assert two_in_a_byte(codes).tolist() == [[0x12, 0x3F], [0x07, 0x89]]
    assert torch.equal(one_in_a_byte(two_in_a_byte(codes)), codes)


# --- codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "relative"), [("int8", 0.012), ("int4:32", 0.08), ("int4:128", 0.1), ("nf4", 0.1)])
def test_dequantised_is_near_the_weight(word: str, relative: float) -> None:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 256, generator=draw)
    lost = dequantized(word, scheme(word).quantize(weight)) - weight
    assert float(lost.square().mean()) ** 0.5 < relative
    assert torch.allclose(scheme(word).dequantize(scheme(word).quantize(weight)).double() - weight, lost, atol=1e-3)


def test_search_beats_the_grid_from_least_to_largest() -> None:
    weight = weights(64, 256)
    low, high = (f(weight.view(64, 8, 32), -1, keepdim=True) for f in (torch.amin, torch.amax))
    step = (high - low) / 15
    simple = low + step * ((weight.view(64, 8, 32) - low) / step).round()
    ours = dequantized("int4", SCHEMES["int4"].quantize(weight)).view(64, 8, 32)
    before, after = ((found - weight.view(64, 8, 32)).square().sum(-1) for found in (simple, ours))
    assert after.sum() < 0.9 * before.sum()
    assert (after <= before * 1.05).all()  # the zero point's rounding to bfloat16 may cost a group a little


@pytest.mark.parametrize("word", WORDS)
def test_weights_without_spread(word: str) -> None:
    """All zero, all equal, one of many, and so small that a scale rounds to nothing: no NaN, and nearly exact."""
    weight = torch.zeros(32, 128)
    weight[1] = 0.5
    weight[2, 7] = -3.0
    weight[3] = 1e-42
    found = dequantized(word, scheme(word).quantize(weight))
    assert torch.isfinite(found).all()
    assert ((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 128 + 1e-40).all()
    if word != "nf4":
        assert torch.equal(found[0], torch.zeros(128, dtype=torch.float64))


def test_codes_of_exact_grids_are_exact() -> None:
    """Where the weights are a grid that bfloat16 can tell, they come back as they were."""
    codes = torch.randint(0, 16, (16, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes - MIDDLE) * 0.25 + 0.5
    assert torch.equal(dequantized("int4", SCHEMES["int4"].quantize(weight)), weight.double())
    whole = torch.randint(-127, 128, (16, 64))
    whole[:, 0] = 127
    assert torch.equal(dequantized("int8", SCHEMES["int8"].quantize(whole * 0.5)), whole * 0.5)


@pytest.mark.parametrize("word", WORDS)
def test_rows_are_quantised_each_by_itself(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So joined layers, and those cut between rows, have the codes of the separate ones, whatever is done at once."""
    weight = weights(48, 128)
    stored = scheme(word).quantize(weight)
    monkeypatch.setattr("llama.quantize.schemes.AT_ONCE", 5 * 128)
    in_pieces = scheme(word).quantize(weight)
    assert all(torch.equal(in_pieces[key], stored[key]) for key in stored)
    assert all(torch.equal(part, stored[key][10:12]) for key, part in scheme(word).quantize(weight[10:12]).items())


@pytest.mark.parametrize(
    ("word", "bits"), [("int8", 8 + 16 / 256), ("int4:32", 5), ("int4:64", 4.5), ("int4:128", 4.25), ("nf4", 4.25)]
)
def test_bits_a_weight(word: str, bits: float) -> None:
    assert scheme(word).bits(scheme(word).quantize(weights(32, 256))) == bits


# --- refused ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_named() -> None:
    int4 = SCHEMES["int4"]
    with pytest.raises(ValueError, match=r"the\.name has 96 columns, .* groups of 64: choose --group 32 or int8"):
        scheme_of("int4", 64).quantize(weights(16, 96), "the.name")
    with pytest.raises(ValueError, match=r"the\.name has 40 columns"):
        int4.quantize(weights(16, 40), "the.name")
    with pytest.raises(ValueError, match=r"the\.name is torch\.float32 of the shape \(16,\)"):
        int4.quantize(torch.ones(16), "the.name")
    with pytest.raises(ValueError, match=r"the\.name is torch\.int8"):
        int4.quantize(torch.ones(16, 32, dtype=torch.int8), "the.name")
    spoiled = weights(16, 64)
    spoiled[3, 5] = float("nan")
    for word in ("int8", "int4"):
        with pytest.raises(ValueError, match=r"the\.name has NaN or infinity"):
            SCHEMES[word].quantize(spoiled, "the.name")


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_float16_on_a_cpu_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=f"{word}.* in float16 is too slow .* bfloat16"):
        SCHEMES[word].product(SCHEMES[word].quantize(weights(16, 64)), torch.float16)


def test_words() -> None:
    assert (scheme_of("int4").group, scheme_of("int4:64").group, scheme_of("int4", 128).group) == (32, 64, 128)
    assert [str(found) for found in map(scheme_of, WORDS)] == WORDS
    for wrong in ("int5", "int4:x", ""):
        with pytest.raises(ValueError, match="there is no scheme"):
            scheme_of(wrong)
    with pytest.raises(ValueError, match="groups of 16 with int4, which has groups of 32, 64, 128"):
        scheme_of("int4:16")
    with pytest.raises(ValueError, match="groups of 32 with int8, which has no groups"):
        scheme_of("int8", 32)


def test_nf4_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    from llama.quantize.nf4 import bitsandbytes

    bitsandbytes.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'codellama\[bnb\]'"):
        SCHEMES["nf4"].quantize(weights(16, 64))
    bitsandbytes.cache_clear()


# --- other processors ------------------------------------------------------------------------------------------------

ELSEWHERE = """
import torch
from llama.quantize import nf4, operators
from llama.quantize.schemes import scheme_of

for word in ("int4:32", "int8", "int8-dynamic"):
    for N in (64, 48, 96, 1008):
        stored = scheme_of(word).quantize(torch.randn(N, 128))
        product, whole = scheme_of(word).product(stored), scheme_of(word).dequantize(stored).double()
        assert all(torch.equal(product.stored[key], stored[key]) for key in stored), (word, N)
        for rows in (1, 40):
            x = torch.randn(rows, 128)
            right = x.double() @ whole.T
            assert (product(x) - right).square().mean().sqrt() < 0.02 * right.std(), (word, N, rows)
print(torch.backends.cpu.get_cpu_capability(), operators._block_of_int4_cpu())
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_operators_of_other_processors(capability: str) -> None:
    """They have other orders: on AVX2 a block has 32 rows. PyTorch's kernels for them can be had by a variable."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1", "CODELLAMA_NO_KERNELS": "1"}
    ended = subprocess.run([sys.executable, "-c", ELSEWHERE], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert ended.stdout.split()[0].lower() == capability
