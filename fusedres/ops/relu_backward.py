"""The gradient that passes the tail's ReLU, and its column sums."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import activation, gate
from fusedres.ops._library import op
from fusedres.values import Gated, arithmetic_dtype


@op("relu_backward", {"grad": activation("N C H W"), "gate": gate("N C H W", required=True)})
def relu_backward(gated: Gated, *, backend: str) -> tuple[Tensor, Tensor]:
    """d of Gated, written out; and Σd (C,), float64 for float64, else float32."""
    grad = gated.grad
    sums = grad.new_empty(grad.shape[1], dtype=arithmetic_dtype(grad.dtype))
    return torch.empty_like(grad, memory_format=torch.channels_last), sums
