"""The operators on the CPU: exact references that torch's own checks accept."""

import pytest
import torch

from precision_compiler.codes import decode
from precision_compiler.elements import E8M0, FORMATS
from precision_compiler.errors import FormatError, ToolchainError
from precision_compiler.kernels import KERNELS, language
from precision_compiler.kernels.activation_quantise import activation_backward, activation_quantise
from precision_compiler.kernels.block_gemm import block_gemm, pack
from precision_compiler.kernels.contract import Kernel
from precision_compiler.kernels.cross_entropy import linear_cross_entropy
from precision_compiler.kernels.norm_quantise import norm_backward, norm_quantise
from precision_compiler.kernels.scaled_gemm import scaled_gemm
from precision_compiler.kernels.selftest import check_operator
from precision_compiler.scaled import rounded
from precision_compiler.scaling import MX, NVFP4, ROW

CASES = [(kernel, format) for kernel in KERNELS for format in kernel.formats]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decoded(elements: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scales = decode(codes, E8M0).repeat_interleave(32, dim=1)
    return elements.float() * scales[:, : elements.shape[1]]


@pytest.mark.parametrize(("kernel", "format"), CASES, ids=lambda x: getattr(x, "name", x))
def test_operator_passes_the_checks_of_torch(kernel: Kernel, format: str) -> None:
    for given in kernel.cases(format, "cpu"):
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        check_operator(kernel.op, given)
        for one, other in zip(given, before, strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (one, other)))


def test_cross_entropy_passes_the_checks_of_torch_with_gradients() -> None:
    hidden, weight = (randn(n, 8, seed=n).requires_grad_() for n in (6, 20))
    torch.library.opcheck(linear_cross_entropy, (hidden, weight, torch.arange(6), -100))


def test_backward_operators_pass_the_checks_of_torch() -> None:
    x, up, grad = randn(6, 32), randn(6, 32, seed=1), randn(6, 32, seed=2)
    torch.library.opcheck(activation_backward, (grad, x, up))
    torch.library.opcheck(activation_backward, (grad, x, None))
    torch.library.opcheck(norm_backward, (grad, x, randn(32), x.mean(1), x.std(1)))


def test_layer_norm_is_rounded_in_both_orientations() -> None:
    x, weight, bias = randn(40, 64), randn(64, seed=1), randn(64, seed=2)
    made = norm_quantise(x, weight, bias, 1e-5, True, "e4m3", "mx")
    y = torch.nn.functional.layer_norm(x, (64,), weight, bias, 1e-5)
    rows, columns = decoded(*made[:2]), decoded(*made[2:4])
    assert made[3].shape == (64, 2)
    torch.testing.assert_close(rows, rounded(y, FORMATS["e4m3"], MX), atol=0.25, rtol=0)
    torch.testing.assert_close(columns, y.t(), atol=0.3, rtol=0)
    assert float((rows - y).square().mean() / y.square().mean()) < 10**-2.9
    torch.testing.assert_close(made[4], x.mean(1))
    torch.testing.assert_close(made[5], (x.var(1, correction=0) + 1e-5).rsqrt())


def test_rms_norm_takes_scales_of_rows() -> None:
    x, weight = randn(5, 24) * torch.logspace(-3, 3, 5)[:, None], randn(24, seed=1)
    elements, scales, turned, _, mean, _ = norm_quantise(
        x, weight, None, 1e-6, False, "e5m2", "row"
    )
    y = torch.nn.functional.rms_norm(x, (24,), weight, 1e-6)
    made = elements.float() * scales[:, None]
    assert float((made - y).abs().max() / y.abs().max()) < 2**-3
    assert torch.equal(scales, torch.exp2(scales.log2().round()))
    assert turned.numel() == mean.numel() == 0
    torch.testing.assert_close(made, rounded(y, FORMATS["e5m2"], ROW), atol=0, rtol=0.25)


