"""The library's convolution, forward and backward, on channels_last activations."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.autograd.plan import ConvBN

_DENSE = (1, 1)


def convolution(h: Tensor, weight: Tensor, unit: ConvBN, *, subsampled: bool = False) -> Tensor:
    """Return conv(h) in h's dtype and channels_last; subsampled: h has only the pixels that the stride takes."""
    if weight.dtype is not h.dtype:
        weight = weight.to(h.dtype)
    stride = _DENSE if subsampled else unit.stride
    # Not torch.convolution: profilers count the operations of conv2d.
    y = torch.conv2d(h, weight, None, stride, unit.padding, unit.dilation, unit.groups)
    if not y.is_contiguous(memory_format=torch.channels_last):
        y = y.contiguous(memory_format=torch.channels_last)
    return y


def convolution_backward(
    grad: Tensor, h: Tensor, weight: Tensor, unit: ConvBN, needs: tuple[bool, bool], *, subsampled: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of h (channels_last) and of weight (in its dtype), each None unless needed."""
    if not (needs[0] or needs[1]):
        return None, None
    grad_h, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad,
        h,
        weight if weight.dtype is h.dtype else weight.to(h.dtype),
        None,
        _DENSE if subsampled else unit.stride,
        unit.padding,
        unit.dilation,
        False,
        (0, 0),
        unit.groups,
        (*needs, False),
    )
    if grad_h is not None and not grad_h.is_contiguous(memory_format=torch.channels_last):
        grad_h = grad_h.contiguous(memory_format=torch.channels_last)
    if grad_weight is not None and grad_weight.dtype is not weight.dtype:
        grad_weight = grad_weight.to(weight.dtype)
    return grad_h, grad_weight
