"""The random Hadamard transform: orthogonal, seeded, and good against outliers."""

import pytest
import torch
from scipy.linalg import hadamard as sylvester

from precision_compiler.errors import FormatError
from precision_compiler.hadamard import hadamard, inverse_hadamard


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_one_tile_is_a_signed_hadamard_matrix() -> None:
    found = hadamard(torch.eye(16), seed=3) * 4
    signs = found[:, 0]  # Sylvester's first column is all ones
    assert signs.abs().tolist() == [1.0] * 16
    assert 0 < (signs < 0).sum() < 16
    assert torch.equal(found, signs[:, None] * torch.from_numpy(sylvester(16)).float())


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_the_inverse_gives_numbers_back(axis: int) -> None:
    x = gaussian(32, 48, 64)
    back = inverse_hadamard(hadamard(x, axis, seed=1), axis, seed=1)
    assert float((back - x).abs().max()) <= 8 * 2.0**-24 * float(x.abs().max())
    exact = x.double()
    again = inverse_hadamard(hadamard(exact, axis, seed=1), axis, seed=1)
    assert float((again - exact).abs().max()) <= 8 * 2.0**-53 * float(x.abs().max())


def test_a_product_is_unchanged_if_both_operands_are_transformed() -> None:
    a, b = gaussian(20, 64).double(), gaussian(64, 30, seed=1).double()
    both = hadamard(a, 1, seed=5) @ hadamard(b, 0, seed=5)
    assert torch.allclose(both, a @ b, rtol=0, atol=64 * 2.0**-50)
    assert not torch.allclose(hadamard(a, 1, seed=5) @ hadamard(b, 0, seed=6), a @ b, atol=0.1)


def test_tiles_do_not_mix() -> None:
    x = torch.zeros(1, 48)
    x[0, 20] = 1.0
    found = hadamard(x, seed=0)
    assert found[0, 16:32].abs().tolist() == [0.25] * 16
    assert found[0, :16].tolist() == found[0, 32:].tolist() == [0.0] * 16


def test_an_outlier_is_spread_over_its_tile() -> None:
    x = gaussian(64, 256)
    x[:, ::16] *= 50
    found = hadamard(x, seed=2)

    def peak(values: torch.Tensor) -> torch.Tensor:
        tiles = values.reshape(-1, 16)
        return (tiles.abs().amax(-1) / tiles.square().mean(-1).sqrt()).mean()

    assert peak(x) > 3.5  # 4 is one number alone
    assert peak(found) < 2.0
    assert torch.allclose(found.square().sum(), x.square().sum(), rtol=1e-5)


def test_tiles_have_to_fit() -> None:
    with pytest.raises(FormatError, match=r"tiles of 16 do not divide axis -1 of shape \(3, 40\)"):
        hadamard(gaussian(3, 40), seed=0)
    with pytest.raises(FormatError, match="choose a power of two"):
        hadamard(gaussian(3, 24), seed=0, size=12)
