"""Batch statistics in CUDA (csrc/bn_statistics)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.arguments import matrix_of, norm_of, vector_of
from fusedres.kernels.cuda_core import launch
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
    matrix = matrix_of(x)
    tiles = launch("bn_partial_tiles", x.device, matrix) or 1  # any number is right on the meta device
    partials = torch.empty((tiles, 2, x.shape[1]), dtype=arithmetic_dtype(x.dtype), device=x.device)
    row_counts = torch.empty(tiles, dtype=partials.dtype, device=x.device)
    launch("bn_partials", x.device, matrix, tiles, partials, row_counts)
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
    if running_mean is None or running_var is None:
        running_mean, running_var, momentum = None, None, 0.0
    norm = norm_of(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    function, device = "bn_finalize", partials.device
    launch(function, device, vector_of(partials), rows, tiles, channels, state, norm, vector_of(pivot))
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
    norm = norm_of(weight, bias, running_mean, running_var, None, 0.0, eps)
    launch("bn_frozen", state.device, vector_of(state), channels, norm)
    return state
