"""The one-pass tail in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.one_pass.reference import parameter_grads, quadratic_form
from fusedres.kernels.reference_core import affine, arithmetic_dtype, gated, pack_bits, per_channel

# Rows of dz behind one pair of partial sums (one_pass_dgrad).
ROWS_A_PARTIAL = 64


def one_pass_fold(
    conv_weight: Tensor, state: Tensor, total: Tensor, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    mean, _, scale, shift = state
    matrix = conv_weight.detach().reshape(conv_weight.shape[:2]).to(state.dtype)
    folded = (scale.unsqueeze(1) * matrix).to(dtype).contiguous()
    centre = (total / count).to(state.dtype)
    return folded, torch.addcmul(shift, scale, mean) - (folded * centre).sum(1)  # in the centre's dtype: no TF32


def one_pass_tail(
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    offset: Tensor,
    stride: int,
    shortcut: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_stride: int,
    x: Tensor | None,
    x_pivot: Tensor | None,
    x_folded: Tensor | None,
    x_offset: Tensor | None,
    x_stride: int,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    dtype = arithmetic_dtype(z.dtype)
    out = torch.addmm(offset, rows(centred(z, state, pivot, stride)).to(dtype), folded.to(dtype).T)
    if x is not None:
        assert x_pivot is not None and x_folded is not None and x_offset is not None  # checked by the op
        out += torch.addmm(x_offset, rows(centred(x, None, x_pivot, x_stride)).to(dtype), x_folded.to(dtype).T)
    out = activation(out, z, stride)
    if shortcut is not None:
        shortcut = shortcut[:, :, ::shortcut_stride, ::shortcut_stride]
        out[:, : shortcut.shape[1]] += shortcut if shortcut_state is None else affine(shortcut, shortcut_state)
    mask = pack_bits(~(out <= 0)) if with_mask else torch.empty(0, dtype=torch.uint8, device=z.device)
    return out.relu_().to(z.dtype), mask


def one_pass_reduce(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    stride: int,
    x: Tensor | None,
    x_pivot: Tensor | None,
    x_stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail_backward."""
    dtype = arithmetic_dtype(grad.dtype)
    d = rows(gated(grad, gate)).to(dtype)
    cross = d.T @ rows(centred(z, state, pivot, stride)).to(dtype)
    if x is None or x_pivot is None:
        x_cross = cross.new_empty((d.shape[1], 0))
    else:
        x_cross = d.T @ rows(centred(x, None, x_pivot, x_stride)).to(dtype)
    return cross, x_cross, d.sum(0)


def one_pass_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    count: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail_backward."""
    matrix = conv_weight.detach().reshape(conv_weight.shape[:2]).to(state.dtype)
    grads, grad_weight = parameter_grads(cross, sum_d, matrix, state, projected, total, count)
    grad_conv = torch.empty_like(conv_weight).copy_(grads.view(conv_weight.shape))
    quadratic = quadratic_form(matrix, grad_weight, state, count).to(dtype)
    centre = (total / count).to(state.dtype).unsqueeze(1)
    mean_d = (sum_d / count).unsqueeze(1)
    return grad_conv, grad_weight, quadratic, (centre * quadratic).sum(0) - (mean_d * folded).sum(0)  # no TF32


def one_pass_dgrad(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    quadratic: Tensor,
    constant: Tensor,
    stride: int,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail_backward."""
    dtype, channels = arithmetic_dtype(grad.dtype), z.shape[1]
    grad_z = torch.addmm(constant, rows(gated(grad, gate)).to(dtype), folded.to(dtype))
    grad_z.addmm_(rows(centred(z, state, pivot, stride)).to(dtype), quadratic.to(dtype), alpha=-1)
    if not masked:
        return activation(grad_z, z, stride).to(z.dtype), constant.new_empty((0, 2, channels))
    assert state is not None  # checked by the op
    taken = z[:, :, ::stride, ::stride]
    grad_z = grad_z.masked_fill(rows(affine(taken, state) <= 0), 0).to(z.dtype)
    normalised = (rows(taken).to(dtype) - state[0]) * state[1]
    sums = torch.stack((grad_z.to(dtype), grad_z * normalised))
    sums = torch.nn.functional.pad(sums, (0, 0, 0, -sums.shape[1] % ROWS_A_PARTIAL))
    partials = sums.view(2, -1, ROWS_A_PARTIAL, channels).sum(2).transpose(0, 1)
    return activation(grad_z, z, stride), partials.contiguous()


def centred(z: Tensor, state: Tensor | None, pivot: Tensor, stride: int) -> Tensor:
    """relu(scale·z + shift) − pivot, or z − pivot, of every stride-th pixel, rounded to z's dtype."""
    taken = z[:, :, ::stride, ::stride]
    wide = taken.to(pivot.dtype) if state is None else affine(taken, state).relu_()
    return (wide - per_channel(pivot)).to(z.dtype)


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def activation(matrix: Tensor, z: Tensor, stride: int) -> Tensor:
    """(N·P·Q, C) as (N, C, P, Q), channels_last, on the grid of z's strided pixels."""
    n, _, h, w = z[:, :, ::stride, ::stride].shape
    return matrix.view(n, h, w, matrix.shape[1]).permute(0, 3, 1, 2)
