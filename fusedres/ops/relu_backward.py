"""The gradient that passes the tail's ReLU, and its column sums."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import activation, gate
from fusedres.ops._library import Op
from fusedres.ops._sizes import arithmetic_dtype


def _fake(grad: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    sums = grad.new_empty(grad.shape[1], dtype=arithmetic_dtype(grad))
    return torch.empty_like(grad, memory_format=torch.channels_last), sums


RELU_BACKWARD = Op(
    "relu_backward(Tensor grad, Tensor gate, str backend) -> (Tensor, Tensor)",
    "relu_backward",
    {"grad": activation("N C H W"), "gate": gate("N C H W")},
    _fake,
)


def relu_backward(grad: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """d = grad where NOT (out <= 0), else 0, and Σd per channel.

    Args:
        grad: (N, C, H, W), channels_last; left as it is.
        gate: the ReLU's output out, like grad, or its packed bits (see bn_add_relu).
        backend: "reference", "cpu", "triton" or "cuda".

    Returns:
        d like grad, and Σd (C,), float64 for float64, else float32.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    d, sums = RELU_BACKWARD(grad, gate, backend)
    return d, sums
