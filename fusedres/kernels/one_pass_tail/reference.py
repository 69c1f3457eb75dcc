"""The one-pass tail in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.one_pass.reference import parameter_grads, quadratic_form
from fusedres.kernels.reference_core import affine, pack_bits, per_channel
from fusedres.kernels.reference_core import masked as masked_gradient
from fusedres.values import Centred, Folded, Gated, GramState, ShortcutInput, arithmetic_dtype

# Rows of dz per pair of partial sums (one_pass_dgrad).
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
    z: Centred,
    z_state: Tensor | None,
    folded: Folded,
    shortcut: ShortcutInput | None,
    x: Centred | None,
    x_folded: Folded | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    source = z.z
    dtype = arithmetic_dtype(source.dtype)
    out = torch.addmm(folded.offset, rows(centred(z, z_state)).to(dtype), folded.folded.to(dtype).T)
    if x is not None and x_folded is not None:
        out += torch.addmm(x_folded.offset, rows(centred(x, None)).to(dtype), x_folded.folded.to(dtype).T)
    out = activation(out, z)
    if shortcut is not None:
        share = shortcut.x[:, :, :: shortcut.stride, :: shortcut.stride]
        out[:, : share.shape[1]] += share if shortcut.state is None else affine(share, shortcut.state)
    mask = pack_bits(~(out <= 0)) if with_mask else torch.empty(0, dtype=torch.uint8, device=source.device)
    return out.relu_().to(source.dtype), mask


def one_pass_reduce(
    gated: Gated, z: Centred, z_state: Tensor | None, x: Centred | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    dtype = arithmetic_dtype(gated.grad.dtype)
    d = rows(masked_gradient(*gated)).to(dtype)
    cross = d.T @ rows(centred(z, z_state)).to(dtype)
    if x is None:
        x_cross = cross.new_empty((d.shape[1], 0))
    else:
        x_cross = d.T @ rows(centred(x, None)).to(dtype)
    return cross, x_cross, d.sum(0)


def one_pass_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    gram_state: GramState,
    count: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    state, _, total = gram_state
    matrix = conv_weight.detach().reshape(conv_weight.shape[:2]).to(state.dtype)
    grads, grad_weight = parameter_grads(cross, sum_d, matrix, gram_state, count)
    grad_conv = torch.empty_like(conv_weight).copy_(grads.view(conv_weight.shape))
    quadratic = quadratic_form(matrix, grad_weight, state, count).to(dtype)
    centre = (total / count).to(state.dtype).unsqueeze(1)
    mean_d = (sum_d / count).unsqueeze(1)
    return grad_conv, grad_weight, quadratic, (centre * quadratic).sum(0) - (mean_d * folded).sum(0)  # no TF32


def one_pass_dgrad(
    gated: Gated, z: Centred, z_state: Tensor | None, folded: Tensor, quadratic: Tensor, constant: Tensor, masked: bool
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    source = z.z
    dtype, channels = arithmetic_dtype(source.dtype), source.shape[1]
    grad_z = torch.addmm(constant, rows(masked_gradient(*gated)).to(dtype), folded.to(dtype))
    grad_z.addmm_(rows(centred(z, z_state)).to(dtype), quadratic.to(dtype), alpha=-1)
    if not masked:
        return activation(grad_z, z).to(source.dtype), constant.new_empty((0, 2, channels))
    assert z_state is not None  # checked by the op
    taken = source[:, :, :: z.stride, :: z.stride]
    grad_z = grad_z.masked_fill(rows(affine(taken, z_state) <= 0), 0).to(source.dtype)
    normalised = (rows(taken).to(dtype) - z_state[0]) * z_state[1]
    sums = torch.stack((grad_z.to(dtype), grad_z * normalised))
    sums = torch.nn.functional.pad(sums, (0, 0, 0, -sums.shape[1] % ROWS_A_PARTIAL))
    partials = sums.view(2, -1, ROWS_A_PARTIAL, channels).sum(2).transpose(0, 1)
    return activation(grad_z, z), partials.contiguous()


def centred(z: Centred, state: Tensor | None) -> Tensor:
    """Return relu(scale·z + shift) − pivot, or z − pivot, of every stride-th pixel, rounded to z's dtype."""
    taken = z.z[:, :, :: z.stride, :: z.stride]
    wide = taken.to(z.pivot.dtype) if state is None else affine(taken, state).relu_()
    return (wide - per_channel(z.pivot)).to(taken.dtype)


def rows(x: Tensor) -> Tensor:
    """Return (N, C, H, W) as (N·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def activation(matrix: Tensor, z: Centred) -> Tensor:
    """Return (N·P·Q, C) as (N, C, P, Q), channels_last, on the grid of z's strided pixels."""
    n, _, h, w = z.z[:, :, :: z.stride, :: z.stride].shape
    return matrix.view(n, h, w, matrix.shape[1]).permute(0, 3, 1, 2)
