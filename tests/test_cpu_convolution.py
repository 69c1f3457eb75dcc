"""Whole convolutions in the cpu kernels against autograd in float64: weights of any layout, all geometries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conv_inputs import CONVOLUTIONS, assert_conv_near, inputs
from torch import Tensor
from torch.nn import functional as F

from fusedres import _C
from fusedres.kernels import cpu_convolution
from fusedres.kernels.cpu_convolution import Method, Purpose
from fusedres.values import Geometry, Raw

# A large padding, which no convolution of the gradient can undo; and many channels.
GEOMETRIES = (
    *CONVOLUTIONS,
    (2, 4, 5, 6, 7, (1, 1), (1, 1), (1, 0), (1, 1)),
    (1, 5, 6, 7, 4, (3, 3), (1, 1), (3, 1), (1, 1)),
    (2, 70, 9, 8, 97, (3, 3), (1, 1), (0, 1), (1, 1)),
)
LAYOUTS = {
    "channels_last": lambda weight: weight.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda weight: weight.contiguous(),
    "slice": lambda weight: torch.stack([weight, weight], dim=-1)[..., 0],
}


class Case:
    """The operands of one convolution, its gradients in float64, and the sums of their |terms|."""

    def __init__(self, convolution: tuple, layout: str) -> None:
        self.x, weight, _, self.geometry = inputs("cpu", convolution, torch.float32, False)
        self.weight = LAYOUTS[layout](weight)
        shape = self.geometry.output_shape(self.x.shape, weight.shape)
        generator = torch.Generator().manual_seed(7)
        self.grad = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)

    def wanted(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        signed = self._in_float64(self.x, self.weight, self.grad)
        return signed, self._in_float64(self.x.abs(), self.weight.abs(), self.grad.abs())

    def _in_float64(self, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
        y = F.conv2d(x, weight, None, *self.geometry)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad.double()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convolution", GEOMETRIES, ids=str)
def test_forward_and_both_gradients(convolution, layout):
    case = Case(convolution, layout)
    (y, grad_x, grad_weight), terms = case.wanted()
    bias = torch.linspace(-1, 1, len(case.weight))
    got = cpu_convolution.convolve(case.x, case.weight, case.geometry, bias)
    assert_conv_near("y", got, y + bias.view(1, -1, 1, 1), terms[0] + bias.abs().view(1, -1, 1, 1), torch.float32)
    assert got.is_contiguous(memory_format=torch.channels_last)

    padding, dilation, kernel = case.geometry.padding, case.geometry.dilation, case.weight.shape[2:]
    turns = tuple(case.geometry.stride) == (1, 1) and all(
        p <= d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True)
    )
    assert cpu_convolution.has_input_gradient(case.weight, case.geometry) is turns
    if turns:
        got = cpu_convolution.input_gradient(case.grad, case.weight, case.geometry)
        assert_conv_near("grad x", got, grad_x, terms[1], torch.float32)

    assert cpu_convolution.has_weight_gradient(case.weight) is (layout != "slice" or case.weight.numel() == 1)
    if cpu_convolution.has_weight_gradient(case.weight):
        got = cpu_convolution.weight_gradient(case.grad, Raw(case.x, None), case.weight, case.geometry)
        assert got.stride() == case.weight.stride()
        assert_conv_near("grad weight", got, grad_weight, terms[2], torch.float32)


ISA = _C.build_info()["isa_used"]
DENSE_3X3 = Geometry((1, 1), (1, 1), (1, 1))


def is_faster(x, weight, purpose, geometry=DENSE_3X3, dtype=torch.float32, groups=1):
    return cpu_convolution.is_faster(x, weight, geometry, dtype, groups, purpose)


@pytest.mark.parametrize("purpose", Purpose)
def test_what_is_left_to_torch(purpose):
    assert is_faster((8, 64, 56, 56), (64, 64, 3, 3), purpose) is (ISA != "portable")
    assert not is_faster((0, 64, 56, 56), (64, 64, 3, 3), purpose) or purpose is Purpose.FROZEN
    assert not is_faster((99, 64, 2, 9), (64, 64, 3, 3), purpose)  # an image smaller than the kernel
    assert not is_faster((8, 128, 56, 56), (64, 64, 3, 3), purpose, groups=2)
    assert not is_faster((8, 64, 56, 56), (64, 64, 3, 3), purpose, dtype=torch.float64)


@pytest.mark.parametrize("purpose", Purpose)
def test_pointwise_and_strided_convolutions_are_onednns_with_avx512(purpose):
    """oneDNN's products cannot be beaten there, but the gradients of weights read BatchNorm's input as it is."""
    own = ISA == "avx2" or (ISA == "avx512" and purpose is Purpose.WEIGHT_GRADIENT)
    pointwise, strided = Geometry((1, 1), (0, 0), (1, 1)), DENSE_3X3._replace(stride=(2, 2))
    assert is_faster((8, 64, 56, 56), (256, 64, 1, 1), purpose, pointwise) is own
    assert is_faster((8, 128, 56, 56), (128, 128, 3, 3), purpose, strided) is own


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="says what the processor supports")
def test_methods_in_bfloat16():
    """Products of matrices run where oneDNN would reorder a large weight for few pixels, or form a slow gradient.

    With AMX, gradients of weights are this package's own, and products run wherever the weight is not small.
    """
    flags = set(Path("/proc/cpuinfo").read_text().split()) if ISA == "avx512" else set()
    pointwise = Geometry((1, 1), (0, 0), (1, 1))
    for x, weight, geometry, products in (
        ((8, 512, 7, 7), (2048, 512, 1, 1), pointwise, set(Purpose) - {Purpose.FROZEN}),
        ((8, 256, 14, 14), (1024, 256, 1, 1), pointwise, {Purpose.WEIGHT_GRADIENT}),
        ((8, 64, 56, 56), (256, 64, 1, 1), pointwise, set()),
        ((8, 512, 7, 7), (512, 512, 3, 3), DENSE_3X3, {Purpose.WEIGHT_GRADIENT}),
        ((8, 256, 14, 14), (256, 256, 3, 3), DENSE_3X3, set()),
        ((0, 512, 7, 7), (2048, 512, 1, 1), pointwise, set()),
    ):
        want = {each: Method.PRODUCT if each in products else Method.LIBRARY for each in Purpose}
        if "avx512_bf16" not in flags:
            want = dict.fromkeys(Purpose, Method.LIBRARY)
        elif "amx_bf16" in flags and x[0] > 0:
            large = weight[2:] == (1, 1) and weight[0] * weight[1] >= 32768
            want[Purpose.FORWARD] = want[Purpose.INPUT_GRADIENT] = Method.PRODUCT if large else Method.LIBRARY
            want[Purpose.WEIGHT_GRADIENT] = Method.OWN
        for purpose in Purpose:
            found = cpu_convolution.fastest_method(x, weight, geometry, torch.bfloat16, 1, purpose)
            assert found is want[purpose], (x, weight, purpose)


def test_few_pixels_do_not_pay_for_packing():
    for purpose in (Purpose.FORWARD, Purpose.INPUT_GRADIENT, Purpose.WEIGHT_GRADIENT):
        assert not is_faster((1, 64, 6, 7), (64, 64, 3, 3), purpose)
    assert is_faster((1, 64, 8, 8), (64, 64, 3, 3), Purpose.FROZEN) is (ISA != "portable")
