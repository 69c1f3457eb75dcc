"""Gram matrix in CUDA (csrc/gram)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.dispatch import uses_tf32
from fusedres.kernels.arguments import pixels_of, tiles_of
from fusedres.kernels.cuda_core import launch
from fusedres.values import arithmetic_dtype, pixel_rows

_STEP = 64  # a multiple of the rows that the kernels take at once


def _split(rows: int, channels: int) -> tuple[int, int]:
    """Return the rows of a split, and the number of splits. Only sizes count, so that every device gives the same bits.

    A guess, not measured, for about 132 multiprocessors: each runs four blocks of narrow tiles or two of wide ones.
    """
    across = -(-channels // 128)
    wanted = max(1, (512 if channels <= 64 else 256) // (across * (across + 1) // 2))
    size = -(-rows // (wanted * _STEP)) * _STEP
    return size, -(-rows // size)


def _launch(x: Tensor, state: Tensor | None, stride: int, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    size, splits = _split(pixel_rows(x, stride), channels)
    pivot = torch.empty(channels, dtype=arithmetic_dtype(x.dtype), device=x.device)
    partials = torch.empty((splits, channels + 1, channels), dtype=pivot.dtype, device=x.device)
    total = torch.empty(channels, dtype=torch.float64, device=x.device)
    matrix = torch.empty((channels, channels), dtype=torch.float64, device=x.device)
    pixels, tiles = pixels_of(x, stride), tiles_of(size, partials)
    launch("gram", x.device, pixels, uses_tf32(x.dtype), state, out, pivot, tiles, total, matrix)
    return pivot, total, matrix


def gram(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    out = torch.empty_like(x[:, :, ::stride, ::stride], memory_format=torch.channels_last)
    return out, *_launch(x, state, stride, out)


def gram_statistics(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    return _launch(x, state, stride, None)
