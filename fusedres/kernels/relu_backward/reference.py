"""The gradient that passes a ReLU in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import arithmetic_dtype, gated


def relu_backward(grad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.relu_backward."""
    d = gated(grad, gate).contiguous(memory_format=torch.channels_last)
    return d, d.to(arithmetic_dtype(d.dtype)).sum((0, 2, 3))
