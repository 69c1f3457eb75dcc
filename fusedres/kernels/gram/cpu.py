"""Gram matrix in C++ (csrc/gram)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.cpu_core import DTYPE_CODE, address, empty_channels_last


def gram(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    n, c, h, w = x.shape
    out = empty_channels_last((n, c, (h + stride - 1) // stride, (w + stride - 1) // stride), x)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    pivot = torch.empty(c, dtype=dtype, device=x.device)
    total = torch.empty(c, dtype=torch.float64, device=x.device)
    matrix = torch.empty((c, c), dtype=torch.float64, device=x.device)
    _C.gram(
        x.data_ptr(),
        DTYPE_CODE[x.dtype],
        n,
        h,
        w,
        stride,
        c,
        address(state),
        out.data_ptr(),
        pivot.data_ptr(),
        total.data_ptr(),
        matrix.data_ptr(),
        torch.get_num_threads(),
    )
    return out, pivot, total, matrix
