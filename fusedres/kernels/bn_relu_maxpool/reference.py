"""BatchNorm's affine map, ReLU and the stem's max-pool in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.kernels.bn_add_relu_backward.reference import bn_relu_backward_
from fusedres.kernels.bn_backward.reference import bn_backward_apply, bn_backward_reduce
from fusedres.kernels.conv_wgrad.reference import conv_wgrad
from fusedres.kernels.reference_core import affine
from fusedres.values import BnBranch, BnGradient, Gated, Geometry, Gradient, Pooled, Raw

_CHANNELS_LAST = torch.channels_last
CLOSED = 9  # a window's argmax if its ReLU is closed


def bn_relu_maxpool(x: Tensor, state: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool."""
    width = x.shape[3]
    out, index = F.max_pool2d(affine(x, state).relu_(), 3, 2, 1, return_indices=True)
    out = out.to(x.dtype).contiguous(memory_format=_CHANNELS_LAST)
    if not with_argmax:
        return out, x.new_empty(0, dtype=torch.uint8)
    top = 2 * torch.arange(out.shape[2], device=x.device).view(-1, 1) - 1
    left = 2 * torch.arange(out.shape[3], device=x.device) - 1
    place = ((index // width - top) * 3 + index % width - left).masked_fill_(out <= 0, CLOSED)
    return out, place.to(torch.uint8).contiguous(memory_format=_CHANNELS_LAST)


def bn_relu_maxpool_backward(pooled: Pooled, x: BnBranch, with_sums: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool; the sums are always computed."""
    d = _unpooled(pooled, x.x, x.state.dtype)
    sums = bn_relu_backward_(d, x, False, with_sums)
    return d.to(x.x.dtype), sums[:2]


def bn_relu_maxpool_backward_(pooled: Pooled, x: BnBranch, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_relu_maxpool."""
    grad_x, sums = bn_relu_maxpool_backward(pooled, x, with_sums)
    x.x.copy_(grad_x)
    return sums


def bn_relu_maxpool_reduce(pooled: Pooled, x: Tensor, state: Tensor) -> Tensor:
    """See fusedres.ops.bn_relu_maxpool; all windows are one tile."""
    return bn_backward_reduce(Gated(_unpooled(pooled, x, state.dtype), None), Raw(x, state))


def bn_relu_maxpool_wgrad(
    pooled: Pooled, y: BnGradient, input: Tensor, kernel: Sequence[int], geometry: Geometry
) -> Tensor:
    """See fusedres.ops.bn_relu_maxpool; there is one split."""
    d = _unpooled(pooled, y.y, y.coefficients.dtype)
    dy, _ = bn_backward_apply(Gradient(d, None, *y))
    return conv_wgrad(Gradient(dy), Raw(input, None), kernel, geometry)


def _unpooled(pooled: Pooled, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of scale·x + shift, of x's size, in dtype: each window adds its own at its argmax."""
    grad, argmax = pooled
    n, c, rows, columns = grad.shape
    wide = grad.to(dtype)
    padded = wide.new_zeros((n, c, 2 * rows + 1, 2 * columns + 1))
    for place in range(9):
        top, left = place // 3, place % 3
        here = padded[:, :, top : top + 2 * rows : 2, left : left + 2 * columns : 2]
        here += wide.masked_fill(argmax != place, 0)
    inside = padded[:, :, 1 : 1 + x.shape[2], 1 : 1 + x.shape[3]]
    return inside.contiguous(memory_format=_CHANNELS_LAST)
