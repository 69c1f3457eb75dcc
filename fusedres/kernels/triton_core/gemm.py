"""Tile functions of the convolution kernels, besides the reduction: locate a tile, apply BatchNorm, store it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def output_pixel(m, P, Q):
    """Return (n, p, q) of output rows, n in 64 bits."""
    pixel = m % (P * Q)
    return (m // (P * Q)).to(tl.int64), pixel // Q, pixel % Q


@triton.jit
def below(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return index < SIZE for a block of an axis; a constant if the block divides the axis."""
    if SIZE % BLOCK == 0:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < SIZE


@triton.jit
def affine(y, state_ptr, k, inside, K: tl.constexpr):
    """Return scale·y + shift of a tile in the arithmetic type; 0 in channels that are not inside."""
    scale = tl.load(state_ptr + 2 * K + k, mask=inside, other=0.0)
    shift = tl.load(state_ptr + 3 * K + k, mask=inside, other=0.0)
    return y.to(scale.dtype) * scale + shift


@triton.jit
def column_slices(tile, WIDTH: tl.constexpr):
    """Return the tile as a tuple of slices of WIDTH columns."""
    if tile.shape[1] <= WIDTH:
        slices = (tile,)
    else:
        pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
        slices = column_slices(left, WIDTH) + column_slices(right, WIDTH)
    return slices


@triton.jit
def store(
    acc,
    out_ptr,  # (N, P, Q, K)
    out_partials_ptr,  # (tiles, 2, K) in acc's type, or None
    out_rows_ptr,  # (tiles,) in acc's type, or None
    tile,
    first_k,
    rows,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store the tile; with partials also the mean and squared deviations of its columns, of the rounded values."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = (m < rows)[:, None]
    count = tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(acc.dtype)
    slices = column_slices(acc, 32)  # bounds the registers
    for s in tl.static_range(len(slices)):
        k = first_k + s * 32 + tl.arange(0, 32)
        column_inside = below(k, K, BLOCK_K)
        y = slices[s].to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m.to(tl.int64)[:, None] * K + k[None, :], y, mask=row_inside & column_inside[None, :])
        if out_partials_ptr is not None:
            stored = y.to(acc.dtype)
            near = tl.sum(tl.where(row_inside, stored, 0.0), 0) / count
            deviation = tl.where(row_inside, stored - near[None, :], 0.0)
            off = tl.sum(deviation, 0) / count  # rounding error of the mean
            partials = out_partials_ptr + tile.to(tl.int64) * (2 * K) + k
            tl.store(partials, near + off, mask=column_inside)
            tl.store(partials + K, tl.sum(deviation * deviation, 0) - count * off * off, mask=column_inside)
    if out_partials_ptr is not None:
        tl.store(out_rows_ptr + tile, count)  # every column tile writes the same value