def test_activation_returns_the_largest_magnitude_before_rounding() -> None:
    x, scale = randn(8, 32), torch.tensor([32.0])
    rows, _, columns, _, amax = activation_quantise(x, None, scale, "e4m3")
    y = torch.nn.functional.gelu(x)
    assert float(amax) == float(y.abs().max())
    assert torch.equal(columns.float(), rows.float().t())
    torch.testing.assert_close(rows.float() / 32, y, atol=2e-4, rtol=2**-4)


def test_scaled_gemm_applies_scales_bias_and_activation() -> None:
    a, b = randn(4, 32).to(torch.float8_e4m3fn), randn(16, 32, seed=1).to(torch.float8_e5m2)
    scales, bias = torch.tensor([1.0, 2.0, 4.0, 0.5]), randn(16, seed=2)
    out, amax = scaled_gemm(a, b, scales, torch.tensor([0.25]), bias, "silu", torch.float32, False)
    wide = (a.double() * scales[:, None]) @ b.double().t() * 0.25 + bias
    wanted = torch.nn.functional.silu(wide)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    assert float(amax) == float(out.abs().max())


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "nvfp4"])
def test_block_gemm_multiplies_rounded_matrices(format: str) -> None:
    a, b = randn(6, 64), randn(16, 64, seed=1)
    left, right = pack(a, format), pack(b, format)
    scale = (left[2] * right[2]).reshape(1)
    out = block_gemm(left[0], right[0], left[1], right[1], scale, format, torch.float32)
    element = FORMATS["e4m3" if format == "mxfp8" else "e2m1"]
    scaling = NVFP4 if format == "nvfp4" else MX
    wanted = rounded(a, element, scaling).double() @ rounded(b, element, scaling).double().t()
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_norm_gradients_equal_those_of_autograd(centred: bool) -> None:
    x, weight, bias, grad = (
        randn(*shape, seed=seed, dtype=torch.float64)
        for seed, shape in enumerate([(5, 32), (32,), (32,), (5, 32)])
    )
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    mean = x.mean(1) if centred else x.new_empty(0)
    off = x - mean[:, None] if centred else x
    deviation = (off.square().mean(1) + 1e-5).rsqrt()
    y = off * deviation[:, None] * weight + bias
    wanted = torch.autograd.grad(y, (x, weight, bias), grad)
    made = norm_backward(grad, *(t.detach() for t in (x, weight, mean, deviation)))
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_activation_gradients_equal_those_of_autograd(gated: bool) -> None:
    x, up, grad = (randn(5, 32, seed=seed, dtype=torch.float64) for seed in range(3))
    x.requires_grad_()
    up.requires_grad_()
    if gated:
        wanted = torch.autograd.grad(torch.nn.functional.silu(x) * up, (x, up), grad)
    else:
        wanted = torch.autograd.grad(torch.nn.functional.gelu(x), (x,), grad)
    made = activation_backward(grad, x.detach(), up.detach() if gated else None)
    for one, other in zip(made, wanted, strict=False):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_cross_entropy_and_its_gradients_equal_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("precision_compiler.kernels.cross_entropy.CHUNK", 7)
    hidden, weight = (randn(n, 12, seed=n, dtype=torch.float64) for n in (9, 30))
    target = torch.arange(9) * 3
    target[4] = -100
    for leaf in (hidden, weight):
        leaf.requires_grad_()
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.t(), target)
    loss, _ = linear_cross_entropy(hidden, weight, target, -100)
    torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=1e-12)
    for one, other in zip(
        torch.autograd.grad(2 * loss, (hidden, weight)),
        torch.autograd.grad(2 * wanted, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "scaling", "words"),
    [((4, 40), "mx", "whole blocks of 32"), ((4, 16416), "row", "16384"), ((4,), "mx", "matrix")],
)
def test_norm_refuses_shapes_it_has_no_kernel_for(
    shape: tuple[int, ...], scaling: str, words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        norm_quantise(torch.ones(shape), torch.ones(shape[-1]), None, 1e-5, False, "e4m3", scaling)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_gpu_kernel_without_triton_says_what_to_install(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "INSTALLED", False)
    with pytest.raises(ToolchainError, match=r"pip install 'precision_compiler\[triton\]'"):
        kernel.launch(*kernel.example(kernel.formats[0], "cpu", False))
