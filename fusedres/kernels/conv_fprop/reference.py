"""Convolutions with BatchNorm before or after them, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.bn_add_relu.reference import bn_add_relu
from fusedres.kernels.reference_core import affine, per_channel
from fusedres.values import Geometry, Raw, ShortcutInput, arithmetic_dtype


def conv_fprop(x: Raw, weight: Tensor, geometry: Geometry, with_statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.conv_fprop. All rows are one tile."""
    source, state = x
    h = source if state is None else affine(source, state).relu_().to(source.dtype)
    y = _convolution(h, weight, geometry)
    dtype = arithmetic_dtype(source.dtype)
    if not with_statistics:
        return y, source.new_empty((0,), dtype=dtype), source.new_empty((0,), dtype=dtype)
    wide = y.to(dtype)
    mean = wide.mean((0, 2, 3))
    m2 = (wide - per_channel(mean)).square().sum((0, 2, 3))
    return y, torch.stack((mean, m2))[None], source.new_full((1,), y.numel() // y.shape[1], dtype=dtype)


def conv_bn_add_relu(
    x: Tensor, weight: Tensor, geometry: Geometry, state: Tensor, shortcut: ShortcutInput | None = None
) -> Tensor:
    """See fusedres.ops.conv_bn_add_relu."""
    y = _convolution(x, weight, geometry)
    if shortcut is None:
        return affine(y, state).relu_().to(x.dtype)
    return bn_add_relu(y, state, shortcut, with_mask=False)[0]


def _convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation = map(list, geometry)
    y = torch.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], 1)
    return y.contiguous(memory_format=torch.channels_last)
