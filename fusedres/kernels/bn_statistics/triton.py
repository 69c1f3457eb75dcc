"""Batch statistics in Triton: partial statistics of row tiles, and their merge into BatchNorm's state.

    mean = Σx / M      M2 = Σ(x − mean)²      var = M2 / M      invstd = (var + eps)^-½
    scale = weight·invstd      shift = bias − scale·mean                                (Ioffe and Szegedy 2015)

Sets of n_a and n_b rows merge without cancellation (Chan, Golub and LeVeque 1983); δ = mean_b − mean_a:

    M2 = M2_a + M2_b + δ²·n_a·n_b / (n_a + n_b)

Every lane of a tile (the row modulo the block) merges its values row by row or tile by tile. At the end the lanes merge
in a fixed order. Means are of x − pivot, and the pivot is a value of the channel. So float32 keeps small differences of
values far from 0.

bn_partials  A program owns a range of rows by BLOCK_C channels. It reads x once.
bn_finalize  A program owns BLOCK_C channels of every tile. It reads the partial statistics once, and writes the state
             and the running statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.bn_statistics import configs
from fusedres.kernels.triton_core.launch import ceil_div, choose, jit_for_any_batch, launch, multiprocessors
from fusedres.kernels.triton_core.rows import tile
from fusedres.values import Norm, arithmetic_dtype


@triton.jit
def load_pivot(pivot_ptr, C, columns, dtype: tl.constexpr):
    """Load (BLOCK_C,) pivots, 0 if not finite: x − pivot of two infinities would be NaN."""
    pivot = tl.load(pivot_ptr + columns, mask=columns < C, other=0).to(dtype)
    return tl.where(pivot - pivot == 0, pivot, 0.0)


@triton.jit
def merge_lanes(n, total, m2):
    """Return rows, mean and M2 of all lanes, from their rows (lanes,), sums and M2 (lanes, BLOCK_C)."""
    rows = tl.sum(n, 0)
    mean = tl.sum(total, 0) / rows
    gap = total / tl.maximum(n, 1)[:, None] - mean[None, :]
    return rows, mean, tl.sum(m2 + gap * n[:, None] * gap, 0)


@triton.jit
def store_state(out_state_ptr, mean, var, weight_ptr, bias_ptr, eps, C, columns, BLOCK_C: tl.constexpr):
    """Store mean, invstd, scale and shift of BLOCK_C channels."""
    inside = columns < C
    invstd = tl.rsqrt(var + tl.full((BLOCK_C,), eps, var.dtype))
    scale = invstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + columns, mask=inside).to(var.dtype)
    shift = -scale * mean
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + columns, mask=inside).to(var.dtype)
    tl.store(out_state_ptr + columns, mean, mask=inside)
    tl.store(out_state_ptr + C + columns, invstd, mask=inside)
    tl.store(out_state_ptr + 2 * C + columns, scale, mask=inside)
    tl.store(out_state_ptr + 3 * C + columns, shift, mask=inside)


@jit_for_any_batch
def bn_partials_kernel(
    x_ptr,  # (M, C)
    pivot_ptr,  # (C,) like x
    out_partials_ptr,  # (T, 2, C) float32 or float64: mean of x − pivot, and M2
    out_rows_ptr,  # (T,) like the partials
    group_rows,  # rows of a group, which share no tile with those of another: M, or those of a sample
    group_tiles,
    C,
    tile_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = out_partials_ptr.dtype.element_ty
    index, column = tile(tl.program_id(0), C, 1, BLOCK_C)
    lanes, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    group = index // group_tiles
    first = (index - group * group_tiles) * tile_rows
    count = tl.minimum(group_rows - first, tile_rows)
    x_ptr += (group * group_rows + first) * C
    offsets = lanes[:, None] * C + columns[None, :]
    pivot = load_pivot(pivot_ptr, C, columns, dtype)

    n = tl.zeros((BLOCK_M,), dtype)  # rows that a lane has merged, and 1 / n
    inverse = tl.zeros((BLOCK_M,), dtype)
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    row = 0
    while row < count:
        left = row + lanes < count
        inside = left[:, None] & (columns < C)[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0)
        x = tl.where(inside, x.to(dtype) - pivot[None, :], 0.0)
        gap = x - total * inverse[:, None]
        n += left.to(dtype)
        inverse = 1 / tl.maximum(n, 1)
        m2 += gap * tl.where(left, 1 - inverse, 0.0)[:, None] * gap
        total += x
        x_ptr += BLOCK_M * C
        row += BLOCK_M

    rows, mean, m2 = merge_lanes(n, total, m2)
    out_partials_ptr += index * 2 * C + columns
    tl.store(out_partials_ptr, mean, mask=columns < C)
    tl.store(out_partials_ptr + C, m2, mask=columns < C)
    tl.store(out_rows_ptr + index, rows, mask=column == 0)


@triton.jit
def merge_tiles(
    partials_ptr,  # (T, 2, C): mean and M2
    rows_ptr,  # (T,)
    pivot,
    T,
    C,
    columns,
    dtype: tl.constexpr,
    IS_SHIFTED: tl.constexpr,  # the tiles' means are of x − pivot
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return rows, mean of x − pivot and M2 of all tiles, for BLOCK_C channels."""
    lanes = tl.arange(0, BLOCK_T)
    n = tl.zeros((BLOCK_T,), dtype)  # rows that a lane has merged, and 1 / n
    inverse = tl.zeros((BLOCK_T,), dtype)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    m2 = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    first = 0
    while first < T:
        tiles = first + lanes
        inside = (tiles < T)[:, None] & (columns < C)[None, :]
        offsets = tiles.to(tl.int64)[:, None] * (2 * C) + columns[None, :]
        rows = tl.load(rows_ptr + tiles, mask=tiles < T, other=0)
        mean = tl.load(partials_ptr + offsets, mask=inside, other=0)
        m2 += tl.load(partials_ptr + C + offsets, mask=inside, other=0)
        if not IS_SHIFTED:
            mean -= pivot[None, :]
        gap = mean - total * inverse[:, None]
        inverse = 1 / tl.maximum(n + rows, 1)
        m2 += gap * (n * rows * inverse)[:, None] * gap
        n += rows
        total += mean * rows[:, None]
        first += BLOCK_T
    return merge_lanes(n, total, m2)


