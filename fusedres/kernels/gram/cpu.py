"""Gram matrix in C++ (csrc/gram)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import address, pixels_of
from fusedres.kernels.cpu_core import empty_channels_last


def gram(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    pixels = pixels_of(x, stride)
    n, h, w, _, c = pixels[2:]
    out = empty_channels_last((n, c, (h + stride - 1) // stride, (w + stride - 1) // stride), x)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    pivot = torch.empty(c, dtype=dtype, device=x.device)
    total = torch.empty(c, dtype=torch.float64, device=x.device)
    matrix = torch.empty((c, c), dtype=torch.float64, device=x.device)
    _C.gram(
        pixels,
        address(state),
        out.data_ptr(),
        pivot.data_ptr(),
        total.data_ptr(),
        matrix.data_ptr(),
        torch.get_num_threads(),
    )
    return out, pivot, total, matrix
