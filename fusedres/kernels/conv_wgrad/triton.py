"""The weight gradient of a convolution in Triton: an implicit GEMM over the output's pixels.

    dW[k, r, s, c] = Σ_m dy[m, k] · h[tap(m, r, s), c]        m = (n, p, q)
    dy = a·(d − c1 − (y − mean)·k), d = grad where the gate is open, else 0; or grad itself
    h = relu(scale·x + shift), 0 outside of the image; or x itself

A program owns one split of the rows m, one tap and a tile of K by C; splits write partial sums, which
conv_wgrad_finalize adds in their order, so the bits repeat. The operand that is computed on load comes first in the dot:
wgmma takes that one from registers, while one computed for the second place would be staged through shared memory
without a pipeline. So the tile is C by K where h is computed, and K by C where only dy is; both computed works too.

Padding: where a tap falls outside of the image the second operand is loaded as 0 by its mask, whatever it is, and the
first is any finite number there (relu(shift), say). This is the zero AFTER affine and ReLU, at no cost in the loop.

Reads grad, y and the gate once a tap and tile of C, x once a tap and tile of K, mostly from L2, where the programs of
one split run side by side; writes S·K·R·S'·C sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.conv_wgrad import configs
from fusedres.kernels.launch import INTERPRETED, ceil_div, choose, input_precision, launch
from fusedres.kernels.reference import arithmetic_dtype
from fusedres.kernels.tiles import relu


@triton.jit
def first_pixel(m, P, Q, top, left, stride_h, stride_w):
    """Image, and row and column of the input under a tap, of output rows m; those may be outside of the image."""
    n = m // (P * Q)
    rest = (m - n * (P * Q)).to(tl.int32)
    return n.to(tl.int32), rest // Q * stride_h + top, rest % Q * stride_w + left


@triton.jit
def next_pixel(n, h, w, P, Q, top, left, stride_h, stride_w, BLOCK_M: tl.constexpr):
    """first_pixel of m + BLOCK_M, digit by digit: the loop divides nothing."""
    lines = BLOCK_M // Q
    w += BLOCK_M % Q * stride_w
    carry = w >= Q * stride_w + left
    w = tl.where(carry, w - Q * stride_w, w)
    h += lines % P * stride_h + tl.where(carry, stride_h, 0)
    carry = h >= P * stride_h + top
    h = tl.where(carry, h - P * stride_h, h)
    return n + lines // P + tl.where(carry, 1, 0), h, w


@triton.jit
def bn_backward(d, y, gate_ptr, gate_offsets, k, inside, coefficients_ptr, K):
    """a·(d − c1 − (y − mean)·k) in the coefficients' type, of the channels k; any finite number beyond K."""
    if gate_ptr is not None:
        bits = tl.load(gate_ptr + gate_offsets, mask=inside, other=0)
        d = tl.where((bits >> (k % 8).to(tl.uint8)) & 1 != 0, d, 0.0)
    a = tl.load(coefficients_ptr + k, mask=k < K, other=0.0)
    c1 = tl.load(coefficients_ptr + K + k, mask=k < K, other=0.0)
    mean = tl.load(coefficients_ptr + 2 * K + k, mask=k < K, other=0.0)
    slope = tl.load(coefficients_ptr + 3 * K + k, mask=k < K, other=0.0)
    return a * (d.to(a.dtype) - c1 - (y.to(a.dtype) - mean) * slope)


@triton.jit
def normalised(x, c, state_ptr, C):
    """relu(scale·x + shift) in the state's type, of the channels c."""
    scale = tl.load(state_ptr + 2 * C + c, mask=c < C, other=0.0)
    shift = tl.load(state_ptr + 3 * C + c, mask=c < C, other=0.0)
    return relu(x.to(scale.dtype) * scale + shift)


