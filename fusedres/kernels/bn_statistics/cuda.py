"""Batch statistics in CUDA (csrc/bn_statistics)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.cuda_core import code, launch
from fusedres.kernels.reference_core import arithmetic_dtype


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
    rows = x.numel() // channels
    tiles = launch("bn_partial_tiles", x.device, x, code(x), rows, channels) or 1  # on the meta device one will do
    partials = torch.empty((tiles, 2, channels), dtype=arithmetic_dtype(x.dtype), device=x.device)
    row_counts = torch.empty(tiles, dtype=partials.dtype, device=x.device)
    launch("bn_partials", x.device, x, code(x), rows, channels, tiles, partials, row_counts)
    running = (running_mean, running_var, num_batches_tracked)
    return _finalize(partials, row_counts, weight, bias, *running, momentum, eps, x)


def bn_finalize(
    partials: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """See fusedres.ops.bn_finalize."""
    running = (running_mean, running_var, num_batches_tracked)
    return _finalize(partials, rows, weight, bias, *running, momentum, eps, None)


def _finalize(
    partials: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    pivot: Tensor | None,
) -> Tensor:
    tiles, _, channels = partials.shape
    state = torch.empty((4, channels), dtype=partials.dtype, device=partials.device)
    averaged = running_mean is not None and running_var is not None
    launch(
        "bn_finalize",
        partials.device,
        partials,
        rows,
        code(partials),
        tiles,
        channels,
        state,
        weight,
        code(weight),
        bias,
        code(bias),
        running_mean if averaged else None,
        code(running_mean),
        running_var if averaged else None,
        code(running_var),
        num_batches_tracked,
        averaged and momentum is None,
        0.0 if momentum is None else momentum,
        eps,
        pivot,
        code(pivot),
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
    state = torch.empty((4, channels), dtype=arithmetic_dtype(x.dtype), device=running_mean.device)
    launch(
        "bn_frozen",
        state.device,
        code(state),
        channels,
        state,
        weight,
        code(weight),
        bias,
        code(bias),
        running_mean,
        code(running_mean),
        running_var,
        code(running_var),
        eps,
    )
    return state
