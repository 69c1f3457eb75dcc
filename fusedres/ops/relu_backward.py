"""The gradient that passes the tail's ReLU, and its column sums."""

from __future__ import annotations

import torch
from fusedres.ops import _checks
from fusedres.ops._library import Kernels, define
from torch import Tensor

_KERNELS = Kernels("relu_backward")


def _relu_backward(grad: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    _checks.activation("relu_backward", "grad", grad, backend)
    _checks.gate("relu_backward", "gate", gate, grad)
    d, sums = _KERNELS[backend].relu_backward(grad, gate)
    return d, sums


def _fake(grad: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    sums = grad.new_empty(grad.shape[1], dtype=_checks.arithmetic_dtype(grad))
    return torch.empty_like(grad, memory_format=torch.channels_last), sums


_op = define("relu_backward(Tensor grad, Tensor gate, str backend) -> (Tensor, Tensor)", _relu_backward, _fake)


def relu_backward(grad: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """d = grad where NOT (out <= 0), else 0, and Σd per channel.

    Args:
        grad: (N, C, H, W), channels_last; left as it is.
        gate: the ReLU's output out, like grad, or its packed bits (see bn_add_relu).
        backend: "reference" or "cpu".

    Returns:
        d like grad, and Σd (C,), float64 for float64, else float32.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    d, sums = _op(grad, gate, backend)
    return d, sums
