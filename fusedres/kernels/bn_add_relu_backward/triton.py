"""Backward of BatchNorm under a ReLU in Triton: the three launches of kernels/bn_backward, one after another.

The sums are left out if nothing needs them, and x is not read again if its statistics are constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.bn_backward.triton import Elementwise, apply_launch, coefficients_launch, reduce_launch
from fusedres.kernels.triton_core.gate import gate_kind
from fusedres.values import BnBranch, Gated, NormState, Raw


def bn_add_relu_backward(
    gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu_backward."""
    grad_x = torch.empty_like(x.x)
    grad_shortcut = grad_x.new_empty(0) if shortcut is None else torch.empty_like(shortcut.x)
    sums = _backward(gated, gate_kind(gated.gate), x, grad_x, shortcut, grad_shortcut, with_sums)
    return grad_x, grad_shortcut, sums


def bn_add_relu_backward_(gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    grad_shortcut = None if shortcut is None else shortcut.x
    return _backward(gated, gate_kind(gated.gate), x, x.x, shortcut, grad_shortcut, with_sums)


def bn_relu_backward_(grad: Tensor, x: BnBranch, relu: bool, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    return _backward(Gated(grad, None), "affine" if relu else "none", x, grad, None, None, with_sums)


def bn_relu_backward_add_(grad: Tensor, x: BnBranch, added: Tensor, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    sums = bn_relu_backward_(grad, x, True, with_sums)
    grad.add_(added)
    return sums


def _backward(
    gated: Gated,
    kind: str,
    x: BnBranch,
    out: Tensor,
    shortcut: BnBranch | None,
    shortcut_out: Tensor | None,
    with_sums: bool,
) -> Tensor:
    channels = x.x.shape[1]
    shortcut_raw = None if shortcut is None else Raw(shortcut.x, shortcut.state)
    shortcut_state = None if shortcut is None else NormState(*shortcut[1:])
    if with_sums or x.batch_statistics or (shortcut is not None and shortcut.batch_statistics):
        partials = reduce_launch(gated, kind, Raw(x.x, x.state), shortcut_raw)
    else:
        partials = x.state.new_empty((0, 2, channels))
    sums = x.state.new_empty((3, channels))
    count = max(x.x.numel() // channels, 1)
    coefficients, shortcut_coefficients = coefficients_launch(partials, count, NormState(*x[1:]), shortcut_state, sums)
    first = Elementwise(x.x if x.batch_statistics or kind == "affine" else None, coefficients, out)
    second = None
    if shortcut is not None and shortcut_coefficients is not None and shortcut_out is not None:
        second = Elementwise(shortcut.x if shortcut.batch_statistics else None, shortcut_coefficients, shortcut_out)
    apply_launch(gated, kind, first, second, x.state if kind == "affine" else None)
    return sums
