"""The gradient that passes a ReLU in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import masked
from fusedres.values import Gated, arithmetic_dtype


def relu_backward(gated: Gated) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.relu_backward."""
    grad, gate = gated
    d = masked(grad, gate).contiguous(memory_format=torch.channels_last)
    return d, d.to(arithmetic_dtype(d.dtype)).sum((0, 2, 3))
