"""Convolutions with BatchNorm around them in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.kernels.bn_add_relu.reference import bn_add_relu
from fusedres.kernels.reference_core import affine, arithmetic_dtype, per_channel


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.conv_fprop. All rows are one tile."""
    h = x if state is None else affine(x, state).relu_().to(x.dtype)
    y = _convolution(h, weight, stride, padding, dilation)
    dtype = arithmetic_dtype(x.dtype)
    if not with_statistics:
        return y, x.new_empty((0,), dtype=dtype), x.new_empty((0,), dtype=dtype)
    wide = y.to(dtype)
    mean = wide.mean((0, 2, 3))
    m2 = (wide - per_channel(mean)).square().sum((0, 2, 3))
    return y, torch.stack((mean, m2))[None], x.new_full((1,), y.numel() // y.shape[1], dtype=dtype)


def conv_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    state: Tensor,
    shortcut: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_stride: int,
) -> Tensor:
    """See fusedres.ops.conv_bn_add_relu."""
    y = _convolution(x, weight, stride, padding, dilation)
    if shortcut is None:
        return affine(y, state).relu_().to(x.dtype)
    return bn_add_relu(y, state, shortcut, shortcut_state, shortcut_stride, with_mask=False)[0]


def _convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    y = torch.convolution(x, weight, None, list(stride), list(padding), list(dilation), False, [0, 0], 1)
    return y.contiguous(memory_format=torch.channels_last)
