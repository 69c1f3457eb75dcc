"""The reductions over rows of the one-pass tail's backward, in two launches.

    d = grad where the bits of gate are open, else 0      G = dᵀz'      Gₓ = dᵀx'      Σd,  z' as in triton.py

one_pass_reduce    A program owns a BLOCK_K×BLOCK_C tile of G or Gₓ over BLOCK_M·steps rows; the tiles of the first
                   columns also sum d. It reads grad, gate, and z or x, and writes its split. All tiles of the same
                   rows run side by side.
one_pass_finalize  A program owns BLOCK elements of the results. It adds all splits in fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.one_pass_tail import configs
from fusedres.kernels.one_pass_tail.gradient import load_d
from fusedres.kernels.triton_core.centred import grid_arguments, load_centred, pixel_offsets
from fusedres.kernels.triton_core.gate import before_product
from fusedres.kernels.triton_core.launch import (
    ceil_div,
    choose,
    gpu,
    input_precision,
    jit_for_any_batch,
    launch,
    loop_bound,
)
from fusedres.kernels.triton_core.product import add_product
from fusedres.kernels.triton_core.splits import merge
from fusedres.values import Centred, Gated


@triton.jit
def reduce_rows(
    grad_ptr,
    gate_ptr,
    z_ptr,
    state_ptr,
    pivot_ptr,
    step,
    steps,
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
):
    """Return dᵀz' (BLOCK_K channels from `first` on, by columns) and Σd, over `steps` row blocks from `step` on."""
    dtype = pivot_ptr.dtype.element_ty
    cross = tl.zeros([BLOCK_K, BLOCK_C], dtype)
    sum_d = tl.zeros([BLOCK_K, 16], dtype)  # threads own rows 16 apart, so they exchange nothing inside the loop
    for i in range(steps):
        rows = (step + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        d = load_d(grad_ptr, gate_ptr, rows, first, M, K, BLOCK_K, 0)
        offsets = pixel_offsets(rows, M, P, Q, H, W, C, STRIDE)
        z = load_centred(z_ptr, state_ptr, pivot_ptr, offsets, columns, C, C % BLOCK_C == 0, 1)
        cross = add_product(cross, d, z, gate_ptr is not None, PRECISION)
        if WITH_SUM:
            sum_d += tl.sum(tl.reshape(d.to(dtype), [BLOCK_K, BLOCK_M // 16, 16]), 1)
    return cross, tl.sum(sum_d, 1)


@jit_for_any_batch
def one_pass_reduce_kernel(
    grad_ptr,  # (M, K)
    gate_ptr,  # (M, ceil(K / 8)) uint8, or None
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
    steps,  # per split
    STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    X_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_z: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles_x: tl.constexpr = (X_C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) % (tiles_z + tiles_x)
    split = tl.program_id(1)
    first = tl.program_id(0) // (tiles_z + tiles_x) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    step = split * steps
    out_ptr += split.to(tl.int64) * (K * (C + X_C + 1))
    arange = tl.arange(0, BLOCK_C)
    if tile == 0:
        cross, sum_d = reduce_rows(
            grad_ptr, gate_ptr, z_ptr, state_ptr, pivot_ptr, step, steps, first, arange, M, P, Q, H, W, STRIDE, C,
            K, True, PRECISION, BLOCK_M, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        tl.store(out_ptr + k[:, None] * C + arange[None, :], cross, mask=(k < K)[:, None] & (arange < C)[None, :])
        tl.store(out_ptr + K * (C + X_C) + k, sum_d, mask=k < K)
    elif tile < tiles_z:
        columns = tile * BLOCK_C + arange
        cross, _ = reduce_rows(
            grad_ptr, gate_ptr, z_ptr, state_ptr, pivot_ptr, step, steps, first, columns, M, P, Q, H, W, STRIDE, C,
            K, False, PRECISION, BLOCK_M, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        tl.store(out_ptr + k[:, None] * C + columns[None, :], cross, mask=(k < K)[:, None] & (columns < C)[None, :])
    elif x_ptr is not None:
        columns = (tile - tiles_z) * BLOCK_C + arange
        cross, _ = reduce_rows(
            grad_ptr, gate_ptr, x_ptr, None, x_pivot_ptr, step, steps, first, columns, M, P, Q, X_H, X_W, X_STRIDE, X_C,
            K, False, PRECISION, BLOCK_M, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        pointers = out_ptr + K * C + k[:, None] * X_C + columns[None, :]
        tl.store(pointers, cross, mask=(k < K)[:, None] & (columns < X_C)[None, :])


@jit_for_any_batch
def one_pass_finalize_kernel(
    splits_ptr,  # (S, K·C + K·X_C + K) float32 or float64
    out_cross_ptr,  # (K, C); all following ones have splits' dtype
    out_x_cross_ptr,  # (K, X_C), or None
    out_sum_ptr,  # (K,)
    S,
    CROSS: tl.constexpr,  # K·C
    X_CROSS: tl.constexpr,  # K·X_C
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    both: tl.constexpr = CROSS + X_CROSS
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK_S, BLOCK], splits_ptr.dtype.element_ty)
    for first in range(0, S, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        inside = (split < S)[:, None] & (elements < both + K)[None, :]
        sums += tl.load(splits_ptr + split.to(tl.int64)[:, None] * (both + K) + elements[None, :], mask=inside, other=0)
    value = tl.sum(sums, 0)
    tl.store(out_cross_ptr + elements, value, mask=elements < CROSS)
    if out_x_cross_ptr is not None:
        tl.store(out_x_cross_ptr + elements - CROSS, value, mask=(elements >= CROSS) & (elements < both))
    tl.store(out_sum_ptr + elements - both, value, mask=(elements >= both) & (elements < both + K))


def one_pass_reduce(
    gated: Gated, z: Centred, z_state: Tensor | None, x: Centred | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    grad, gate = before_product(*gated)
    source, pivot, stride = z
    joined, x_pivot, x_stride = (None, None, 1) if x is None else x
    n, channels, p, q = grad.shape
    rows, in_channels, x_channels = n * p * q, source.shape[1], 0 if joined is None else joined.shape[1]
    columns = in_channels, x_channels
    candidates = configs.reduce(channels, columns, grad.dtype, gpu(grad.device))
    config = choose(candidates, "one_pass_reduce", grad.dtype, rows, in_channels, channels, x_channels)
    sizes = channels * in_channels, channels * x_channels
    steps = configs.steps(rows, channels, columns, config, pivot.dtype, grad.device)
    count = ceil_div(rows, config["BLOCK_M"] * steps)
    splits = pivot.new_empty((count, sum(sizes) + channels))
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "z_ptr": source[:, :, ::stride, ::stride],
        "state_ptr": z_state,
        "pivot_ptr": pivot,
        "x_ptr": None if joined is None else joined[:, :, ::x_stride, ::x_stride],
        "x_pivot_ptr": x_pivot,
        "out_ptr": splits,
        "M": rows,
        "P": p,
        "Q": q,
        "steps": loop_bound(steps),
        "C": in_channels,
        "K": channels,
        "X_C": x_channels,
        "PRECISION": input_precision(grad.dtype),
        **grid_arguments(source, stride),
        **grid_arguments(joined, x_stride, "X_"),
    }
    tiles = ceil_div(in_channels, config["BLOCK_C"]) + ceil_div(x_channels, config["BLOCK_C"])
    grid = (ceil_div(channels, config["BLOCK_K"]) * tiles, count)
    launch(one_pass_reduce_kernel, grid, arguments, config, candidates)

    cross, sum_d = pivot.new_empty((channels, in_channels)), pivot.new_empty(channels)
    x_cross = pivot.new_empty((channels, x_channels))
    candidates = merge(count)
    config = choose(candidates, "one_pass_finalize", pivot.dtype, count, splits.shape[1])
    arguments = {
        "splits_ptr": splits,
        "out_cross_ptr": cross,
        "out_x_cross_ptr": x_cross if x_channels else None,
        "out_sum_ptr": sum_d,
        "S": loop_bound(count),
        "CROSS": sizes[0],
        "X_CROSS": sizes[1],
        "K": channels,
    }
    launch(one_pass_finalize_kernel, (ceil_div(splits.shape[1], config["BLOCK"]),), arguments, config, candidates)
    return cross, x_cross, sum_d
