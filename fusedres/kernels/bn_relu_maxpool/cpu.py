"""BatchNorm's affine map, ReLU and the stem's max-pool in C++ (csrc/bn_relu_maxpool)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.cpu_core import DTYPE_CODE, empty_channels_last, empty_like


def bn_relu_maxpool(x: Tensor, state: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool."""
    n, c, h, w = x.shape
    out = empty_channels_last((n, c, (h + 1) // 2, (w + 1) // 2), x)
    argmax = torch.empty_like(out, dtype=torch.uint8) if with_argmax else x.new_empty(0, dtype=torch.uint8)
    _C.bn_relu_maxpool(
        x.data_ptr(),
        DTYPE_CODE[x.dtype],
        n,
        h,
        w,
        c,
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
    n, c, h, w = x.shape
    sums = (state.new_empty if n else state.new_zeros)((2, c))
    _C.bn_relu_maxpool_backward(
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        n,
        h,
        w,
        c,
        argmax.data_ptr(),
        x.data_ptr(),
        state.data_ptr(),
        batch_statistics,
        grad_x.data_ptr(),
        sums.data_ptr(),
        with_sums or batch_statistics,
        torch.get_num_threads(),
    )
    return sums
