"""The weight gradient of a convolution in Triton: an implicit GEMM over the output's pixels.

    dW[k, r, s, c] = Σ_m dy[m, k] · h[tap(m, r, s), c]        m = (n, p, q)
    dy = a·(d − c1 − (y − mean)·k), d = grad where the gate is open, else 0; or grad itself
    h = relu(scale·x + shift), 0 outside the image; or x itself

A program owns one split of the rows m, one tap and a tile of K by C. Splits write partial sums, and conv_wgrad_finalize
adds them in order, so results repeat bit for bit. The operand computed on load comes first in the dot: wgmma can take
the first operand from registers. A computed second operand would pass through shared memory without a pipeline. So the
tile is C by K if h is computed, and K by C if only dy is. Both may be computed.

Padding: where a tap falls outside the image, the mask loads the second operand (x or dy) as 0. The first operand is any
finite number there, for example relu(shift); in float16 it is limited so that it cannot become inf. This puts the zero
AFTER affine map and ReLU, at no cost in the loop.

grad, y and the gate are read once per tap and tile of C, and x once per tap and tile of K. They come mostly from L2,
because the programs of one split run side by side. S·K·R·S'·C sums are written.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.conv_wgrad import configs
from fusedres.kernels.conv_wgrad.finalize import conv_wgrad_finalize
from fusedres.kernels.triton_core.launch import ceil_div, input_precision, jit_for_any_batch, launch, loop_bound
from fusedres.kernels.triton_core.product import add_product
from fusedres.kernels.triton_core.rows import relu
from fusedres.values import Geometry, Gradient, Raw, arithmetic_dtype

__all__ = ["conv_wgrad", "conv_wgrad_finalize"]


@triton.jit
def divide(m, magic, shift):
    """Return m // d for 0 <= m < 2³¹, with magic and shift of _magic(d): three instructions instead of twenty."""
    return (tl.umulhi((2 * m).to(tl.uint32), magic.to(tl.uint32)) >> shift).to(tl.int32)


