"""conv_fprop with stride 1 and an output as large as x, loaded by tensor descriptors (TMA on Hopper).

x is a matrix of N·H·W rows of C channels, and a tap shifts all rows by the same distance. Pixels that the shift brings
in from a neighbouring row or image stand for padding: a 0/1 table tells where. One instruction loads a tile, and no
thread computes addresses.
"""

from __future__ import annotations

import triton.language as tl

from fusedres.kernels.triton_core.gemm import affine, store
from fusedres.kernels.triton_core.launch import jit_for_any_batch
from fusedres.kernels.triton_core.product import add_product
from fusedres.kernels.triton_core.rows import relu


@jit_for_any_batch
def conv_fprop_descriptor_kernel(
    x_descriptor,  # (N·H·W, C)
    weight_descriptor,  # (K, R·S·C)
    state_ptr,  # (4, C) float32 or None
    table_ptr,  # (R·S, P·Q) float32, or None without padding
    out_ptr,  # (N, P, Q, K)
    out_partials_ptr,  # (tiles, 2, K) float32, or None
    out_rows_ptr,  # (tiles,) float32, or None
    rows,
    W,
    pixels,  # H·W
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    C: tl.constexpr,  # a multiple of BLOCK_C
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0) // COLUMN_TILES
    first_k = tl.program_id(0) % COLUMN_TILES * BLOCK_K
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    BLOCKS: tl.constexpr = C // BLOCK_C
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in range(R * S * BLOCKS):
        tap = step // BLOCKS
        first_c = step % BLOCKS * BLOCK_C
        shift = (tap // S * dilation_h - padding_h) * W + (tap % S * dilation_w - padding_w)
        x = x_descriptor.load([tile * BLOCK_M + shift, first_c])
        weight = weight_descriptor.load([first_k, tap * C + first_c]).T
        z = x
        if state_ptr is not None:
            c = first_c + tl.arange(0, BLOCK_C)[None, :]
            z = relu(affine(x, state_ptr, c, True, C))
        if table_ptr is not None:
            keep = tl.load(table_ptr + tap * pixels + m % pixels, mask=m < rows, other=0.0)[:, None] != 0
            z = tl.where(keep, z, 0.0)  # not z·0: a NaN from a neighbouring row or image would stay
        computed: tl.constexpr = state_ptr is not None or table_ptr is not None
        acc = add_product(acc, z.to(x.dtype), weight, computed, PRECISION)
    store(acc, out_ptr, out_partials_ptr, out_rows_ptr, tile, first_k, rows, K, BLOCK_M, BLOCK_K)
