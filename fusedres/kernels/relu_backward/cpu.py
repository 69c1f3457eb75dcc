"""The gradient that passes a ReLU in C++ (csrc/relu_backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import gate_of, matrix_of
from fusedres.kernels.cpu_core import empty_like


def relu_backward(grad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.relu_backward."""
    matrix = matrix_of(grad)
    d = empty_like(grad)
    sums = grad.new_empty(matrix[-1], dtype=torch.float64 if grad.dtype is torch.float64 else torch.float32)
    _C.relu_backward(matrix, gate_of(gate), d.data_ptr(), sums.data_ptr(), torch.get_num_threads())
    return d, sums
