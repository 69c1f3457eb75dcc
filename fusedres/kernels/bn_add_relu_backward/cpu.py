"""Backward of BatchNorm under a ReLU in C++ (csrc/bn_add_relu_backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import NO_GATE, RECOMPUTED_GATE, Gate, address, branch_of, gate_of, matrix_of
from fusedres.kernels.cpu_core import empty_like
from fusedres.values import BnBranch, Gated


def bn_add_relu_backward(
    gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu_backward."""
    grad_x = empty_like(x.x)
    grad_shortcut = grad_x.new_empty(0) if shortcut is None else empty_like(shortcut.x)
    sums = _launch(gated.grad, gate_of(gated.gate), x, grad_x, shortcut, grad_shortcut, with_sums)
    return grad_x, grad_shortcut, sums


def bn_add_relu_backward_(gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    grad_shortcut = None if shortcut is None else shortcut.x
    return _launch(gated.grad, gate_of(gated.gate), x, x.x, shortcut, grad_shortcut, with_sums)


def bn_relu_backward_(grad: Tensor, x: BnBranch, relu: bool, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    return _launch(grad, RECOMPUTED_GATE if relu else NO_GATE, x, grad, None, None, with_sums)


def bn_relu_backward_add_(grad: Tensor, x: BnBranch, added: Tensor, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    return _launch(grad, RECOMPUTED_GATE, x, grad, None, None, with_sums, added)


def _launch(
    grad: Tensor,
    gate: Gate,
    x: BnBranch,
    grad_x: Tensor,
    shortcut: BnBranch | None,
    grad_shortcut: Tensor | None,
    with_sums: bool,
    added: Tensor | None = None,
) -> Tensor:
    sums = (x.state.new_empty if grad.numel() else x.state.new_zeros)((3, grad.shape[1]))
    _C.bn_add_relu_backward(
        matrix_of(grad),
        gate,
        branch_of(x, grad_x),
        branch_of(shortcut, grad_shortcut),
        sums.data_ptr(),
        with_sums or x.batch_statistics or (shortcut is not None and shortcut.batch_statistics),
        True,
        address(added),
        torch.get_num_threads(),
    )
    return sums
