"""The one-pass tail's backward: its reductions over rows, and the gradient of its input.

    d = grad where the bits of gate are open, else 0      z' as in triton.py
    one_pass_reduce   G = dᵀz'      Gₓ = dᵀx'      Σd
    one_pass_dgrad    dz = d·W̃ − z'·Q̃ + constant

one_pass_reduce    a program: a BLOCK_K×BLOCK_C tile of G or Gₓ over BLOCK_M·STEPS rows, and Σd in the tiles of the
                   first columns. Reads grad, gate and z or x; writes its split. All tiles of the same rows run side by
                   side.
one_pass_finalize  a program: BLOCK elements of the results over all splits, in fixed order.
one_pass_dgrad     a program: BLOCK_M rows of BLOCK_C channels of dz. Reads grad, gate, W̃, then z, Q̃ in a second loop
                   with the same accumulator; writes dz, and behind a ReLU its partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.centred import grid_arguments, load_centred, load_channels, load_tile, pixel_offsets
from fusedres.kernels.conv_fprop.tile import column_slices
from fusedres.kernels.launch import ceil_div, choose, input_precision, launch
from fusedres.kernels.one_pass_tail import configs
from fusedres.kernels.one_pass_tail.reference import ROWS_A_PARTIAL
from fusedres.kernels.splits import merge


@triton.jit
def load_d(grad_ptr, gate_ptr, rows, first, M, K: tl.constexpr, BLOCK_K: tl.constexpr, CHANNEL_AXIS: tl.constexpr):
    """grad (M, K) from channel `first` on where the packed bits (M, ceil(K / 8)) are open, else 0; 0 beyond M and K.

    A byte is loaded once for its 8 channels, which lie along CHANNEL_AXIS of the tile.
    """
    width: tl.constexpr = (K + 7) // 8
    k = tl.expand_dims(first + tl.arange(0, BLOCK_K), 1 - CHANNEL_AXIS)
    bytes_ = tl.expand_dims(first // 8 + tl.arange(0, BLOCK_K // 8), 1 - CHANNEL_AXIS)
    rows = tl.expand_dims(rows, CHANNEL_AXIS)
    inside = rows < M
    wide = rows.to(tl.int64)
    if K % BLOCK_K == 0:
        d = tl.load(grad_ptr + wide * K + k, mask=inside, other=0)
        packed = tl.load(gate_ptr + wide * width + bytes_, mask=inside, other=0)
    else:
        d = tl.load(grad_ptr + wide * K + k, mask=inside & (k < K), other=0)
        packed = tl.load(gate_ptr + wide * width + bytes_, mask=inside & (bytes_ < width), other=0)
    if CHANNEL_AXIS == 1:
        bits = packed[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]
    else:
        bits = packed[:, None, :].to(tl.int32) >> tl.arange(0, 8)[None, :, None]
    return tl.where(tl.reshape(bits, d.shape) & 1 == 0, 0.0, d).to(d.dtype)


@triton.jit
def reduce_rows(
    grad_ptr,
    gate_ptr,
    z_ptr,
    state_ptr,
    pivot_ptr,
    step,
    first,
    columns,
    M,
    P,
    Q,
    H,
    W,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    WITH_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """dᵀz' of BLOCK_K channels from `first` on and of columns, and Σd, over STEPS blocks of rows from `step` on."""
    dtype = pivot_ptr.dtype.element_ty
    cross = tl.zeros([BLOCK_K, BLOCK_C], dtype)
    sum_d = tl.zeros([BLOCK_K, 16], dtype)  # threads own rows 16 apart: no exchange inside the loop
    for i in range(STEPS):
        rows = (step + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        d = load_d(grad_ptr, gate_ptr, rows, first, M, K, BLOCK_K, 0)
        offsets = pixel_offsets(rows, M, P, Q, H, W, C, STRIDE)
        z = load_centred(z_ptr, state_ptr, pivot_ptr, offsets, columns, C, C % BLOCK_C == 0, 1)
        cross = tl.dot(d, z, cross, input_precision=PRECISION, out_dtype=dtype)
        if WITH_SUM:
            sum_d += tl.sum(tl.reshape(d.to(dtype), [BLOCK_K, BLOCK_M // 16, 16]), 1)
    return cross, tl.sum(sum_d, 1)


@triton.jit
def one_pass_reduce_kernel(
    grad_ptr,  # (M, K)
    gate_ptr,  # (M, ceil(K / 8)) uint8
    z_ptr,  # (N, H, W, C) of grad's dtype
    state_ptr,  # (4, C) float32 or float64: mean, invstd, scale, shift; or None
    pivot_ptr,  # (C,) of state's dtype
    x_ptr,  # (N, X_H, X_W, X_C) of grad's dtype, or None
    x_pivot_ptr,  # (X_C,) of pivot's dtype, or None
    out_ptr,  # (S, K·C + K·X_C + K) of pivot's dtype: splits of G, Gₓ, Σd
    M,
    P,
    Q,
    H,
    W,
    X_H,
    X_W,
    STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    X_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    tiles_z: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles_x: tl.constexpr = (X_C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) % (tiles_z + tiles_x)
    split = tl.program_id(1)
    first = tl.program_id(0) // (tiles_z + tiles_x) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    step = split * STEPS
    out_ptr += split.to(tl.int64) * (K * (C + X_C + 1))
    arange = tl.arange(0, BLOCK_C)
    if tile == 0:
        cross, sum_d = reduce_rows(
            grad_ptr, gate_ptr, z_ptr, state_ptr, pivot_ptr, step, first, arange, M, P, Q, H, W, STRIDE, C, K,
            True, PRECISION, BLOCK_M, BLOCK_K, BLOCK_C, STEPS,
        )  # fmt: skip
        tl.store(out_ptr + k[:, None] * C + arange[None, :], cross, mask=(k < K)[:, None] & (arange < C)[None, :])
        tl.store(out_ptr + K * (C + X_C) + k, sum_d, mask=k < K)
    elif tile < tiles_z:
        columns = tile * BLOCK_C + arange
        cross, _ = reduce_rows(
            grad_ptr, gate_ptr, z_ptr, state_ptr, pivot_ptr, step, first, columns, M, P, Q, H, W, STRIDE, C, K,
            False, PRECISION, BLOCK_M, BLOCK_K, BLOCK_C, STEPS,
        )  # fmt: skip
        tl.store(out_ptr + k[:, None] * C + columns[None, :], cross, mask=(k < K)[:, None] & (columns < C)[None, :])
    elif x_ptr is not None:
        columns = (tile - tiles_z) * BLOCK_C + arange
        cross, _ = reduce_rows(
            grad_ptr, gate_ptr, x_ptr, None, x_pivot_ptr, step, first, columns, M, P, Q, X_H, X_W, X_STRIDE, X_C, K,
            False, PRECISION, BLOCK_M, BLOCK_K, BLOCK_C, STEPS,
        )  # fmt: skip
        pointers = out_ptr + K * C + k[:, None] * X_C + columns[None, :]
        tl.store(pointers, cross, mask=(k < K)[:, None] & (columns < X_C)[None, :])


@triton.jit
def one_pass_finalize_kernel(
    splits_ptr,  # (S, K·C + K·X_C + K) float32 or float64
    out_cross_ptr,  # (K, C), like all that follows of splits' dtype
    out_x_cross_ptr,  # (K, X_C), or None
    out_sum_ptr,  # (K,)
    S,
    CROSS: tl.constexpr,  # K·C
    X_CROSS: tl.constexpr,  # K·X_C
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    both: tl.constexpr = CROSS + X_CROSS
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK_S, BLOCK], splits_ptr.dtype.element_ty)
    for step in range(STEPS):
        split = step * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (split < S)[:, None] & (elements < both + K)[None, :]
        sums += tl.load(splits_ptr + split.to(tl.int64)[:, None] * (both + K) + elements[None, :], mask=inside, other=0)
    value = tl.sum(sums, 0)
    tl.store(out_cross_ptr + elements, value, mask=elements < CROSS)
    if out_x_cross_ptr is not None:
        tl.store(out_x_cross_ptr + elements - CROSS, value, mask=(elements >= CROSS) & (elements < both))
    tl.store(out_sum_ptr + elements - both, value, mask=(elements >= both) & (elements < both + K))


@triton.jit
def store_partials(out_ptr, d, normalised, tile, columns, M, C: tl.constexpr, PARTIAL: tl.constexpr):
    """Σd and Σd·x̂ of every PARTIAL rows of a row tile, into (ceil(M / PARTIAL), 2, C)."""
    parts: tl.constexpr = d.shape[0] // PARTIAL
    sums = tl.sum(tl.reshape(d, [parts, PARTIAL, d.shape[1]]), 1)
    products = tl.sum(tl.reshape(d * normalised, [parts, PARTIAL, d.shape[1]]), 1)
    part = tile * parts + tl.arange(0, parts)
    pointers = out_ptr + part.to(tl.int64)[:, None] * (2 * C) + columns[None, :]
    inside = (part * PARTIAL < M)[:, None] & (columns < C)[None, :]
    tl.store(pointers, sums, mask=inside)
    tl.store(pointers + C, products, mask=inside)


@triton.jit
def one_pass_dgrad_kernel(
    grad_ptr,  # (M, K)
    gate_ptr,  # (M, ceil(K / 8)) uint8
    z_ptr,  # (N, H, W, C) of grad's dtype
    state_ptr,  # (4, C) float32 or float64: mean, invstd, scale, shift; or None
    pivot_ptr,  # (C,), like constant and the partials of state's dtype
    folded_ptr,  # (K, C) of grad's dtype
    quadratic_ptr,  # (C, C) of grad's dtype
    constant_ptr,  # (C,)
    out_ptr,  # (M, C) of grad's dtype
    out_partials_ptr,  # (ceil(M / PARTIAL), 2, C), or None: no ReLU before z
    M,
    P,
    Q,
    H,
    W,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype = pivot_ptr.dtype.element_ty
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    even: tl.constexpr = C % BLOCK_C == 0
    tile = tl.program_id(0) // tiles_c
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(0) % tiles_c * BLOCK_C
    columns = first_c + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_M, BLOCK_C], dtype)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        d = load_d(grad_ptr, gate_ptr, rows, start, M, K, BLOCK_K, 1)
        pointers = folded_ptr + k[:, None] * C + columns[None, :]
        if even and K % BLOCK_K == 0:
            weight = tl.load(pointers)
        else:
            weight = tl.load(pointers, mask=(k < K)[:, None] & (columns < C)[None, :], other=0)
        acc = tl.dot(d, weight, acc, input_precision=PRECISION, out_dtype=dtype)
    acc = -acc
    offsets = pixel_offsets(rows, M, P, Q, H, W, C, STRIDE)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        z = load_centred(z_ptr, state_ptr, pivot_ptr, offsets, c, C, C % BLOCK_K == 0, 1)
        pointers = quadratic_ptr + c[:, None] * C + columns[None, :]
        if even and C % BLOCK_K == 0:
            quadratic = tl.load(pointers)
        else:
            quadratic = tl.load(pointers, mask=(c < C)[:, None] & (columns < C)[None, :], other=0)
        acc = tl.dot(z, quadratic, acc, input_precision=PRECISION, out_dtype=dtype)
    width: tl.constexpr = min(BLOCK_C, 32)
    slices = column_slices(acc, width)  # bounds the registers
    for i in tl.static_range(len(slices)):
        columns = first_c + i * width + tl.arange(0, width)
        dz = load_channels(constant_ptr, columns, C, even, 1) - slices[i]
        inside = (rows < M)[:, None] & (columns < C)[None, :]
        pointers = out_ptr + rows.to(tl.int64)[:, None] * C + columns[None, :]
        if out_partials_ptr is None:
            tl.store(pointers, dz.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            z = load_tile(z_ptr, offsets, columns, C, even, 1).to(dtype)
            scale = load_channels(state_ptr + 2 * C, columns, C, even, 1)
            shift = load_channels(state_ptr + 3 * C, columns, C, even, 1)
            out = tl.where((scale * z + shift <= 0) | (rows >= M)[:, None], 0.0, dz).to(out_ptr.dtype.element_ty)
            tl.store(pointers, out, mask=inside)
            normalised = z - load_channels(state_ptr, columns, C, even, 1)
            normalised *= load_channels(state_ptr + C, columns, C, even, 1)
            store_partials(out_partials_ptr, out.to(dtype), normalised, tile, columns, M, C, PARTIAL)


def one_pass_reduce(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    stride: int,
    x: Tensor | None,
    x_pivot: Tensor | None,
    x_stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    n, channels, p, q = grad.shape
    rows, in_channels, x_channels = n * p * q, z.shape[1], 0 if x is None else x.shape[1]
    candidates = configs.reduce(rows, channels, (in_channels, x_channels), grad.dtype, grad.device)
    config = choose(candidates)
    sizes = channels * in_channels, channels * x_channels
    count = ceil_div(rows, config["BLOCK_M"] * config["STEPS"])
    splits = pivot.new_empty((count, sum(sizes) + channels))
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "z_ptr": z[:, :, ::stride, ::stride],
        "state_ptr": state,
        "pivot_ptr": pivot,
        "x_ptr": None if x is None else x[:, :, ::x_stride, ::x_stride],
        "x_pivot_ptr": x_pivot,
        "out_ptr": splits,
        "M": rows,
        "P": p,
        "Q": q,
        "C": in_channels,
        "K": channels,
        "X_C": x_channels,
        "PRECISION": input_precision(grad.dtype),
        **grid_arguments(z, stride),
        **grid_arguments(x, x_stride, "X_"),
    }
    tiles = ceil_div(in_channels, config["BLOCK_C"]) + ceil_div(x_channels, config["BLOCK_C"])
    grid = (ceil_div(channels, config["BLOCK_K"]) * tiles, count)
    launch(one_pass_reduce_kernel, grid, arguments, config, candidates)

    cross, sum_d = pivot.new_empty((channels, in_channels)), pivot.new_empty(channels)
    x_cross = pivot.new_empty((channels, x_channels))
    candidates = merge(count)
    config = choose(candidates)
    arguments = {
        "splits_ptr": splits,
        "out_cross_ptr": cross,
        "out_x_cross_ptr": x_cross if x_channels else None,
        "out_sum_ptr": sum_d,
        "S": count,
        "CROSS": sizes[0],
        "X_CROSS": sizes[1],
        "K": channels,
    }
    launch(one_pass_finalize_kernel, (ceil_div(splits.shape[1], config["BLOCK"]),), arguments, config, candidates)
    return cross, x_cross, sum_d


def one_pass_dgrad(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    quadratic: Tensor,
    constant: Tensor,
    stride: int,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    n, channels, p, q = grad.shape
    rows, in_channels = n * p * q, z.shape[1]
    taken = z[:, :, ::stride, ::stride]
    out = torch.empty_like(taken, memory_format=torch.channels_last)
    partials = pivot.new_empty((ceil_div(rows, ROWS_A_PARTIAL) if masked else 0, 2, in_channels))
    candidates = configs.dgrad(channels, in_channels, grad.dtype)
    config = choose(candidates)
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "z_ptr": taken,
        "state_ptr": state,
        "pivot_ptr": pivot,
        "folded_ptr": folded,
        "quadratic_ptr": quadratic,
        "constant_ptr": constant,
        "out_ptr": out,
        "out_partials_ptr": partials if masked else None,
        "M": rows,
        "P": p,
        "Q": q,
        "C": in_channels,
        "K": channels,
        "PARTIAL": ROWS_A_PARTIAL,
        "PRECISION": input_precision(grad.dtype),
        **grid_arguments(z, stride),
    }
    grid = (ceil_div(rows, config["BLOCK_M"]) * ceil_div(in_channels, config["BLOCK_C"]),)
    launch(one_pass_dgrad_kernel, grid, arguments, config, candidates)
    return out, partials
