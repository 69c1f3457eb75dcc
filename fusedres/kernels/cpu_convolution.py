"""Convolutions of training on the CPU in this package's kernels: forward, and the gradients of input and weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.conv_wgrad.cpu import conv_wgrad, conv_wgrad_finalize
from fusedres.kernels.packed_convolution import faster_than_onednn, winograd_is_faster
from fusedres.kernels.packed_convolution.cpu import pack_weight, packed_convolution_out
from fusedres.values import Geometry, Gradient, Packed, Raw

# From how many pixels of the output on these functions are faster where oneDNN is slower at all: forward, backward.
MANY_PIXELS: int = _C.MANY_PIXELS
MANY_PIXELS_BACKWARD: int = _C.MANY_PIXELS_BACKWARD


def is_faster(weight: Tensor, groups: int, out: Sequence[int], many: int) -> bool:
    """Return whether these functions take a weight's convolutions, and were measured to be faster than oneDNN there.

    Args:
        out: the shape of the output.
        many: MANY_PIXELS or MANY_PIXELS_BACKWARD.
    """
    few = out[0] * out[2] * out[3] < many
    return takes(weight.dtype, groups) and not few and is_covered(out, weight.shape)


def takes(dtype: torch.dtype, groups: int) -> bool:
    """Return whether these kernels take such convolutions, and were measured to be faster here at all."""
    return dtype is torch.float32 and groups == 1 and faster_than_onednn()


def is_covered(out: Sequence[int], weight: Sequence[int]) -> bool:
    """Return whether images of an output are as large as the kernel.

    On smaller ones most taps are outside, and packed_convolution multiplies by their zeros.
    """
    return out[2] >= weight[2] and out[3] >= weight[3]


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
