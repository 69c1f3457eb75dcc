"""The weight gradient of the convolution before BatchNorm, ReLU and max-pool; dy is formed on load and never stored.

    dW[k, r, s, c] = Σ over pixels (n, h, w) of dy[n, h, w, k] · x[n, h·stride + r·dilation − padding, w·… , c]
    dy = a·(d − c1 − (y − μ)·k), d as in triton_kernels.py

A program owns one split of the quads (triton_kernels.py), BLOCK_K output channels and BLOCK_N of the R·S'·C columns. A
step takes BLOCK_P x BLOCK_Q quads and does one product for each of the four pixels of a quad. So each window's gradient
and argmax are loaded once per quad. Splits write partial sums, and conv_wgrad_finalize adds them in order, so results
repeat bit for bit.

A column is one element of the filter: with few input channels (3 in an image), a tile of channels alone would be mostly
padding. Elements of x are loaded one by one, each R·S'/stride² times through L1. grad, argmax and y are read once per
tile of columns, mostly from L2, because the programs of one split run side by side. S·K·R·S'·C sums are written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.bn_relu_maxpool import configs
from fusedres.kernels.bn_relu_maxpool.triton_kernels import quad_gradients, window_tile
from fusedres.kernels.triton_core.launch import ceil_div, input_precision, jit_for_any_batch, launch, loop_bound
from fusedres.kernels.triton_core.product import add_product
from fusedres.values import BnGradient, Geometry, Pooled, arithmetic_dtype

FAR = tl.constexpr(1 << 29)  # a row outside every image


@triton.jit
def load_coefficients(coefficients_ptr, k, K):
    """Load a, c1, μ and k of the channels k."""
    a = tl.load(coefficients_ptr + k, mask=k < K, other=0)
    c1 = tl.load(coefficients_ptr + K + k, mask=k < K, other=0)
    mean = tl.load(coefficients_ptr + 2 * K + k, mask=k < K, other=0)
    return a, c1, mean, tl.load(coefficients_ptr + 3 * K + k, mask=k < K, other=0)


@triton.jit
def add_pixel(
    acc, d, coefficients, y_ptr, y_offsets, y_inside, x_ptr, x_offsets, h, w, inside, H, W, PRECISION: tl.constexpr
):
    """Add dyᵀ·x of one pixel of every quad; h, w: rows and columns of x under the filter's elements."""
    a, c1, mean, slope = coefficients
    y = tl.load(y_ptr + y_offsets, mask=y_inside, other=0).to(d.dtype)
    pull = tl.where(slope == 0, 0.0, (y - mean) * slope)  # constant statistics: 0 even if y is NaN
    dy = (a * (d - c1 - pull)).to(y_ptr.dtype.element_ty)
    dy = tl.where(y_inside, dy, 0.0)  # in float16 it may be inf, and 0 times that is NaN
    in_image = inside & (h.to(tl.uint32) < H) & (w.to(tl.uint32) < W)
    x = tl.load(x_ptr + x_offsets, mask=in_image, other=0)
    return add_product(acc, dy, x, True, PRECISION)


