"""The gradient that passes a ReLU in C++ (csrc/relu_backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.cpu_core import DTYPE_CODE, empty_like, gate_code


def relu_backward(grad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.relu_backward."""
    channels = grad.shape[1]
    d = empty_like(grad)
    sums = grad.new_empty(channels, dtype=torch.float64 if grad.dtype is torch.float64 else torch.float32)
    _C.relu_backward(
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        grad.numel() // channels,
        channels,
        gate_code(gate),
        gate.data_ptr(),
        d.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return d, sums
