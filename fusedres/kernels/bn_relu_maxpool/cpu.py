"""BatchNorm's affine map, ReLU and the stem's max-pool in C++ (csrc/bn_relu_maxpool)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import pixels_of
from fusedres.kernels.cpu_core import empty_channels_last, empty_like


def bn_relu_maxpool(x: Tensor, state: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool."""
    pixels = pixels_of(x)
    n, h, w, _, c = pixels[2:]
    out = empty_channels_last((n, c, (h + 1) // 2, (w + 1) // 2), x)
    argmax = torch.empty_like(out, dtype=torch.uint8) if with_argmax else x.new_empty(0, dtype=torch.uint8)
    _C.bn_relu_maxpool(
        pixels,
        state.data_ptr(),
        out.data_ptr(),
        argmax.data_ptr() if with_argmax else 0,
        torch.get_num_threads(),
    )
    return out, argmax


def bn_relu_maxpool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, state: Tensor, batch_statistics: bool, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool."""
    grad_x = empty_like(x)
    return grad_x, _launch(grad, argmax, x, state, batch_statistics, with_sums, grad_x)


def bn_relu_maxpool_backward_(
    grad: Tensor, argmax: Tensor, x: Tensor, state: Tensor, batch_statistics: bool, with_sums: bool
) -> Tensor:
    """See fusedres.ops.bn_relu_maxpool."""
    return _launch(grad, argmax, x, state, batch_statistics, with_sums, x)


def _launch(
    grad: Tensor,
    argmax: Tensor,
    x: Tensor,
    state: Tensor,
    batch_statistics: bool,
    with_sums: bool,
    grad_x: Tensor,
) -> Tensor:
    pixels = pixels_of(x)
    sums = (state.new_empty if x.numel() else state.new_zeros)((2, pixels[-1]))
    _C.bn_relu_maxpool_backward(
        grad.data_ptr(),
        argmax.data_ptr(),
        pixels,
        (x.data_ptr(), state.data_ptr(), batch_statistics, grad_x.data_ptr()),
        sums.data_ptr(),
        with_sums or batch_statistics,
        torch.get_num_threads(),
    )
    return sums
