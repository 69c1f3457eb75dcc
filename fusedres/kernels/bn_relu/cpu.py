"""BatchNorm's affine map and ReLU in C++ (csrc/bn_relu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import address, pixels_of
from fusedres.kernels.cpu_core import empty_channels_last, empty_like
from fusedres.values import subsampled


def bn_relu(x: Tensor, state: Tensor | None, pivot: Tensor | None, stride: int) -> Tensor:
    """See fusedres.ops.bn_relu."""
    if stride == 1:
        out = empty_like(x)
    else:
        n, c, h, w = x.shape
        out = empty_channels_last((n, c, subsampled(h, stride), subsampled(w, stride)), x)
    _launch(x, state, pivot, stride, out)
    return out


def bn_relu_(x: Tensor, state: Tensor) -> None:
    """See fusedres.ops.bn_relu."""
    _launch(x, state, None, 1, x)


def _launch(x: Tensor, state: Tensor | None, pivot: Tensor | None, stride: int, out: Tensor) -> None:
    threads = torch.get_num_threads()
    _C.bn_relu(pixels_of(x, stride), address(state), address(pivot), out.data_ptr(), threads)
