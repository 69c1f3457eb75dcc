"""Backward of BatchNorm under a ReLU in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import affine, per_channel
from fusedres.kernels.reference_core import gated as masked


def _branch(d: Tensor, x: Tensor, state: Tensor, batch_statistics: bool) -> tuple[Tensor, Tensor]:
    """grad_x and Σd·x̂ of one branch, d in the arithmetic type."""
    mean, invstd, scale, _ = state
    normalised = (x.to(d.dtype) - per_channel(mean)) * per_channel(invstd)
    product = (d * normalised).sum((0, 2, 3))
    if batch_statistics:
        count = x.numel() // x.shape[1]
        d = d - per_channel(d.sum((0, 2, 3)) / count) - normalised * per_channel(product / count)
    grad = (d * per_channel(scale)).to(x.dtype).contiguous(memory_format=torch.channels_last)
    return grad, product


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
    """See fusedres.ops.bn_add_relu_backward; the sums are always there."""
    d = masked(grad, gate).to(state.dtype)
    grad_x, product = _branch(d, x, state, batch_statistics)
    grad_shortcut, shortcut_product = x.new_empty(0), torch.zeros_like(product)
    if shortcut_x is not None and shortcut_state is not None:
        grad_shortcut, shortcut_product = _branch(d, shortcut_x, shortcut_state, shortcut_batch_statistics)
    return grad_x, grad_shortcut, torch.stack((d.sum((0, 2, 3)), product, shortcut_product))


def bn_relu_backward_(
    grad: Tensor, x: Tensor, state: Tensor, gated: bool, batch_statistics: bool, with_sums: bool
) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward.bn_relu_backward_."""
    d = grad.to(state.dtype)
    if gated:
        d = masked(d, affine(x, state))
    grad_x, product = _branch(d, x, state, batch_statistics)
    sums = torch.stack((d.sum((0, 2, 3)), product, torch.zeros_like(product)))
    grad.copy_(grad_x)  # last: d may be grad itself
    return sums


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
    grad_x, grad_shortcut, sums = bn_add_relu_backward(
        grad, gate, x, state, batch_statistics, shortcut_x, shortcut_state, shortcut_batch_statistics, with_sums
    )
    x.copy_(grad_x)
    if shortcut_x is not None:
        shortcut_x.copy_(grad_shortcut)
    return sums
