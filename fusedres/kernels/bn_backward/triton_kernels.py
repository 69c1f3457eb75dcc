"""Backward of BatchNorm in three launches: sums over row tiles, their merge into coefficients, elementwise gradients.

    d = grad where the gate is open, else 0      x̂ = (x − μ)·r      c1 = Σd / M      k = r·(Σ d·x̂) / M
    dx = a·(d − c1 − (x − μ)·k)                  (Ioffe and Szegedy 2015); c1 = k = 0 if the statistics are constant

The same equations hold for the branch of a normalised shortcut: the gradient at its output is also d. Activations are
(M, C) rows.

bn_backward_reduce        A program owns BLOCK_M·steps rows of BLOCK_C channels; it sums elementwise, then over rows. It
                          reads grad, the gate, x (and the shortcut's x), and writes (T, 2 or 3, C).
bn_backward_coefficients  A program owns BLOCK_C channels of all T partials, and adds them in fixed order. It reads the
                          partials, and writes vectors (C,).
bn_backward_apply         A program owns a tile. It reads grad, the gate and each x again, and writes each dx.
GATE is the result of gate_kind(), or "affine": closed where scale·x + shift <= 0, recomputed from x and state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels.triton_core.gate import load_gated
from fusedres.kernels.triton_core.launch import jit_for_any_batch
from fusedres.kernels.triton_core.rows import tile


@triton.jit
def close_affine(d, x, state_ptr, columns, inside, C):
    """Return d, but 0 where scale·x + shift <= 0; state (4, C)."""
    scale = tl.load(state_ptr + 2 * C + columns, mask=inside, other=0)
    shift = tl.load(state_ptr + 3 * C + columns, mask=inside, other=0)
    return tl.where(scale[None, :] * x + shift[None, :] <= 0, 0.0, d)


@jit_for_any_batch
def bn_backward_reduce_kernel(
    grad_ptr,  # (M, C)
    gate_ptr,  # packed bits (M, ceil(C / 8)) uint8, or like grad, or None
    x_ptr,  # like grad
    state_ptr,  # (4, C) float32 or float64: mean, invstd, scale, shift
    shortcut_x_ptr,  # like grad, or None
    shortcut_state_ptr,  # like state, or None
    out_ptr,  # (T, 2 or 3, C) of state's dtype
    M,
    C,
    steps,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = state_ptr.dtype.element_ty
    first, column = tile(tl.program_id(0), C, BLOCK_M * steps, BLOCK_C)
    rows, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    channel = columns < C
    mean = tl.load(state_ptr + columns, mask=channel, other=0)
    sum_d = tl.zeros([BLOCK_M, BLOCK_C], dtype)
    product = tl.zeros([BLOCK_M, BLOCK_C], dtype)
    if shortcut_x_ptr is not None:
        shortcut_mean = tl.load(shortcut_state_ptr + columns, mask=channel, other=0)
        shortcut_product = tl.zeros([BLOCK_M, BLOCK_C], dtype)
    for step in range(steps):
        row = first + step * BLOCK_M
        inside = (row + rows < M)[:, None] & channel[None, :]
        offsets = row * C + rows[:, None] * C + columns[None, :]
        d = load_gated(grad_ptr, gate_ptr, row, column, M, C, GATE, BLOCK_M, BLOCK_C).to(dtype)
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(dtype)
        if GATE == "affine":
            d = close_affine(d, x, state_ptr, columns, channel, C)
        sum_d += d
        product += d * (x - mean[None, :])
        if shortcut_x_ptr is not None:
            shortcut_x = tl.load(shortcut_x_ptr + offsets, mask=inside, other=0).to(dtype)
            shortcut_product += d * (shortcut_x - shortcut_mean[None, :])
    # x̂ = (x − μ)·r, and r is constant per channel: multiply the sum by r once
    invstd = tl.load(state_ptr + C + columns, mask=channel, other=0)
    index = first // (BLOCK_M * steps)
    if shortcut_x_ptr is not None:
        out_ptr += index * 3 * C
        shortcut_invstd = tl.load(shortcut_state_ptr + C + columns, mask=channel, other=0)
        tl.store(out_ptr + 2 * C + columns, tl.sum(shortcut_product, 0) * shortcut_invstd, mask=channel)
    else:
        out_ptr += index * 2 * C
    tl.store(out_ptr + columns, tl.sum(sum_d, 0), mask=channel)
    tl.store(out_ptr + C + columns, tl.sum(product, 0) * invstd, mask=channel)


@triton.jit
def store_coefficients(out_ptr, state_ptr, sum_d, product, count, columns, inside, C, BATCH_STATISTICS: tl.constexpr):
    """Store the rows a, c1, μ, k of (4, C)."""
    mean = tl.load(state_ptr + columns, mask=inside, other=0)
    invstd = tl.load(state_ptr + C + columns, mask=inside, other=0)
    scale = tl.load(state_ptr + 2 * C + columns, mask=inside, other=0)
    if BATCH_STATISTICS:
        c1, k = sum_d / count, invstd * (product / count)
    else:
        c1, k = tl.zeros_like(sum_d), tl.zeros_like(sum_d)
    tl.store(out_ptr + columns, scale, mask=inside)
    tl.store(out_ptr + C + columns, c1, mask=inside)
    tl.store(out_ptr + 2 * C + columns, mean, mask=inside)
    tl.store(out_ptr + 3 * C + columns, k, mask=inside)


@jit_for_any_batch
def bn_backward_coefficients_kernel(
    partials_ptr,  # (T, 2 or 3, C) float32 or float64
    state_ptr,  # (4, C) of partials' dtype
    shortcut_state_ptr,  # like state, or None
    out_sums_ptr,  # (2 or 3, C); all following arguments have partials' dtype
    out_ptr,  # (4, C)
    out_shortcut_ptr,  # (4, C), or None
    T,
    C,
    count,
    steps,
    BATCH_STATISTICS: tl.constexpr,
    SHORTCUT_BATCH_STATISTICS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = columns < C
    sum_d = tl.zeros([BLOCK_T, BLOCK_C], partials_ptr.dtype.element_ty)
    product = tl.zeros([BLOCK_T, BLOCK_C], partials_ptr.dtype.element_ty)
    width = 2 * C
    if shortcut_state_ptr is not None:
        width = 3 * C
        shortcut_product = tl.zeros([BLOCK_T, BLOCK_C], partials_ptr.dtype.element_ty)
    for step in range(steps):
        tiles = step * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (tiles < T)[:, None] & channel[None, :]
        partial_ptrs = partials_ptr + tiles[:, None] * width + columns[None, :]
        sum_d += tl.load(partial_ptrs, mask=inside, other=0)
        product += tl.load(partial_ptrs + C, mask=inside, other=0)
        if shortcut_state_ptr is not None:
            shortcut_product += tl.load(partial_ptrs + 2 * C, mask=inside, other=0)
    total, merged = tl.sum(sum_d, 0), tl.sum(product, 0)
    tl.store(out_sums_ptr + columns, total, mask=channel)
    tl.store(out_sums_ptr + C + columns, merged, mask=channel)
    store_coefficients(out_ptr, state_ptr, total, merged, count, columns, channel, C, BATCH_STATISTICS)
    if shortcut_state_ptr is not None:
        merged = tl.sum(shortcut_product, 0)
        tl.store(out_sums_ptr + 2 * C + columns, merged, mask=channel)
        store_coefficients(
            out_shortcut_ptr, shortcut_state_ptr, total, merged, count, columns, channel, C, SHORTCUT_BATCH_STATISTICS
        )


@triton.jit
def branch_grad(d, x, coefficients_ptr, columns, inside, C):
    """Return a·(d − c1 − (x − μ)·k). If k = c1 = 0 this is a·d even if x is NaN, and x may be None."""
    a = tl.load(coefficients_ptr + columns, mask=inside, other=0)
    if x is not None:
        c1 = tl.load(coefficients_ptr + C + columns, mask=inside, other=0)
        mean = tl.load(coefficients_ptr + 2 * C + columns, mask=inside, other=0)
        k = tl.load(coefficients_ptr + 3 * C + columns, mask=inside, other=0)
        d = d - c1[None, :] - tl.where(k[None, :] == 0, 0.0, (x - mean[None, :]) * k[None, :])
    return a[None, :] * d


@jit_for_any_batch
def bn_backward_apply_kernel(
    grad_ptr,  # (M, C)
    gate_ptr,  # packed bits (M, ceil(C / 8)) uint8, or like grad, or None
    x_ptr,  # like grad; None if constant statistics make it unnecessary
    coefficients_ptr,  # (4, C) float32 or float64: a, c1, μ, k
    state_ptr,  # (4, C) for GATE "affine", or None
    shortcut_x_ptr,  # like x
    shortcut_coefficients_ptr,  # like coefficients, or None
    out_ptr,  # like grad
    out_shortcut_ptr,  # like grad, or None
    M,
    C,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = coefficients_ptr.dtype.element_ty
    row, column = tile(tl.program_id(0), C, BLOCK_M, BLOCK_C)
    rows, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    channel = columns < C
    inside = (row + rows < M)[:, None] & channel[None, :]
    offsets = row * C + rows[:, None] * C + columns[None, :]
    # Load all tiles first: the per-channel vectors wait for each other in shared memory.
    d = load_gated(grad_ptr, gate_ptr, row, column, M, C, GATE, BLOCK_M, BLOCK_C).to(dtype)
    x = None
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(dtype)
    shortcut_x = None
    if shortcut_x_ptr is not None:
        shortcut_x = tl.load(shortcut_x_ptr + offsets, mask=inside, other=0).to(dtype)
    if GATE == "affine":
        d = close_affine(d, x, state_ptr, columns, channel, C)
    grad = branch_grad(d, x, coefficients_ptr, columns, channel, C)
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=inside)
    if out_shortcut_ptr is not None:
        grad = branch_grad(d, shortcut_x, shortcut_coefficients_ptr, columns, channel, C)
        tl.store(out_shortcut_ptr + offsets, grad.to(out_shortcut_ptr.dtype.element_ty), mask=inside)
