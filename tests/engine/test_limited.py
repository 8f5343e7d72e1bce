"""The narrow accumulator: against integers, one result at a time, and its known behaviour."""

from fractions import Fraction
from math import floor, log2

import pytest
import torch

from precision_compiler.errors import FormatError
from precision_compiler.formats import FORMATS
from precision_compiler.limited import limited_accumulate
from precision_compiler.scaled import quantise
from precision_compiler.scaling import TENSOR

E4M3 = FORMATS["e4m3"]


def operands(m: int, k: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(m, k, generator=generator)
    second = torch.randn(k, n, generator=generator)
    return quantise(first, E4M3, TENSOR).elements, quantise(second, E4M3, TENSOR).elements


def cut(value: Fraction, largest: Fraction, bits: int) -> Fraction:
    """Toward zero, to a multiple of ``2^-bits`` of the leading bit of ``largest``."""
    if not largest:
        return Fraction(0)
    step = Fraction(2) ** (floor(log2(largest)) - bits)
    return int(value / step) * step


def reference(row: list[float], column: list[float], every: int, bits: int) -> float:
    """One result from exact fractions; promotions are rounded to float32."""
    total = torch.tensor(0.0)
    for start in range(0, len(row), every):
        register, stop = Fraction(0), min(start + every, len(row))
        for first in range(start, stop, 32):
            chosen = range(first, min(first + 32, stop))
            terms = [Fraction(row[k]) * Fraction(column[k]) for k in chosen] + [register]
            largest = max(abs(term) for term in terms)
            added = sum((cut(term, largest, bits) for term in terms), Fraction(0))
            register = cut(added, abs(added), bits)
        total = total + float(register)
    return total.item()


@pytest.mark.parametrize("length", [5, 32, 40, 128, 200, 300])
@pytest.mark.parametrize("every", [32, 128, 1024])
@pytest.mark.parametrize("bits", [13, 6])
def test_every_result_is_that_of_exact_fractions(length: int, every: int, bits: int) -> None:
    a, b = operands(3, length, 4)
    found = limited_accumulate(a, b, every, fraction_bits=bits)
    for i in range(3):
        for j in range(4):
            expected = reference(a[i].tolist(), b[:, j].tolist(), every, bits)
            assert found[i, j].item() == expected


def test_small_integers_are_added_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-2, 3, (8, 256), generator=generator).float()
    b = torch.randint(-2, 3, (256, 8), generator=generator).float()
    assert torch.equal(limited_accumulate(a, b), a @ b)
    assert torch.equal(limited_accumulate(a, b, None), a @ b)


def test_what_is_far_below_the_largest_product_is_cut_off() -> None:
    a = torch.ones(1, 32)
    b = torch.full((32, 1), 2.0**-7)
    a[0, 0], b[0, 0] = 128.0, 1.0
    assert limited_accumulate(a, b).item() == 128.0  # each of the others is 2^-14 of it
    a[0, 0] = 64.0
    assert limited_accumulate(a, b).item() == 64 + 31 * 2.0**-7


def relative_error(length: int, every: int | None) -> float:
    a, b = operands(24, length, 24, 2)
    exact = a.double() @ b.double()
    return float((limited_accumulate(a, b, every) - exact).norm() / exact.norm())


def test_the_error_grows_with_the_length_and_promotion_bounds_it() -> None:
    errors = [relative_error(length, None) for length in (512, 2048, 8192)]
    assert errors[1] > 2 * errors[0]
    assert errors[2] > 2 * errors[1]
    promoted = [relative_error(length, 128) for length in (512, 2048, 8192)]
    assert max(promoted) < 1.5 * min(promoted)
    assert promoted[2] < errors[2] / 10


def test_batches_and_sizes_without_products() -> None:
    a, b = operands(6, 64, 5)
    stacked = limited_accumulate(a.reshape(2, 3, 64), b.expand(2, 64, 5))
    assert torch.equal(stacked.reshape(6, 5), limited_accumulate(a, b))
    assert limited_accumulate(a[:, :0], b[:0]).tolist() == [[0.0] * 5] * 6


def test_an_infinity_makes_its_results_nan() -> None:
    a, b = operands(2, 32, 2)
    a[0, 3] = torch.inf
    assert limited_accumulate(a, b).isnan().tolist() == [[True, True], [False, False]]


def test_operands_have_to_fit() -> None:
    a, b = operands(2, 64, 2)
    with pytest.raises(FormatError, match=r"inner sizes differ: \(2, 64\) and \(32, 2\)"):
        limited_accumulate(a, b[:32])
    with pytest.raises(FormatError, match="every 48 products: choose a multiple of 32"):
        limited_accumulate(a, b, 48)
