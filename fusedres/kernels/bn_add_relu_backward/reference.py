"""Backward of BatchNorm under a ReLU in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import affine, masked, per_channel
from fusedres.values import BnBranch, Gated


def _branch(d: Tensor, branch: BnBranch) -> tuple[Tensor, Tensor]:
    """Return grad_x and Σd·x̂ of one branch; d is in the arithmetic type."""
    x, state, batch_statistics = branch
    mean, invstd, scale, _ = state
    normalised = (x.to(d.dtype) - per_channel(mean)) * per_channel(invstd)
    product = (d * normalised).sum((0, 2, 3))
    if batch_statistics:
        count = x.numel() // x.shape[1]
        d = d - per_channel(d.sum((0, 2, 3)) / count) - normalised * per_channel(product / count)
    grad = (d * per_channel(scale)).to(x.dtype).contiguous(memory_format=torch.channels_last)
    return grad, product


def bn_add_relu_backward(
    gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu_backward; the sums are always computed."""
    d = masked(*gated).to(x.state.dtype)
    grad_x, product = _branch(d, x)
    grad_shortcut, shortcut_product = x.x.new_empty(0), torch.zeros_like(product)
    if shortcut is not None:
        grad_shortcut, shortcut_product = _branch(d, shortcut)
    return grad_x, grad_shortcut, torch.stack((d.sum((0, 2, 3)), product, shortcut_product))


def bn_relu_backward_(grad: Tensor, x: BnBranch, relu: bool, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    d = grad.to(x.state.dtype)
    if relu:
        d = masked(d, affine(x.x, x.state))
    grad_x, product = _branch(d, x)
    sums = torch.stack((d.sum((0, 2, 3)), product, torch.zeros_like(product)))
    grad.copy_(grad_x)  # last: d may be grad itself
    return sums


def bn_relu_backward_add_(grad: Tensor, x: BnBranch, added: Tensor, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    sums = bn_relu_backward_(grad, x, True, with_sums)
    grad.add_(added)
    return sums


def bn_add_relu_backward_(gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    grad_x, grad_shortcut, sums = bn_add_relu_backward(gated, x, shortcut, with_sums)
    x.x.copy_(grad_x)
    if shortcut is not None:
        shortcut.x.copy_(grad_shortcut)
    return sums
