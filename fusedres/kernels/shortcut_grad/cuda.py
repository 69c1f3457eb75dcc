"""The shortcut's share of the input gradient in CUDA (csrc/shortcut_grad)."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.arguments import gate_of, pixels_of
from fusedres.kernels.cuda_core import launch


def shortcut_grad_(grad_x: Tensor, grad: Tensor, gate: Tensor | None, stride: int) -> None:
    """See fusedres.ops.shortcut_grad."""
    launch("shortcut_grad_", grad_x.device, pixels_of(grad_x, stride), grad, grad.shape[1], gate_of(gate))
