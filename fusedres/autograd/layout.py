"""The memory formats of a fused block's input and output, which are those of torch.

With one channel or one pixel a tensor is contiguous in both formats. torch then decides by the strides alone (its
`suggest_memory_format`), and so does this module: a network with one input channel stays channels_last.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = torch.channels_last


def suggests_channels_last(tensor: Tensor) -> bool:
    """Return whether torch's convolution takes a 4-dimensional tensor for channels_last."""
    channels_last = tensor.is_contiguous(memory_format=_CHANNELS_LAST)
    sizes, strides = tensor.shape, tensor.stride()
    if channels_last != tensor.is_contiguous() and 1 not in sizes:
        return channels_last
    least = 0
    if strides[1] == 0:
        return False
    for axis in (1, 3, 2, 0):
        if sizes[axis] == 0 or strides[axis] < least:
            return False
        if axis == 0 and least == strides[1]:  # one value per row: NCHW
            return False
        least = strides[axis] * max(sizes[axis], 1)
    return True


def in_format(out: Tensor, channels_last: bool) -> Tensor:
    """Return a dense channels_last tensor in torch's format for it, including the strides of axes of length 1."""
    if out.is_contiguous():
        if torch.compiler.is_compiling():
            return out
        _, c, h, w = out.shape
        strides = (c * h * w, 1, c * w, c) if channels_last else (c * h * w, h * w, w, 1)
        return out if out.stride() == strides or out.numel() == 0 else out.as_strided(out.shape, strides).data
    return out if channels_last else out.contiguous()
