"""Convolutions of training on the CPU in this package's kernels: forward, and the gradients of input and weight."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import DTYPE_CODE, convolution_map
from fusedres.kernels.conv_wgrad.cpu import conv_wgrad, conv_wgrad_finalize
from fusedres.kernels.packed_convolution import winograd_is_faster
from fusedres.kernels.packed_convolution.cpu import pack_weight, packed_convolution_out
from fusedres.values import Geometry, Gradient, Packed, Raw


class Purpose(IntEnum):
    """What a convolution is run for (csrc/convolution_method/convolution_method.h)."""

    FROZEN = 0  # a forward pass whose weight was packed before
    FORWARD = 1
    INPUT_GRADIENT = 2
    WEIGHT_GRADIENT = 3


class Method(IntEnum):
    """How a convolution runs (csrc/convolution_method/convolution_method.h)."""

    LIBRARY = 0  # oneDNN's convolution
    OWN = 1  # these kernels
    PRODUCT = 2  # torch's product of matrices, with a row for each pixel


def fastest_method(
    x: Sequence[int], weight: Sequence[int], geometry: Geometry, dtype: torch.dtype, groups: int, purpose: Purpose
) -> Method:
    """Return how a convolution was measured to be fastest on such a processor.

    Args:
        x: the shape of the forward pass's input (N, C, H, W), weight: (K, C, R, S).
    """
    if groups != 1 or dtype not in DTYPE_CODE:
        return Method.LIBRARY
    return Method(_C.fastest_method(convolution_map(x, weight, geometry), DTYPE_CODE[dtype], purpose))


def is_faster(
    x: Sequence[int], weight: Sequence[int], geometry: Geometry, dtype: torch.dtype, groups: int, purpose: Purpose
) -> bool:
    """Return whether these kernels take a convolution, and were measured to be faster than oneDNN's."""
    return fastest_method(x, weight, geometry, dtype, groups, purpose) is Method.OWN


def takes(dtype: torch.dtype, groups: int) -> bool:
    """Return whether these kernels take such convolutions."""
    return dtype is torch.float32 and groups == 1


def convolve(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """Return conv(x, weight) + bias for a channels_last x."""
    shape = geometry.output_shape(x.shape, weight.shape)
    out = torch.empty(shape, device=x.device, memory_format=torch.channels_last)
    bias = torch.zeros(weight.shape[0], device=x.device) if bias is None else bias
    winograd = winograd_is_faster(x.shape, weight.shape, geometry, packed_before=False)
    panels = pack_weight(weight, geometry.dilation, None, winograd)
    packed = Packed(panels, bias, tuple(weight.shape[2:]), winograd)
    packed_convolution_out(x, packed, geometry, None, False, out)
    return out


def has_input_gradient(weight: Tensor, geometry: Geometry) -> bool:
    """Return whether the gradient of the input is a convolution too, of the output's gradient."""
    covered = [d * (k - 1) for d, k in zip(geometry.dilation, weight.shape[2:], strict=True)]
    fits = all(padding <= most for padding, most in zip(geometry.padding, covered, strict=True))
    return fits and tuple(geometry.stride) == (1, 1)


def input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of the input if has_input_gradient, for a channels_last grad."""
    kernel = weight.shape[2:]
    padding = [d * (k - 1) - p for d, k, p in zip(geometry.dilation, kernel, geometry.padding, strict=True)]
    return convolve(grad, weight.flip(2, 3).transpose(0, 1), geometry._replace(padding=padding))


def has_weight_gradient(weight: Tensor) -> bool:
    """Return whether weight_gradient takes a weight: it has to be dense."""
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def weight_gradient(grad: Tensor, h: Raw, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of the weight, in its layout, for a channels_last grad and h."""
    partials = conv_wgrad(Gradient(grad), h, tuple(weight.shape[2:]), geometry)
    return conv_wgrad_finalize([partials], [weight])[0]
