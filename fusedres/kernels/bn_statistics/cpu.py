"""Batch statistics in C++ (csrc/bn_statistics)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.cpu_core import DTYPE_CODE, address, code


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
    channels = x.shape[1]
    state = x.new_empty((4, channels), dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    _C.bn_statistics(
        x.data_ptr(),
        DTYPE_CODE[x.dtype],
        x.numel() // channels,
        channels,
        state.data_ptr(),
        address(weight),
        code(weight),
        address(bias),
        code(bias),
        address(running_mean),
        code(running_mean),
        address(running_var),
        code(running_var),
        address(num_batches_tracked),
        momentum is None,
        0.0 if momentum is None else momentum,
        eps,
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
    _C.bn_frozen(
        DTYPE_CODE[x.dtype],
        channels,
        state.data_ptr(),
        address(weight),
        code(weight),
        address(bias),
        code(bias),
        running_mean.data_ptr(),
        code(running_mean),
        running_var.data_ptr(),
        code(running_var),
        eps,
    )
    return state
