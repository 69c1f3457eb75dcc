"""Backward of BatchNorm under a ReLU in C++ (csrc/bn_add_relu_backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import NO_GATE, RECOMPUTED_GATE, Gate, address, gate_of, matrix_of
from fusedres.kernels.cpu_core import empty_like


def bn_add_relu_backward(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    batch_statistics: bool,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu_backward."""
    grad_x = empty_like(x)
    grad_shortcut = x.new_empty(0) if shortcut_x is None else empty_like(shortcut_x)
    sums = _launch(
        grad,
        gate_of(gate),
        x,
        state,
        batch_statistics,
        grad_x,
        shortcut_x,
        shortcut_state,
        shortcut_batch_statistics,
        grad_shortcut,
        with_sums,
    )
    return grad_x, grad_shortcut, sums


def bn_add_relu_backward_(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    batch_statistics: bool,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
    with_sums: bool,
) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    return _launch(
        grad,
        gate_of(gate),
        x,
        state,
        batch_statistics,
        x,
        shortcut_x,
        shortcut_state,
        shortcut_batch_statistics,
        shortcut_x,
        with_sums,
    )


def bn_relu_backward_(
    grad: Tensor, x: Tensor, state: Tensor, gated: bool, batch_statistics: bool, with_sums: bool
) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward.bn_relu_backward_."""
    gate = RECOMPUTED_GATE if gated else NO_GATE
    return _launch(grad, gate, x, state, batch_statistics, grad, None, None, False, None, with_sums)


def _launch(
    grad: Tensor,
    gate: Gate,
    x: Tensor,
    state: Tensor,
    batch_statistics: bool,
    grad_x: Tensor,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
    grad_shortcut: Tensor | None,
    with_sums: bool,
) -> Tensor:
    matrix = matrix_of(grad)
    sums = state.new_empty((3, matrix[-1]))
    _C.bn_add_relu_backward(
        matrix,
        gate,
        (x.data_ptr(), state.data_ptr(), batch_statistics, grad_x.data_ptr()),
        (address(shortcut_x), address(shortcut_state), shortcut_batch_statistics, address(grad_shortcut)),
        sums.data_ptr(),
        with_sums or batch_statistics or shortcut_batch_statistics,
        torch.get_num_threads(),
    )
    return sums