@triton.jit
def conv_wgrad_kernel(
    grad_ptr,  # (M, K)
    gate_ptr,  # (M, ceil(K / 8)) uint8, or None
    y_ptr,  # (M, K) like grad, or None: dy is grad
    coefficients_ptr,  # (4, K) a, c1, mean, k, or None
    x_ptr,  # (N, H, W, C) like grad, strides below
    state_ptr,  # (4, C) mean, invstd, scale, shift, or None: h is x
    out_ptr,  # (S, K, R, S', C) float32, float64 for float64
    M,
    K,
    C,
    H,
    W,
    P,
    Q,
    taps,
    taps_w,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    steps,  # of a split
    LINEAR: tl.constexpr,  # row m of dy meets row m of x, which lie x_stride_w apart
    PADDED: tl.constexpr,
    X_FIRST: tl.constexpr,  # dot(hᵀ, dy) and not dot(dyᵀ, h)
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    c_tiles, k_tiles = tl.cdiv(C, BLOCK_C), tl.cdiv(K, BLOCK_K)
    tap = tile // (c_tiles * k_tiles) % taps
    split = (tile // (c_tiles * k_tiles * taps)).to(tl.int64)
    start = split * steps * BLOCK_M
    rows = tl.minimum(M - start, steps * BLOCK_M).to(tl.int32)
    top, left = tap // taps_w * dilation_h - padding_h, tap % taps_w * dilation_w - padding_w

    # x's tile has its rows m along axis M_AXIS, dy's along the other one
    M_AXIS: tl.constexpr = 1 if X_FIRST else 0
    x_lane = tl.expand_dims(tl.arange(0, BLOCK_M), 1 - M_AXIS)
    dy_lane = tl.expand_dims(tl.arange(0, BLOCK_M), M_AXIS)
    c = tl.expand_dims(tile % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C), M_AXIS)
    k = tl.expand_dims(tile // c_tiles % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K), 1 - M_AXIS)
    n, h, w = first_pixel(start + x_lane, P, Q, top, left, stride_h, stride_w)
    dy_n, dy_h, dy_w = first_pixel(start + dy_lane, P, Q, top, left, stride_h, stride_w)
    gate_width = (K + 7) // 8

    wide: tl.constexpr = out_ptr.dtype.element_ty
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_C, BLOCK_K) if X_FIRST else (BLOCK_K, BLOCK_C), dtype=wide)
    for step in range(steps):
        x_inside = x_lane < rows - step * BLOCK_M
        if LINEAR:
            x_offsets = (start + step * BLOCK_M + x_lane) * x_stride_w
        else:
            x_offsets = n.to(tl.int64) * x_stride_n + h.to(tl.int64) * x_stride_h + w.to(tl.int64) * x_stride_w
            if PADDED:
                x_inside = x_inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            n, h, w = next_pixel(n, h, w, P, Q, top, left, stride_h, stride_w, BLOCK_M)
        x = tl.load(x_ptr + (x_offsets + c), mask=x_inside & (c < C), other=0.0)
        if state_ptr is not None:
            x = normalised(x, c, state_ptr, C).to(dtype)

        dy_row = start + step * BLOCK_M + dy_lane
        dy_inside = dy_lane < rows - step * BLOCK_M
        if PADDED and X_FIRST:
            dy_inside = dy_inside & (dy_h >= 0) & (dy_h < H) & (dy_w >= 0) & (dy_w < W)
            dy_n, dy_h, dy_w = next_pixel(dy_n, dy_h, dy_w, P, Q, top, left, stride_h, stride_w, BLOCK_M)
        dy_inside = dy_inside & (k < K)
        dy = tl.load(grad_ptr + (dy_row * K + k), mask=dy_inside, other=0.0)
        if y_ptr is not None:
            y = tl.load(y_ptr + (dy_row * K + k), mask=dy_inside, other=0.0)
            dy = bn_backward(dy, y, gate_ptr, dy_row * gate_width + k // 8, k, dy_inside, coefficients_ptr, K).to(dtype)
            if X_FIRST:
                dy = tl.where(dy_inside, dy, 0.0)
        if X_FIRST:
            acc = tl.dot(x, dy, acc, input_precision=PRECISION, out_dtype=wide)
        else:
            acc = tl.dot(dy, x, acc, input_precision=PRECISION, out_dtype=wide)

    out_offsets = ((split * K + k) * taps + tap) * C + c
    tl.store(out_ptr + out_offsets, acc, mask=(k < K) & (c < C))


@triton.jit
def sum_splits(
    partial_ptr, out_ptr, splits, size, C, taps, taps_w, stride_k, stride_c, stride_h, stride_w, block,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds BLOCK elements of (S, K, R, S', C) over S and stores them by the strides of (K, C, R, S')."""
    split = tl.arange(0, SPLITS)[:, None]
    element = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        offsets = (first + split).to(tl.int64) * size + element[None, :]
        inside = (first + split < splits) & (element < size)[None, :]
        total += tl.sum(tl.load(partial_ptr + offsets, mask=inside, other=0.0), 0)
    tap = element // C % taps
    offsets = (element // (C * taps)).to(tl.int64) * stride_k + (element % C).to(tl.int64) * stride_c
    offsets += (tap // taps_w).to(tl.int64) * stride_h + (tap % taps_w).to(tl.int64) * stride_w
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=element < size)


@triton.jit
def conv_wgrad_finalize_kernel(
    # of each weight: (S, K, R, S', C) sums and (K, C, R, S') of any dtype and strides; None for weights that lack
    partial_0_ptr, out_0_ptr, splits_0, size_0, C_0, taps_0, taps_w_0, k_0, c_0, h_0, w_0,
    partial_1_ptr, out_1_ptr, splits_1, size_1, C_1, taps_1, taps_w_1, k_1, c_1, h_1, w_1,
    partial_2_ptr, out_2_ptr, splits_2, size_2, C_2, taps_2, taps_w_2, k_2, c_2, h_2, w_2,
    partial_3_ptr, out_3_ptr, splits_3, size_3, C_3, taps_3, taps_w_3, k_3, c_3, h_3, w_3,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    blocks = tl.cdiv(size_0, BLOCK)
    if block < blocks:
        sum_splits(partial_0_ptr, out_0_ptr, splits_0, size_0, C_0, taps_0, taps_w_0, k_0, c_0, h_0, w_0, block,
                   BLOCK, SPLITS)  # fmt: skip
    if partial_1_ptr is not None:
        block -= blocks
        blocks = tl.cdiv(size_1, BLOCK)
        if (block >= 0) & (block < blocks):
            sum_splits(partial_1_ptr, out_1_ptr, splits_1, size_1, C_1, taps_1, taps_w_1, k_1, c_1, h_1, w_1, block,
                       BLOCK, SPLITS)  # fmt: skip
    if partial_2_ptr is not None:
        block -= blocks
        blocks = tl.cdiv(size_2, BLOCK)
        if (block >= 0) & (block < blocks):
            sum_splits(partial_2_ptr, out_2_ptr, splits_2, size_2, C_2, taps_2, taps_w_2, k_2, c_2, h_2, w_2, block,
                       BLOCK, SPLITS)  # fmt: skip
    if partial_3_ptr is not None:
        block -= blocks
        if block >= 0:
            sum_splits(partial_3_ptr, out_3_ptr, splits_3, size_3, C_3, taps_3, taps_w_3, k_3, c_3, h_3, w_3, block,
                       BLOCK, SPLITS)  # fmt: skip


def _bound(count: int) -> Any:
    """A loop's bound as an argument: the interpreter of Triton 3.6 loops over constants only."""
    return tl.constexpr(count) if INTERPRETED else count


def conv_wgrad(
    grad: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    coefficients: Tensor | None,
    input: Tensor,
    input_state: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """See fusedres.ops.conv_wgrad."""
    n, k, p, q = grad.shape
    _, c, h, w = input.shape
    x, stride_h, stride_w = input, *stride
    x_strides = (h * w * c, w * c, c)
    pixelwise = kernel[0] == kernel[1] == 1 and not any(padding)
    if pixelwise:
        x = input[:, :, ::stride_h, ::stride_w]
        x_strides = (h * w * c, stride_h * w * c, stride_w * c)
        linear = (h, w) == (p, q)
        h, w, stride_h, stride_w = p, q, 1, 1
    candidates, config, steps, splits = configs.plan(grad, input, kernel, input_state is not None)
    taps = kernel[0] * kernel[1]
    out = grad.new_empty((splits, k, *kernel, c), dtype=arithmetic_dtype(grad.dtype))
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "y_ptr": y,
        "coefficients_ptr": coefficients,
        "x_ptr": x,
        "state_ptr": input_state,
        "out_ptr": out,
        "M": n * p * q,
        "K": k,
        "C": c,
        "H": h,
        "W": w,
        "P": p,
        "Q": q,
        "taps": taps,
        "taps_w": kernel[1],
        "x_stride_n": x_strides[0],
        "x_stride_h": x_strides[1],
        "x_stride_w": x_strides[2],
        "stride_h": stride_h,
        "stride_w": stride_w,
        "padding_h": padding[0],
        "padding_w": padding[1],
        "dilation_h": dilation[0],
        "dilation_w": dilation[1],
        "steps": _bound(steps),
        "LINEAR": pixelwise and linear,
        "PADDED": any(padding),
        "X_FIRST": input_state is not None,
        "PRECISION": input_precision(grad.dtype),
    }
    grid = (splits * taps * ceil_div(k, config["BLOCK_K"]) * ceil_div(c, config["BLOCK_C"]),)
    launch(conv_wgrad_kernel, grid, arguments, config, candidates)
    return out


def conv_wgrad_finalize(partials: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """See fusedres.ops.conv_wgrad.conv_wgrad_finalize."""
    grads = [torch.empty_like(weight) for weight in weights]
    candidates = configs.conv_wgrad_finalize(max(partial.shape[0] for partial in partials))
    config = choose(candidates)
    arguments: dict[str, Any] = {}
    blocks = 0
    for i in range(4):
        if i < len(partials):
            partial, grad = partials[i], grads[i]
            splits, _, taps_h, taps_w, c = partial.shape
            size = grad.numel()
            values = (partial, grad, _bound(splits), size, c, taps_h * taps_w, taps_w, *grad.stride())
            blocks += ceil_div(size, config["BLOCK"])
        else:
            values = (None,) * len(_OF_A_WEIGHT)
        arguments |= {name.format(i): value for name, value in zip(_OF_A_WEIGHT, values, strict=True)}
    launch(conv_wgrad_finalize_kernel, (blocks,), arguments, config, candidates)
    return grads


_OF_A_WEIGHT = (
    "partial_{}_ptr", "out_{}_ptr", "splits_{}", "size_{}", "C_{}", "taps_{}", "taps_w_{}",
    "k_{}", "c_{}", "h_{}", "w_{}",
)  # fmt: skip
