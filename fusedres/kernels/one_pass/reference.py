"""One-pass statistics and gradients (ops.one_pass) as torch's own matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.bn_statistics.reference import normalisation, update_running
from fusedres.values import Gram, GramState, Norm


def one_pass_statistics(conv_weight: Tensor, gram: Gram, count: int, norm: Norm) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass."""
    pivot, total, squares = gram
    matrix = conv_weight.detach().reshape(conv_weight.shape[:2]).double()
    centre = total / count
    projected = matrix @ torch.addr(
        squares / count, centre, centre, alpha=-1
    )  # in float64, because cancellation is worse in squares
    mean = matrix @ centre
    var = (projected * matrix).sum(1).clamp_(min=0)
    moved = mean + matrix @ pivot.double()
    update_running(moved, var, count, norm)
    return normalisation(mean, var, norm.weight, norm.bias, norm.eps).to(pivot.dtype), projected.to(pivot.dtype)


def one_pass_backward(
    d: Tensor, sum_d: Tensor, z: Tensor, conv_weight: Tensor, gram_state: GramState, with_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass."""
    state = gram_state.state
    channels, in_channels = conv_weight.shape[:2]
    dtype = state.dtype
    rows_d = d.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    rows_z = z.permute(0, 2, 3, 1).reshape(-1, in_channels).to(dtype)
    matrix = conv_weight.detach().reshape(channels, in_channels).to(dtype)
    grad_conv, grad_weight, quadratic, constant = small_products(
        rows_d.T @ rows_z, sum_d, matrix, gram_state, rows_z.shape[0]
    )
    if with_input:
        grad_z = torch.addmm(constant, rows_d, state[2].unsqueeze(1) * matrix).addmm_(rows_z, quadratic, alpha=-1)
        n, _, h, w = z.shape
        grad_z = grad_z.to(z.dtype).view(n, h, w, in_channels).permute(0, 3, 1, 2)
    else:
        grad_z = z.new_empty(0)
    return grad_z, grad_conv.view(conv_weight.shape).to(conv_weight.dtype), grad_weight


def small_products(
    cross: Tensor, sum_d: Tensor, matrix: Tensor, gram_state: GramState, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dW, dγ, Q and dz's constant row, computed from G = dᵀz'; none is larger than the weight."""
    state, _, total = gram_state
    grad_conv, grad_weight = parameter_grads(cross, sum_d, matrix, gram_state, count)
    quadratic = quadratic_form(matrix, grad_weight, state, count)
    constant = (total.to(state.dtype) @ quadratic) / count - (state[2] * sum_d / count) @ matrix
    return grad_conv, grad_weight, quadratic, constant


def parameter_grads(
    cross: Tensor, sum_d: Tensor, matrix: Tensor, gram_state: GramState, count: int
) -> tuple[Tensor, Tensor]:
    """Return dW and dγ."""
    state, projected, total = gram_state
    mean, invstd, scale, _ = state
    grad_weight = invstd * torch.addcmul((matrix * cross).sum(1), mean, sum_d, value=-1)
    grad_conv = torch.addr(scale.unsqueeze(1) * cross, scale * sum_d / count, total.to(state.dtype), alpha=-1)
    grad_conv.addcmul_((scale * invstd * grad_weight).unsqueeze(1), projected, value=-1)
    return grad_conv, grad_weight


def quadratic_form(matrix: Tensor, grad_weight: Tensor, state: Tensor, count: int) -> Tensor:
    """Return Q = Wᵀ·diag(c2)·W."""
    c2 = state[2] * state[1] * grad_weight / count
    return (matrix * c2.unsqueeze(1)).T @ matrix
