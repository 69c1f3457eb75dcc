"""BatchNorm's affine map and ReLU in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import affine, per_channel
from fusedres.values import arithmetic_dtype


def bn_relu(x: Tensor, state: Tensor | None, pivot: Tensor | None, stride: int) -> Tensor:
    """See fusedres.ops.bn_relu."""
    z = x[:, :, ::stride, ::stride]
    z = z.to(arithmetic_dtype(x.dtype)) if state is None else affine(z, state).relu_()
    if pivot is not None:
        z = z - per_channel(pivot)
    copy = state is None and pivot is None  # z may be a view of x
    return z.to(x.dtype, copy=copy).contiguous(memory_format=torch.channels_last)


def bn_relu_(x: Tensor, state: Tensor) -> None:
    """See fusedres.ops.bn_relu."""
    x.copy_(affine(x, state).relu_())
