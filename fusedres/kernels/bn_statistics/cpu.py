"""Batch statistics in C++ (csrc/bn_statistics)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import DTYPE_CODE, matrix_of, norm_of
from fusedres.values import Norm, arithmetic_dtype


def bn_statistics(x: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    return _statistics(x, 0, norm)


def bn_statistics_and_means(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_statistics."""
    means = x.new_empty(x.shape[:2], dtype=arithmetic_dtype(x.dtype))
    return _statistics(x, 0, norm, means), means


def bn_statistics_of_sum_(x: Tensor, added: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    return _statistics(x, added.data_ptr(), norm)


def _statistics(x: Tensor, added: int, norm: Norm, means: Tensor | None = None) -> Tensor:
    state = x.new_empty((4, x.shape[1]), dtype=arithmetic_dtype(x.dtype))
    samples, target = (1, 0) if means is None else (x.shape[0], means.data_ptr())
    threads = torch.get_num_threads()
    _C.bn_statistics(matrix_of(x), added, state.data_ptr(), norm_of(norm), threads, samples, target)
    return state


def bn_frozen(x: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    assert norm.running_mean is not None  # checked by the op
    channels = norm.running_mean.shape[0]
    state = x.new_empty((4, channels), dtype=arithmetic_dtype(x.dtype))
    _C.bn_frozen(DTYPE_CODE[x.dtype], channels, state.data_ptr(), norm_of(norm))
    return state


def bn_from_moments(moments: Tensor, rows: int, norm: Norm, dtype: torch.dtype) -> Tensor:
    """See fusedres.ops.dense_block."""
    channels = moments.shape[0]
    state = moments.new_empty((4, channels), dtype=arithmetic_dtype(dtype))
    _C.bn_from_moments(DTYPE_CODE[dtype], rows, channels, moments.data_ptr(), state.data_ptr(), norm_of(norm))
    return state
