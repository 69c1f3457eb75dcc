"""Backward of BatchNorm under a ReLU in Triton: the three launches of kernels/bn_backward, one after another.

The sums are left out where nothing needs them, and x is not read again where its statistics are constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.bn_backward.triton import apply_launch, coefficients_launch, reduce_launch
from fusedres.kernels.triton_core.gate import gate_kind


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
    grad_x = torch.empty_like(x)
    grad_shortcut = x.new_empty(0) if shortcut_x is None else torch.empty_like(shortcut_x)
    sums = _backward(
        grad,
        gate,
        x,
        state,
        batch_statistics,
        grad_x,
        shortcut_x,
        shortcut_state,
        shortcut_batch_statistics,
        grad_shortcut,
        with_sums,
        gate_kind(gate),
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
    return _backward(
        grad,
        gate,
        x,
        state,
        batch_statistics,
        x,
        shortcut_x,
        shortcut_state,
        shortcut_batch_statistics,
        shortcut_x,
        with_sums,
        gate_kind(gate),
    )


def bn_relu_backward_(
    grad: Tensor, x: Tensor, state: Tensor, gated: bool, batch_statistics: bool, with_sums: bool
) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward.bn_relu_backward_."""
    kind = "affine" if gated else "none"
    return _backward(grad, None, x, state, batch_statistics, grad, None, None, False, None, with_sums, kind)


def _backward(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    batch_statistics: bool,
    out: Tensor,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
    shortcut_out: Tensor | None,
    with_sums: bool,
    kind: str,
) -> Tensor:
    channels = x.shape[1]
    if shortcut_x is None:
        shortcut_state = shortcut_out = None
        shortcut_batch_statistics = False
    if with_sums or batch_statistics or shortcut_batch_statistics:
        partials = reduce_launch(grad, gate, x, state, shortcut_x, shortcut_state, kind)
    else:
        partials = state.new_empty((0, 2, channels))
    sums = state.new_empty((3, channels))
    coefficients, shortcut_coefficients = coefficients_launch(
        partials,
        max(x.numel() // channels, 1),
        state,
        batch_statistics,
        shortcut_state,
        shortcut_batch_statistics,
        sums,
    )
    apply_launch(
        grad,
        gate,
        x if batch_statistics or kind == "affine" else None,
        coefficients,
        out,
        kind,
        state if kind == "affine" else None,
        shortcut_x if shortcut_batch_statistics else None,
        shortcut_coefficients,
        shortcut_out,
    )
    return sums
