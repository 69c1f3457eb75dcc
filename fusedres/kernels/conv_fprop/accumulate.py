"""The reduction of the implicit GEMM over taps and channels, x by pointers."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels.triton_core.gemm import affine, below, output_pixel
from fusedres.kernels.triton_core.product import add_product
from fusedres.kernels.triton_core.rows import relu


@triton.jit
def accumulate(
    x_ptr,  # (N, H, W, C), strides below
    weight_ptr,  # (K, R, S, C)
    state_ptr,  # (4, C), or None: use x as it is
    table_ptr,  # (R·S, P·Q) 0/1 float32, read if TABLE; else indices tell what is padding
    m,  # (BLOCK_M,) rows of this tile
    k,  # (BLOCK_K,) columns of this tile
    rows,
    H,
    W,
    P,
    Q,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,
    FLAT: tl.constexpr,
    TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return (BLOCK_M, BLOCK_K) of the convolution.

    There is one flat loop. A step is one tap and a block of its channels. With FLAT, a step is a block of the whole
    (R, S, C) axis, and each element has its own tap: this wastes less if C is small.
    """
    n, p, q = output_pixel(m, P, Q)
    h0 = p * stride_h - padding_h
    w0 = q * stride_w - padding_w
    x_rows = x_ptr + (n * x_stride_n + h0.to(tl.int64) * x_stride_h + w0.to(tl.int64) * x_stride_w)[:, None]
    weight_columns = weight_ptr + (k.to(tl.int64) * (R * S * C))[None, :]
    row_inside = (m < rows)[:, None]
    column_inside = below(k, K, BLOCK_K)[None, :]
    lane = tl.arange(0, BLOCK_C)
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    STEPS: tl.constexpr = (R * S * C + BLOCK_C - 1) // BLOCK_C if FLAT else R * S * BLOCKS
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACCUMULATOR)
    for step in range(STEPS):
        if FLAT:
            j = step * BLOCK_C + lane
            r = (j // (S * C))[None, :]
            s = (j // C % S)[None, :]
            c = j % C
            inside = below(j, R * S * C, BLOCK_C)
        else:
            tap = step // BLOCKS
            r = tap // S
            s = tap % S
            c = (step % BLOCKS) * BLOCK_C + lane
            j = tap * C + c
            inside = below(c, C, BLOCK_C)
        x_inside = row_inside & inside[None, :]
        if PADDED:
            h = h0[:, None] + r * dilation_h
            w = w0[:, None] + s * dilation_w
            x_inside = x_inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x = tl.load(
            x_rows + (r * dilation_h * x_stride_h + s * dilation_w * x_stride_w + c[None, :]), mask=x_inside, other=0.0
        )
        weight = tl.load(weight_columns + j[:, None], mask=inside[:, None] & column_inside, other=0.0)
        if state_ptr is not None:
            z = relu(affine(x, state_ptr, c[None, :], inside[None, :], C))
            if PADDED:
                if TABLE:
                    keep = tl.load(table_ptr + tap * (P * Q) + p * Q + q, mask=m < rows, other=0.0)[:, None] != 0
                else:
                    keep = x_inside
                z = tl.where(keep, z, 0.0)
            x = z.to(weight.dtype)
        acc = add_product(acc, x, weight, state_ptr is not None, PRECISION)
    return acc
