"""The shortcut's share of the input gradient in C++ (csrc/shortcut_grad)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import gate_of, pixels_of


def shortcut_grad_(grad_x: Tensor, grad: Tensor, gate: Tensor | None, stride: int) -> None:
    """See fusedres.ops.shortcut_grad."""
    threads = torch.get_num_threads()
    _C.shortcut_grad(pixels_of(grad_x, stride), grad.data_ptr(), grad.shape[1], gate_of(gate), threads)