@jit_for_any_batch
def bn_relu_maxpool_wgrad_kernel(
    grad_ptr,  # (N, P, Q, K)
    argmax_ptr,  # (N, P, Q, K) uint8; int32 for float64
    y_ptr,  # (N, Y_H, Y_W, K) like grad
    coefficients_ptr,  # (4, K) a, c1, μ, k; float32, float64 for float64
    x_ptr,  # (N, H, W, C) like grad
    out_ptr,  # (S, K, R, S', C) like coefficients
    tiles,  # of quads
    steps,  # tiles per split
    P,
    Q,
    Y_H,
    Y_W,
    H,
    W,
    K: tl.constexpr,
    C: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    COLUMNS: tl.constexpr = TAPS_H * TAPS_W * C
    n_tiles: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    k_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    split = pid // (n_tiles * k_tiles)
    k = (pid // n_tiles % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    n = (pid % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    r, s = n // (TAPS_W * C) * DILATION_H, n // C % TAPS_W * DILATION_W
    x_columns = (r * W + s) * C + n % C
    r = tl.where(n < COLUMNS, r, FAR)
    coefficients = load_coefficients(coefficients_ptr, k, K)
    wide: tl.constexpr = out_ptr.dtype.element_ty

    windows = tl.arange(0, BLOCK_P * BLOCK_Q)
    i, j = windows // BLOCK_Q, windows % BLOCK_Q
    acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=wide)
    for step in range(steps):
        tile = split * steps + step
        image, top, left, _ = window_tile(tile, P, Q, 1, BLOCK_P, BLOCK_Q, 1)
        p = tl.where(tile < tiles, top + i, P)  # after the last tile nothing is inside
        q = left + j
        # dy's tiles are K by quads
        offsets = ((i * Q + q) * K)[None, :] + k
        here = ((p < P) & (q < Q))[None, :] & (k < K)
        first = (image * P + top) * Q * K
        d00, d01, d10, d11 = quad_gradients(
            grad_ptr + first, argmax_ptr + first, offsets, here, (p + 1 < P)[None, :], (q + 1 < Q)[None, :], Q, K, wide
        )
        y_ptrs = y_ptr + (image * Y_H + 2 * top) * Y_W * K
        y_offsets = ((2 * i * Y_W + 2 * q) * K)[None, :] + k
        # x's tiles are quads by columns
        below, right = 2 * p + 1 < Y_H, 2 * q + 1 < Y_W
        x_here, x_below = ((p < P) & (q < Q))[:, None], (below & (q < Q))[:, None]
        x_right, x_both = ((p < P) & right)[:, None], (below & right)[:, None]
        x_ptrs = x_ptr + (image * H + (2 * STRIDE_H * top - PADDING_H)) * W * C
        x_offsets = ((2 * STRIDE_H * i * W + 2 * STRIDE_W * q - PADDING_W) * C)[:, None] + x_columns
        h, w = (2 * STRIDE_H * p - PADDING_H)[:, None] + r, (2 * STRIDE_W * q - PADDING_W)[:, None] + s
        acc = add_pixel(
            acc, d00, coefficients, y_ptrs, y_offsets, here, x_ptrs, x_offsets, h, w, x_here, H, W, PRECISION
        )
        acc = add_pixel(
            acc, d01, coefficients, y_ptrs + K, y_offsets, here & right[None, :], x_ptrs + STRIDE_W * C, x_offsets,
            h, w + STRIDE_W, x_right, H, W, PRECISION,
        )  # fmt: skip
        y_ptrs += Y_W * K
        x_ptrs += STRIDE_H * W * C
        acc = add_pixel(
            acc, d10, coefficients, y_ptrs, y_offsets, here & below[None, :], x_ptrs, x_offsets,
            h + STRIDE_H, w, x_below, H, W, PRECISION,
        )  # fmt: skip
        acc = add_pixel(
            acc, d11, coefficients, y_ptrs + K, y_offsets, here & (below & right)[None, :], x_ptrs + STRIDE_W * C,
            x_offsets, h + STRIDE_H, w + STRIDE_W, x_both, H, W, PRECISION,
        )  # fmt: skip
    tl.store(out_ptr + split.to(tl.int64) * K * COLUMNS + k * COLUMNS + n, acc, mask=(k < K) & (n < COLUMNS))


def bn_relu_maxpool_wgrad(
    pooled: Pooled, y: BnGradient, input: Tensor, kernel: Sequence[int], geometry: Geometry
) -> Tensor:
    """See fusedres.ops.bn_relu_maxpool."""
    grad, argmax = pooled
    raw, coefficients = y
    stride, padding, dilation = geometry
    c, h, w = input.shape[1:]
    k, p, q = grad.shape[1:]
    candidates, config, tiles, steps, splits = configs.wgrad_plan(grad, input, kernel)
    if grad.dtype is torch.float64:  # Triton 3.6 has no float64 dot after an 8-bit load
        argmax = argmax.int()
    out = grad.new_empty((splits, k, *kernel, c), dtype=arithmetic_dtype(grad.dtype))
    arguments = {
        "grad_ptr": grad,
        "argmax_ptr": argmax,
        "y_ptr": raw,
        "coefficients_ptr": coefficients,
        "x_ptr": input,
        "out_ptr": out,
        "tiles": tiles,
        "steps": loop_bound(steps),
        "P": p,
        "Q": q,
        "Y_H": raw.shape[2],
        "Y_W": raw.shape[3],
        "H": h,
        "W": w,
        "K": k,
        "C": c,
        "TAPS_H": kernel[0],
        "TAPS_W": kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PADDING_H": padding[0],
        "PADDING_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "PRECISION": input_precision(grad.dtype),
    }
    columns = kernel[0] * kernel[1] * c
    grid = (splits * ceil_div(k, config["BLOCK_K"]) * ceil_div(columns, config["BLOCK_N"]),)
    launch(bn_relu_maxpool_wgrad_kernel, grid, arguments, config, candidates)
    return out
