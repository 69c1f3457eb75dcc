"""The shortcut's share of the input gradient in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.reference_core import gated


def shortcut_grad_(grad_x: Tensor, grad: Tensor, gate: Tensor | None, stride: int) -> None:
    """See fusedres.ops.shortcut_grad."""
    grad_x[:, :, ::stride, ::stride] += gated(grad, gate)[:, : grad_x.shape[1]]
