"""Gram matrix in C++ (csrc/gram)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import address, pixels_of
from fusedres.kernels.cpu_core import empty_channels_last
from fusedres.values import arithmetic_dtype, subsampled


def gram(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    n, c, h, w = x.shape
    out = empty_channels_last((n, c, subsampled(h, stride), subsampled(w, stride)), x)
    pivot = torch.empty(c, dtype=arithmetic_dtype(x.dtype), device=x.device)
    total = torch.empty(c, dtype=torch.float64, device=x.device)
    matrix = torch.empty((c, c), dtype=torch.float64, device=x.device)
    _C.gram(
        pixels_of(x, stride),
        address(state),
        out.data_ptr(),
        pivot.data_ptr(),
        total.data_ptr(),
        matrix.data_ptr(),
        torch.get_num_threads(),
    )
    return out, pivot, total, matrix