@jit_for_any_batch
def bn_finalize_kernel(
    partials_ptr,  # (T, 2, C) float32 or float64: mean and M2
    rows_ptr,  # (T,) like the partials
    pivot_ptr,  # (C,) any type
    weight_ptr,  # (C,) any type, or None
    bias_ptr,
    running_mean_ptr,  # (C,) any type, or None
    running_var_ptr,
    batches_ptr,  # () int64, or None; IS_CUMULATIVE: a copy, because program 0 may count before others read
    out_state_ptr,  # (4, C) like the partials
    out_running_mean_ptr,
    out_running_var_ptr,
    out_batches_ptr,
    momentum: tl.float64,
    eps: tl.float64,
    T,
    C,
    IS_SHIFTED: tl.constexpr,  # the tiles' means are of x − pivot
    IS_CUMULATIVE: tl.constexpr,  # averaging factor 1 / batches
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pivot = load_pivot(pivot_ptr, C, columns, dtype)

    count, mean, m2 = merge_tiles(partials_ptr, rows_ptr, pivot, T, C, columns, dtype, IS_SHIFTED, BLOCK_T, BLOCK_C)
    mean += pivot
    store_state(out_state_ptr, mean, m2 / count, weight_ptr, bias_ptr, eps, C, columns, BLOCK_C)
    if out_batches_ptr is not None:
        batches = tl.load(batches_ptr) + 1
        tl.store(out_batches_ptr, batches, mask=tl.program_id(0) == 0)
    if out_running_mean_ptr is not None:
        factor = tl.full((BLOCK_C,), momentum, dtype)
        if IS_CUMULATIVE:
            factor = tl.full((BLOCK_C,), 1, dtype) / batches.to(dtype)
        store_average(running_mean_ptr, out_running_mean_ptr, mean, factor, C, columns)
        store_average(running_var_ptr, out_running_var_ptr, m2 / (count - 1), factor, C, columns)


@triton.jit
def store_average(running_ptr, out_running_ptr, value, factor, C, columns):
    """Store (1 − factor)·running + factor·value."""
    running = tl.load(running_ptr + columns, mask=columns < C).to(value.dtype)
    average = (1 - factor) * running + factor * value
    tl.store(out_running_ptr + columns, average.to(out_running_ptr.dtype.element_ty), mask=columns < C)


@triton.jit
def bn_frozen_kernel(
    weight_ptr,  # (C,) any type, or None
    bias_ptr,
    running_mean_ptr,  # (C,) any type
    running_var_ptr,
    out_state_ptr,  # (4, C) float32 or float64
    eps: tl.float64,
    C,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = out_state_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(running_mean_ptr + columns, mask=columns < C).to(dtype)
    var = tl.load(running_var_ptr + columns, mask=columns < C).to(dtype)
    store_state(out_state_ptr, mean, var, weight_ptr, bias_ptr, eps, C, columns, BLOCK_C)


def partial_statistics(x: Tensor, by_sample: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return partials (T, 2, C) of x − pivot, the rows of each of them (T,), and the pivot (C,).

    by_sample: each sample has tiles of its own, in order.
    """
    n, c, h, w = x.shape
    groups = n if by_sample else 1
    candidates = configs.bn_partials(c, x.dtype)
    config = choose(candidates)
    group_rows = n * h * w // groups
    wanted = max(1, multiprocessors(x.device) // groups)
    group_tiles, tile_rows = configs.partial_tiles(group_rows, c, config, wanted)
    tiles = groups * group_tiles
    partials = torch.empty((tiles, 2, c), dtype=arithmetic_dtype(x.dtype), device=x.device)
    rows = torch.empty(tiles, dtype=partials.dtype, device=x.device)
    pivot = x[0, :, 0, 0]
    arguments = {
        "x_ptr": x,
        "pivot_ptr": pivot,
        "out_partials_ptr": partials,
        "out_rows_ptr": rows,
        "group_rows": group_rows,
        "group_tiles": group_tiles,
        "C": c,
        "tile_rows": tile_rows,
    }
    launch(bn_partials_kernel, (tiles * ceil_div(c, config["BLOCK_C"]),), arguments, config, candidates)
    return partials, rows, pivot


def bn_statistics(x: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    partials, rows, pivot = partial_statistics(x)
    return _finalize(partials, rows, norm, pivot, True)


def bn_statistics_and_means(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_statistics."""
    partials, rows, pivot = partial_statistics(x, True)
    of_samples = partials[:, 0].unflatten(0, (x.shape[0], -1)), rows.view(x.shape[0], -1, 1)
    means = torch.where(pivot.isfinite(), pivot, 0.0) + (of_samples[0] * of_samples[1]).sum(1) / of_samples[1].sum(1)
    return _finalize(partials, rows, norm, pivot, True), means


def bn_statistics_of_sum_(x: Tensor, added: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    return bn_statistics(x.add_(added), norm)


def bn_from_moments(moments: Tensor, rows: int, norm: Norm, dtype: torch.dtype) -> Tensor:
    """See fusedres.ops.dense_block: the moments are one tile of all rows, in float64."""
    partials = moments.t().contiguous().unsqueeze(0)
    counts = torch.full((1,), float(rows), dtype=torch.float64, device=moments.device)
    return _finalize(partials, counts, norm, partials[0, 0], False).to(arithmetic_dtype(dtype))


def bn_finalize(partials: Tensor, rows: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    return _finalize(partials, rows, norm, partials[0, 0], False)


def _finalize(partials: Tensor, rows: Tensor, norm: Norm, pivot: Tensor, shifted: bool) -> Tensor:
    weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps = norm
    tiles, _, c = partials.shape
    state = torch.empty((4, c), dtype=partials.dtype, device=partials.device)
    averaged = running_mean is not None and running_var is not None
    cumulative = averaged and momentum is None
    snapshot = num_batches_tracked.clone() if cumulative and num_batches_tracked is not None else None
    candidates = configs.bn_finalize(c, partials.dtype)
    config = choose(candidates)
    arguments = {
        "partials_ptr": partials,
        "rows_ptr": rows,
        "pivot_ptr": pivot,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "running_mean_ptr": running_mean if averaged else None,
        "running_var_ptr": running_var if averaged else None,
        "batches_ptr": num_batches_tracked if snapshot is None else snapshot,
        "out_state_ptr": state,
        "out_running_mean_ptr": running_mean if averaged else None,
        "out_running_var_ptr": running_var if averaged else None,
        "out_batches_ptr": num_batches_tracked,
        "momentum": 0.0 if momentum is None else float(momentum),
        "eps": float(eps),
        "T": tiles,
        "C": c,
        "IS_SHIFTED": shifted,
        "IS_CUMULATIVE": cumulative,
    }
    launch(bn_finalize_kernel, (ceil_div(c, config["BLOCK_C"]),), arguments, config, candidates)
    return state


def bn_frozen(x: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    weight, bias, running_mean, running_var, *_, eps = norm
    assert running_mean is not None and running_var is not None  # checked by the op
    c = running_mean.shape[0]
    state = torch.empty((4, c), dtype=arithmetic_dtype(x.dtype), device=running_mean.device)
    candidates = configs.bn_frozen()
    config = choose(candidates)
    arguments = {
        "weight_ptr": weight,
        "bias_ptr": bias,
        "running_mean_ptr": running_mean,
        "running_var_ptr": running_var,
        "out_state_ptr": state,
        "eps": float(eps),
        "C": c,
    }
    launch(bn_frozen_kernel, (ceil_div(c, config["BLOCK_C"]),), arguments, config, candidates)
    return state
