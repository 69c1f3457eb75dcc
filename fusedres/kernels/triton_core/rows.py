"""Shared code of the Triton kernels that make one pass over channels_last activations (M, C), tile by tile.

A program owns BLOCK_M rows and BLOCK_C channels; programs of neighbouring channels have neighbouring ids. Row m is
pixel (n, p, q) of (N, P, Q). Row numbers and offsets are int64; numbers inside a tile are int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton_core.blocks import column_block
from fusedres.kernels.triton_core.launch import INTERPRETED, Config


@triton.jit
def tile(pid, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the first row (int64) and first channel of program `pid`."""
    blocks = tl.cdiv(C, BLOCK_C)
    return (pid // blocks).to(tl.int64) * BLOCK_M, pid % blocks * BLOCK_C


@triton.jit
def pixel_offsets(row, P, Q, stride_n, stride_h, stride_w, IS_STRIDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (BLOCK_M,) offsets of rows row, row + 1, …; if no pixel is left out, rows lie stride_w apart."""
    rows = tl.arange(0, BLOCK_M)
    if IS_STRIDED:
        image = row // (P * Q)
        rest = (row - image * (P * Q)).to(tl.int32) + rows  # counted from the tile's first image
        p = rest // Q % P
        offsets = (image + rest // (P * Q)) * stride_n + p.to(tl.int64) * stride_h + (rest % Q).to(tl.int64) * stride_w
    else:
        offsets = (row + rows) * stride_w
    return offsets


@triton.jit
def affine(x, state_ptr, C, columns):
    """Return scale·x + shift in the type of the state (4, C); 0 beyond C if x is 0 there."""
    inside = columns < C
    scale = tl.load(state_ptr + 2 * C + columns, mask=inside, other=0)
    shift = tl.load(state_ptr + 3 * C + columns, mask=inside, other=0)
    return x.to(scale.dtype) * scale[None, :] + shift[None, :]


@triton.jit
def relu(z):
    """Return max(z, 0); NaN stays NaN."""
    return tl.where(z <= 0, 0.0, z)


def pixels(x: Tensor, stride: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Return every stride-th pixel of a channels_last activation, and the strides of (N, P, Q).

    The strides are computed, because torch's are arbitrary for axes of size 1.
    """
    _, c, h, w = x.shape
    view = x if stride == 1 else x[:, :, ::stride, ::stride]
    return view, (h * w * c, stride * w * c, stride * c)


# (warps of a program, vectors of 16 bytes per thread and operand)
ROW_TILES = ((4, 4), (8, 4), (4, 8), (8, 2), (4, 2))


@cache
def row_tiles(channels: int, dtype: torch.dtype, choices: tuple[tuple[int, int], ...] = ROW_TILES) -> Sequence[Config]:
    """Return candidates for a kernel that touches each element once."""
    if INTERPRETED:
        return (Config({"BLOCK_M": 64, "BLOCK_C": 64}),)
    vector = 16 // dtype.itemsize
    block_c = column_block(channels, 128)
    return tuple(
        Config({"BLOCK_M": max(1, 32 * warps * vector * vectors // block_c), "BLOCK_C": block_c}, warps)
        for warps, vectors in choices
    )
