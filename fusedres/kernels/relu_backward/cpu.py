"""The gradient that passes a ReLU in C++ (csrc/relu_backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import gate_of, matrix_of
from fusedres.kernels.cpu_core import empty_like
from fusedres.values import Gated, arithmetic_dtype


def relu_backward(gated: Gated) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.relu_backward."""
    grad, gate = gated
    d = empty_like(grad)
    new = grad.new_empty if grad.numel() else grad.new_zeros
    sums = new(grad.shape[1], dtype=arithmetic_dtype(grad.dtype))
    _C.relu_backward(matrix_of(grad), gate_of(gate), d.data_ptr(), sums.data_ptr(), torch.get_num_threads())
    return d, sums