@triton.jit
def input_pixel(m, P, P_magic, P_shift, Q, Q_magic, Q_shift, top, left, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """Return image, row and column of the input pixel under a tap, for output row m; it may be outside the image."""
    line = divide(m, Q_magic, Q_shift)
    n = divide(line, P_magic, P_shift)
    return n, (line - n * P) * STRIDE_H + top, (m - line * Q) * STRIDE_W + left


@triton.jit
def in_image(h, w, H, W):
    """Return whether 0 <= h < H and 0 <= w < W."""
    return (h.to(tl.uint32) < H) & (w.to(tl.uint32) < W)


@triton.jit
def bn_backward(d, y, k, coefficients_ptr, K):
    """Return a·(d − c1 − (y − mean)·k) of the channels k, in the coefficients' type."""
    a = tl.load(coefficients_ptr + k, mask=k < K, other=0.0)
    c1 = tl.load(coefficients_ptr + K + k, mask=k < K, other=0.0)
    mean = tl.load(coefficients_ptr + 2 * K + k, mask=k < K, other=0.0)
    slope = tl.load(coefficients_ptr + 3 * K + k, mask=k < K, other=0.0)
    return a * (d.to(a.dtype) - c1 - (y.to(a.dtype) - mean) * slope)


@triton.jit
def normalised(x, c, state_ptr, C):
    """Return relu(scale·x + shift) of the channels c, in the state's type."""
    scale = tl.load(state_ptr + 2 * C + c, mask=c < C, other=0.0)
    shift = tl.load(state_ptr + 3 * C + c, mask=c < C, other=0.0)
    return relu(x.to(scale.dtype) * scale + shift)


@jit_for_any_batch
def conv_wgrad_kernel(
    grad_ptr,  # (M, K)
    gate_ptr,  # (M, ceil(K / 8)) uint8, or None
    y_ptr,  # (M, K) like grad, or None: dy is grad
    coefficients_ptr,  # (4, K) a, c1, mean, k, or None
    x_ptr,  # (N, H, W, C) like grad
    state_ptr,  # (4, C) mean, invstd, scale, shift, or None: h is x
    out_ptr,  # (S, K, R, S', C) float32, float64 for float64
    M,
    H,
    W,
    P,
    P_magic,
    P_shift,
    Q,
    Q_magic,
    Q_shift,
    steps,  # per split
    K: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    LINEAR: tl.constexpr = TAPS * STRIDE_H * STRIDE_W == 1 and PADDING_H + PADDING_W == 0  # row m of dy is row m of x
    PADDED: tl.constexpr = PADDING_H + PADDING_W > 0
    X_FIRST: tl.constexpr = state_ptr is not None  # dot(hᵀ, dy), else dot(dyᵀ, h)
    wide: tl.constexpr = out_ptr.dtype.element_ty
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    c_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    k_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0)
    tap = tile // (c_tiles * k_tiles) % TAPS
    split = tile // (c_tiles * k_tiles * TAPS)
    top, left = tap // TAPS_W * DILATION_H - PADDING_H, tap % TAPS_W * DILATION_W - PADDING_W
    start = split * steps * BLOCK_M
    rows = tl.minimum(M - start, steps * BLOCK_M)
    image = start // (P * Q)
    first = start - image * (P * Q)  # the split's first row, within its first image
    start, image = start.to(tl.int64), image.to(tl.int64)

    # rows m are along axis M_AXIS in x's tile, and along the other axis in dy's tile
    M_AXIS: tl.constexpr = 1 if X_FIRST else 0
    x_lane = tl.expand_dims(tl.arange(0, BLOCK_M), 1 - M_AXIS)
    dy_lane = tl.expand_dims(tl.arange(0, BLOCK_M), M_AXIS)
    c = tl.expand_dims(tile % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C), M_AXIS)
    k = tl.expand_dims(tile // c_tiles % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K), 1 - M_AXIS)
    x_ptr += (start if LINEAR else image * H * W) * C
    grad_ptr += start * K

    acc = tl.zeros((BLOCK_C, BLOCK_K) if X_FIRST else (BLOCK_K, BLOCK_C), dtype=wide)
    for step in range(steps):
        x_row = step * BLOCK_M + x_lane
        x_inside = x_row < rows
        if not LINEAR:
            n, h, w = input_pixel(
                first + x_row, P, P_magic, P_shift, Q, Q_magic, Q_shift, top, left, STRIDE_H, STRIDE_W
            )
            x_row = (n * H + h) * W + w
            if PADDED:
                x_inside = x_inside & in_image(h, w, H, W)
        if C % BLOCK_C:
            x_inside = x_inside & (c < C)
        x = tl.load(x_ptr + (x_row.to(tl.int64) * C + c), mask=x_inside, other=0.0)
        if X_FIRST:
            x = normalised(x, c, state_ptr, C)
            if dtype == tl.float16:  # relu(shift) may be inf, and inf·0 is NaN; a mask would stall the pipeline
                x = tl.where(x > 65504.0, 65504.0, x)
            x = x.to(dtype)

        dy_row = step * BLOCK_M + dy_lane
        dy_inside = dy_row < rows
        if X_FIRST and PADDED:
            n, h, w = input_pixel(
                first + dy_row, P, P_magic, P_shift, Q, Q_magic, Q_shift, top, left, STRIDE_H, STRIDE_W
            )
            dy_inside = dy_inside & in_image(h, w, H, W)
        if K % BLOCK_K:
            dy_inside = dy_inside & (k < K)
        dy_offsets = dy_row.to(tl.int64) * K + k
        dy = tl.load(grad_ptr + dy_offsets, mask=dy_inside, other=0.0)
        if y_ptr is not None:
            y = tl.load(y_ptr + start * K + dy_offsets, mask=dy_inside, other=0.0)
            if gate_ptr is not None:
                width: tl.constexpr = (K + 7) // 8
                bits = tl.load(
                    gate_ptr + start * width + (dy_row.to(tl.int64) * width + k // 8), mask=dy_inside, other=0
                )
                dy = tl.where((bits >> (k % 8).to(tl.uint8)) & 1 != 0, dy, 0.0)
            dy = bn_backward(dy, y, k, coefficients_ptr, K).to(dtype)
            if X_FIRST or dtype == tl.float16:
                dy = tl.where(dy_inside, dy, 0.0)
        if X_FIRST:
            acc = add_product(acc, x, dy, True, PRECISION)
        else:
            acc = add_product(acc, dy, x, y_ptr is not None, PRECISION)

    out_offsets = ((split.to(tl.int64) * K + k) * TAPS + tap) * C + c
    tl.store(out_ptr + out_offsets, acc, mask=(k < K) & (c < C))


def _magic(divisor: int) -> tuple[int, int]:
    """Return (magic, shift): m // divisor == m · magic >> (31 + shift) for 0 <= m < 2³¹ (Granlund, Montgomery 1994)."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


def conv_wgrad(gradient: Gradient, input: Raw, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """See fusedres.ops.conv_wgrad."""
    raw, input_state = input
    grad, gate, y, coefficients = gradient
    stride, padding, dilation = geometry
    n, k, p, q = grad.shape
    c, h, w = raw.shape[1:]
    taps = kernel[0] * kernel[1]
    candidates, config, steps, splits = configs.plan(gradient, input, kernel)
    out = grad.new_empty((splits, k, *kernel, c), dtype=arithmetic_dtype(grad.dtype))
    P_magic, P_shift = _magic(p)
    Q_magic, Q_shift = _magic(q)
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "y_ptr": y,
        "coefficients_ptr": coefficients,
        "x_ptr": raw[:, :, :: stride[0], :: stride[1]] if taps == 1 and not any(padding) else raw,
        "state_ptr": input_state,
        "out_ptr": out,
        "M": n * p * q,
        "H": h,
        "W": w,
        "P": p,
        "P_magic": P_magic,
        "P_shift": P_shift,
        "Q": q,
        "Q_magic": Q_magic,
        "Q_shift": Q_shift,
        "steps": loop_bound(steps),
        "K": k,
        "C": c,
        "TAPS": taps,
        "TAPS_W": kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PADDING_H": padding[0],
        "PADDING_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "PRECISION": input_precision(grad.dtype),
    }
    grid = (splits * taps * ceil_div(k, config["BLOCK_K"]) * ceil_div(c, config["BLOCK_C"]),)
    launch(conv_wgrad_kernel, grid, arguments, config, candidates)
    return out
