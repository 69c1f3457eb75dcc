"""Gradient of a convolution's input in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.kernels.reference_core import affine, arithmetic_dtype, gated, per_channel


def conv_dgrad(
    grad: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input: Tensor | None,
    input_state: Tensor | None,
    shortcut_grad: Tensor | None,
    shortcut_gate: Tensor | None,
    shortcut_stride: int,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.conv_dgrad; the sums are one tile's."""
    dtype = arithmetic_dtype(grad.dtype)
    if y is not None and coefficients is not None:
        a, c1, mean, k = (per_channel(row) for row in coefficients)
        d = gated(grad, gate).to(dtype)
        grad = (a * (d - c1 - (y.to(dtype) - mean) * k)).to(grad.dtype)
    dx, _, _ = torch.ops.aten.convolution_backward.default(
        grad.to(dtype),
        torch.empty(tuple(input_size), dtype=dtype, device=grad.device),  # only its size is used
        weight.to(dtype),
        None,
        list(stride),
        list(padding),
        list(dilation),
        False,
        [0, 0],
        1,
        [True, False, False],
    )
    sums = torch.empty(0, dtype=dtype, device=grad.device)
    if shortcut_grad is not None:
        share = gated(shortcut_grad, shortcut_gate)[:, : dx.shape[1]]
        dx[:, :, ::shortcut_stride, ::shortcut_stride] += share
    if input is not None and input_state is not None:
        dx = dx.masked_fill(affine(input, input_state) <= 0, 0)
    dx = dx.to(grad.dtype).contiguous(memory_format=torch.channels_last)
    if input is not None and input_state is not None:
        d = dx.to(dtype)
        normalised = (input.to(dtype) - per_channel(input_state[0])) * per_channel(input_state[1])
        sums = torch.stack((d.sum((0, 2, 3)), (d * normalised).sum((0, 2, 3)))).unsqueeze(0)
    return dx, sums
