"""The shortcut's share of the input gradient in C++ (csrc/shortcut_grad)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.cpu_core import DTYPE_CODE, address, gate_code


def shortcut_grad_(grad_x: Tensor, grad: Tensor, gate: Tensor | None, stride: int) -> None:
    """See fusedres.ops.shortcut_grad."""
    n, c, h, w = grad_x.shape
    _C.shortcut_grad(
        grad_x.data_ptr(),
        DTYPE_CODE[grad_x.dtype],
        n,
        h,
        w,
        stride,
        c,
        grad.data_ptr(),
        grad.shape[1],
        gate_code(gate),
        address(gate),
        torch.get_num_threads(),
    )
