"""Batch statistics in C++ (csrc/bn_statistics)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import DTYPE_CODE, matrix_of, norm_of


def bn_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    matrix = matrix_of(x)
    state = x.new_empty((4, matrix[-1]), dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    _C.bn_statistics(
        matrix,
        state.data_ptr(),
        norm_of(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps),
        torch.get_num_threads(),
    )
    return state


def bn_frozen(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> Tensor:
    """See fusedres.ops.bn_frozen."""
    channels = running_mean.shape[0]
    state = x.new_empty((4, channels), dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    norm = norm_of(weight, bias, running_mean, running_var, None, 0.0, eps)
    _C.bn_frozen(DTYPE_CODE[x.dtype], channels, state.data_ptr(), norm)
    return state
