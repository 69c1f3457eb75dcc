"""BatchNorm's affine map, ReLU and the stem's max-pool in C++ (csrc/bn_relu_maxpool)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import branch_of, pixels_of
from fusedres.kernels.cpu_core import empty_channels_last, empty_like
from fusedres.values import BnBranch, Pooled, subsampled


def bn_relu_maxpool(x: Tensor, state: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool."""
    n, c, h, w = x.shape
    out = empty_channels_last((n, c, subsampled(h, 2), subsampled(w, 2)), x)
    argmax = torch.empty_like(out, dtype=torch.uint8) if with_argmax else x.new_empty(0, dtype=torch.uint8)
    _C.bn_relu_maxpool(
        pixels_of(x),
        state.data_ptr(),
        out.data_ptr(),
        argmax.data_ptr() if with_argmax else 0,
        torch.get_num_threads(),
    )
    return out, argmax


def bn_relu_maxpool_backward(pooled: Pooled, x: BnBranch, with_sums: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool."""
    grad_x = empty_like(x.x)
    return grad_x, _launch(pooled, x, with_sums, grad_x)


def bn_relu_maxpool_backward_(pooled: Pooled, x: BnBranch, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_relu_maxpool."""
    return _launch(pooled, x, with_sums, x.x)


def _launch(pooled: Pooled, branch: BnBranch, with_sums: bool, grad_x: Tensor) -> Tensor:
    x, state, batch_statistics = branch
    sums = (state.new_empty if x.numel() else state.new_zeros)((2, x.shape[1]))
    _C.bn_relu_maxpool_backward(
        pooled.grad.data_ptr(),
        pooled.argmax.data_ptr(),
        pixels_of(x),
        branch_of(branch, grad_x),
        sums.data_ptr(),
        with_sums or batch_statistics,
        torch.get_num_threads(),
    )
    return sums
