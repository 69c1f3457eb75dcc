"""The shortcut's share of the input gradient in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.reference_core import masked
from fusedres.values import ShortcutGradient


def shortcut_grad_(grad_x: Tensor, shortcut: ShortcutGradient) -> None:
    """See fusedres.ops.shortcut_grad."""
    grad, gate, stride = shortcut
    grad_x[:, :, ::stride, ::stride] += masked(grad, gate)[:, : grad_x.shape[1]]
