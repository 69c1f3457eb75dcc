"""The shortcut's share of the input gradient in CUDA (csrc/shortcut_grad)."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.cpu_core import gate_code
from fusedres.kernels.cuda_core import code, launch


def shortcut_grad_(grad_x: Tensor, grad: Tensor, gate: Tensor | None, stride: int) -> None:
    """See fusedres.ops.shortcut_grad."""
    n, c, h, w = grad_x.shape
    arguments = (grad_x, code(grad_x), n, h, w, stride, c, grad, grad.shape[1], gate_code(gate), gate)
    launch("shortcut_grad_", grad_x.device, *arguments)
