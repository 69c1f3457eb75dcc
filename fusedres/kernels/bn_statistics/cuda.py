"""Batch statistics in CUDA (csrc/bn_statistics)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.arguments import matrix_of, norm_of, vector_of
from fusedres.kernels.cuda_core import launch
from fusedres.values import Norm, arithmetic_dtype


def bn_statistics(x: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    matrix = matrix_of(x)
    tiles = launch("bn_partial_tiles", x.device, matrix) or 1  # any number is right on the meta device
    partials = torch.empty((tiles, 2, x.shape[1]), dtype=arithmetic_dtype(x.dtype), device=x.device)
    row_counts = torch.empty(tiles, dtype=partials.dtype, device=x.device)
    launch("bn_partials", x.device, matrix, tiles, partials, row_counts)
    return _finalize(partials, row_counts, norm, x)


def bn_finalize(partials: Tensor, rows: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    return _finalize(partials, rows, norm, None)


def _finalize(partials: Tensor, rows: Tensor, norm: Norm, pivot: Tensor | None) -> Tensor:
    tiles, _, channels = partials.shape
    state = torch.empty((4, channels), dtype=partials.dtype, device=partials.device)
    device, tile_sums = partials.device, vector_of(partials)
    launch("bn_finalize", device, tile_sums, rows, tiles, channels, state, norm_of(norm), vector_of(pivot))
    return state


def bn_frozen(x: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    assert norm.running_mean is not None  # checked by the op
    channels = norm.running_mean.shape[0]
    state = torch.empty((4, channels), dtype=arithmetic_dtype(x.dtype), device=norm.running_mean.device)
    launch("bn_frozen", state.device, vector_of(state), channels, norm_of(norm))
    return state
