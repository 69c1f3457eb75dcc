"""BatchNorm's affine map and ReLU in CUDA (csrc/bn_relu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.arguments import pixels_of
from fusedres.kernels.cuda_core import launch
from fusedres.values import subsampled


def bn_relu(x: Tensor, state: Tensor | None, pivot: Tensor | None, stride: int) -> Tensor:
    """See fusedres.ops.bn_relu."""
    n, c, h, w = x.shape
    shape = (n, c, subsampled(h, stride), subsampled(w, stride))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _launch(x, state, pivot, stride, out)
    return out


def bn_relu_(x: Tensor, state: Tensor) -> None:
    """See fusedres.ops.bn_relu."""
    _launch(x, state, None, 1, x)


def _launch(x: Tensor, state: Tensor | None, pivot: Tensor | None, stride: int, out: Tensor) -> None:
    launch("bn_relu", x.device, pixels_of(x, stride), state, pivot, out)
