"""Gradient of a convolution's input in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.kernels.reference_core import affine, masked, per_channel
from fusedres.values import Geometry, Gradient, Raw, ShortcutGradient, arithmetic_dtype


def conv_dgrad(
    gradient: Gradient,
    weight: Tensor,
    input_size: Sequence[int],
    geometry: Geometry,
    input: Raw | None = None,
    shortcut: ShortcutGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.conv_dgrad; all rows are one tile."""
    grad, gate, y, coefficients = gradient
    stride, padding, dilation = geometry
    dtype = arithmetic_dtype(grad.dtype)
    if y is not None and coefficients is not None:
        a, c1, mean, k = (per_channel(row) for row in coefficients)
        d = masked(grad, gate).to(dtype)
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
    if shortcut is not None:
        share = masked(shortcut.grad, shortcut.gate)[:, : dx.shape[1]]
        dx[:, :, :: shortcut.stride, :: shortcut.stride] += share
    if input is None or input.state is None:
        return dx.to(grad.dtype).contiguous(memory_format=torch.channels_last), sums
    dx = dx.masked_fill(affine(input.y, input.state) <= 0, 0)
    dx = dx.to(grad.dtype).contiguous(memory_format=torch.channels_last)
    d = dx.to(dtype)
    normalised = (input.y.to(dtype) - per_channel(input.state[0])) * per_channel(input.state[1])
    return dx, torch.stack((d.sum((0, 2, 3)), (d * normalised).sum((0, 2, 3)))).unsqueeze(0)
