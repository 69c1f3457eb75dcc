"""BatchNorm's affine map, ReLU and 3x3 max-pool with stride 2 and padding 1, forward and backward.

    z = relu(scale·x + shift)      out[p, q] = max over the 9 places k of z[2p − 1 + k // 3, 2q − 1 + k % 3]
    d[h, w] = Σ of grad over the windows with an open ReLU and their maximum at pixel (h, w)
    dx = a·(d − c1 − (x − μ)·k),   c1 = Σd / M,  k = r·(Σ d·x̂) / M       (Ioffe and Szegedy 2015)

The argmax of a window is the place k of its maximum, or CLOSED if its ReLU is closed.

A program owns BLOCK_P x BLOCK_Q windows of one image by BLOCK_C channels. In backward it owns quads: quad (p, q)
is the pixels (2p, 2q) to (2p + 1, 2q + 1). Only the windows (p, q), (p, q + 1), (p + 1, q), (p + 1, q + 1) reach it.
Every pixel is in exactly one quad and gathers its gradient in a fixed order; nothing is scattered.

bn_relu_maxpool_kernel         Reads x; writes out and one byte per window. Windows overlap: x passes through L1 2.25
                               times, but comes from memory once while a row of windows stays in L2.
bn_relu_maxpool_reduce_kernel  Reads grad, argmax and x; writes partial sums (T, 2, C) of Σd and Σ d·x̂.
bn_relu_maxpool_apply_kernel   Reads the same (no x with constant statistics); writes dx.

With batch statistics the backward cannot be one pass: every pixel of dx needs c1 and k, which are sums over all pixels.
Between the two passes, bn_backward_coefficients (kernels/bn_backward) merges the partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels.triton_core.launch import jit_for_any_batch

CLOSED = tl.constexpr(9)  # a place that no pixel of a window has


@triton.jit
def window_tile(pid, P, Q, C, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return image (int64), first window row, first window column and first channel of tile `pid`."""
    blocks, across = tl.cdiv(C, BLOCK_C), tl.cdiv(Q, BLOCK_Q)
    column, rest = pid % blocks * BLOCK_C, pid // blocks
    q, rest = rest % across * BLOCK_Q, rest // across
    down = tl.cdiv(P, BLOCK_P)
    return (rest // down).to(tl.int64), rest % down * BLOCK_P, q, column


@triton.jit
def bn_relu_maxpool_kernel(
    x_ptr,  # (N, H, W, C)
    state_ptr,  # (4, C) float32 or float64
    out_ptr,  # (N, P, Q, C) like x
    out_argmax_ptr,  # (N, P, Q, C) uint8, or None
    H,
    W,
    P,
    Q,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = state_ptr.dtype.element_ty
    image, top, left, column = window_tile(tl.program_id(0), P, Q, C, BLOCK_P, BLOCK_Q, BLOCK_C)
    windows = tl.arange(0, BLOCK_P * BLOCK_Q)
    i, q = windows // BLOCK_Q, left + windows % BLOCK_Q
    p = top + i
    columns = column + tl.arange(0, BLOCK_C)
    channel = columns < C
    scale = tl.load(state_ptr + 2 * C + columns, mask=channel, other=0)
    shift = tl.load(state_ptr + 3 * C + columns, mask=channel, other=0)

    # Start from 0 at the window's first place; greater values and NaN replace it. So ReLU costs nothing.
    best = tl.zeros([BLOCK_P * BLOCK_Q, BLOCK_C], dtype)
    place = tl.zeros([BLOCK_P * BLOCK_Q, BLOCK_C], tl.int32)
    place += (tl.where(p == 0, 3, 0) + tl.where(q == 0, 1, 0))[:, None]
    x_ptr += (image * H + 2 * top) * W * C
    for k in tl.static_range(9):
        h, w = 2 * p + (k // 3 - 1), 2 * q + (k % 3 - 1)
        inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        offsets = ((2 * i + (k // 3 - 1)) * W + w) * C
        x = tl.load(x_ptr + offsets[:, None] + columns[None, :], mask=inside & channel[None, :], other=0)
        z = x.to(dtype) * scale[None, :] + shift[None, :]
        wins = inside & ((z > best) | (z != z))
        best = tl.where(wins, z, best)
        place = tl.where(wins, k, place)

    offsets = ((i * Q + q) * C)[:, None] + columns[None, :]
    inside = ((p < P) & (q < Q))[:, None] & channel[None, :]
    first = (image * P + top) * Q * C
    out = best.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first + offsets, out, mask=inside)
    if out_argmax_ptr is not None:
        place = tl.where(out <= 0, CLOSED, place)
        tl.store(out_argmax_ptr + first + offsets, place.to(tl.uint8), mask=inside)


@triton.jit
def load_window(grad_ptr, argmax_ptr, offsets, inside):
    """Load the gradients of windows, and the places that receive them."""
    return tl.load(grad_ptr + offsets, mask=inside, other=0), tl.load(argmax_ptr + offsets, mask=inside, other=CLOSED)


@triton.jit
def sent(window, place: tl.constexpr, dtype: tl.constexpr):
    """Return the gradient that each window gives to the pixel at one of its places."""
    return tl.where(window[1] == place, window[0], 0.0).to(dtype)


@triton.jit
def quad_gradients(grad_ptr, argmax_ptr, offsets, inside, below, right, Q, C, dtype: tl.constexpr):
    """Return d of the pixels (0, 0), (0, 1), (1, 0), (1, 1) of quads; offsets and inside are of their windows (p, q).

    below, right: whether there are windows (p + 1, q), (p, q + 1).
    """
    w00 = load_window(grad_ptr, argmax_ptr, offsets, inside)
    w01 = load_window(grad_ptr, argmax_ptr, offsets + C, inside & right)
    w10 = load_window(grad_ptr, argmax_ptr, offsets + Q * C, inside & below)
    w11 = load_window(grad_ptr, argmax_ptr, offsets + Q * C + C, inside & below & right)
    d00 = sent(w00, 4, dtype)
    d01 = sent(w00, 5, dtype) + sent(w01, 3, dtype)
    d10 = sent(w00, 7, dtype) + sent(w10, 1, dtype)
    d11 = sent(w00, 8, dtype) + sent(w01, 6, dtype) + sent(w10, 2, dtype) + sent(w11, 0, dtype)
    return d00, d01, d10, d11


@jit_for_any_batch
def bn_relu_maxpool_reduce_kernel(
    grad_ptr,  # (N, P, Q, C)
    argmax_ptr,  # (N, P, Q, C) uint8
    x_ptr,  # (N, H, W, C) like grad
    state_ptr,  # (4, C) float32 or float64
    out_ptr,  # (T, 2, C) like state
    tiles,
    H,
    W,
    P,
    Q,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    block, partial = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = columns < C
    mean = tl.load(state_ptr + columns, mask=channel, other=0)
    windows = tl.arange(0, BLOCK_P * BLOCK_Q)
    i, j = windows // BLOCK_Q, windows % BLOCK_Q
    sum_d = tl.zeros([BLOCK_P * BLOCK_Q, BLOCK_C], dtype)
    product = tl.zeros([BLOCK_P * BLOCK_Q, BLOCK_C], dtype)
    for step in range(STEPS):
        tile = partial * STEPS + step
        image, top, left, _ = window_tile(tile * blocks, P, Q, C, BLOCK_P, BLOCK_Q, BLOCK_C)
        p, q = top + i, left + j
        p = tl.where(tile < tiles, p, P)  # after the last tile nothing is inside
        first = (image * P + top) * Q * C
        offsets = ((i * Q + q) * C)[:, None] + columns[None, :]
        inside = (p < P)[:, None] & (q < Q)[:, None] & channel[None, :]
        below, right = (p + 1 < P)[:, None], (q + 1 < Q)[:, None]
        d00, d01, d10, d11 = quad_gradients(
            grad_ptr + first, argmax_ptr + first, offsets, inside, below, right, Q, C, dtype
        )
        pixel_ptrs = x_ptr + (image * H + 2 * top) * W * C + (((2 * i * W + 2 * q) * C)[:, None] + columns[None, :])
        below, right = (2 * p + 1 < H)[:, None], (2 * q + 1 < W)[:, None]
        x00 = tl.load(pixel_ptrs, mask=inside, other=0).to(dtype) - mean[None, :]
        x01 = tl.load(pixel_ptrs + C, mask=inside & right, other=0).to(dtype) - mean[None, :]
        x10 = tl.load(pixel_ptrs + W * C, mask=inside & below, other=0).to(dtype) - mean[None, :]
        x11 = tl.load(pixel_ptrs + W * C + C, mask=inside & below & right, other=0).to(dtype) - mean[None, :]
        sum_d += (d00 + d01) + (d10 + d11)
        product += (d00 * x00 + d01 * x01) + (d10 * x10 + d11 * x11)
    invstd = tl.load(state_ptr + C + columns, mask=channel, other=0)
    out_ptr += partial.to(tl.int64) * 2 * C
    tl.store(out_ptr + columns, tl.sum(sum_d, 0), mask=channel)
    tl.store(out_ptr + C + columns, tl.sum(product, 0) * invstd, mask=channel)


@triton.jit
def apply_pixel(d, x_ptr, out_ptr, offsets, inside, a, c1, mean, k):
    """Store dx of one pixel of every quad; x may be None if c1 and k are zero."""
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(d.dtype)
        d = d - c1[None, :] - (x - mean[None, :]) * k[None, :]
    tl.store(out_ptr + offsets, (a[None, :] * d).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bn_relu_maxpool_apply_kernel(
    grad_ptr,  # (N, P, Q, C)
    argmax_ptr,  # (N, P, Q, C) uint8
    x_ptr,  # (N, H, W, C) like grad; None if the statistics are constant
    coefficients_ptr,  # (4, C) float32 or float64: a, c1, μ, k; without x only a is read
    out_ptr,  # (N, H, W, C) like grad; may be x
    H,
    W,
    P,
    Q,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = coefficients_ptr.dtype.element_ty
    image, top, left, column = window_tile(tl.program_id(0), P, Q, C, BLOCK_P, BLOCK_Q, BLOCK_C)
    windows = tl.arange(0, BLOCK_P * BLOCK_Q)
    i, q = windows // BLOCK_Q, left + windows % BLOCK_Q
    p = top + i
    columns = column + tl.arange(0, BLOCK_C)
    channel = columns < C
    first = (image * P + top) * Q * C
    offsets = ((i * Q + q) * C)[:, None] + columns[None, :]
    inside = (p < P)[:, None] & (q < Q)[:, None] & channel[None, :]
    below, right = (p + 1 < P)[:, None], (q + 1 < Q)[:, None]
    d00, d01, d10, d11 = quad_gradients(
        grad_ptr + first, argmax_ptr + first, offsets, inside, below, right, Q, C, dtype
    )
    a = tl.load(coefficients_ptr + columns, mask=channel, other=0)
    c1, mean, k = a, a, a
    first = (image * H + 2 * top) * W * C
    out_ptr += first
    if x_ptr is not None:
        x_ptr += first
        c1 = tl.load(coefficients_ptr + C + columns, mask=channel, other=0)
        mean = tl.load(coefficients_ptr + 2 * C + columns, mask=channel, other=0)
        k = tl.load(coefficients_ptr + 3 * C + columns, mask=channel, other=0)
    offsets = ((2 * i * W + 2 * q) * C)[:, None] + columns[None, :]
    below, right = inside & (2 * p + 1 < H)[:, None], inside & (2 * q + 1 < W)[:, None]
    apply_pixel(d00, x_ptr, out_ptr, offsets, inside, a, c1, mean, k)
    apply_pixel(d01, x_ptr, out_ptr, offsets + C, right, a, c1, mean, k)
    apply_pixel(d10, x_ptr, out_ptr, offsets + W * C, below, a, c1, mean, k)
    apply_pixel(d11, x_ptr, out_ptr, offsets + W * C + C, below & right, a, c1, mean, k)
