"""The passes over the buffer of a dense block in Triton; not yet run on a GPU.

The buffer is (M, D) rows, and a pass touches C of its columns: a prefix, or a slice.

dense_slice_kernel       A program owns BLOCK_M rows by BLOCK_C channels. It copies them between tensors with rows of
                         different widths; with corrections (a, b), out = grad − a − b·(x − mean).
dense_moments_kernel     A program owns BLOCK_C channels of all T partial statistics (bn_statistics), and merges them.
dense_backward_kernel    A program owns BLOCK_M·steps rows by BLOCK_C channels. It reads the gradient and the prefix,
                         adds scale·d to the gradient of the buffer, and writes one partial of Σd and Σd·(x − mean).
dense_sums_kernel        A program owns BLOCK_C channels of all T partials, and adds them in fixed order. It writes the
                         sums, and adds what follows from them to the corrections.

relu(scale·x + shift) of a prefix is bn_relu's kernel, with the buffer's stride of rows.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fusedres.kernels.bn_backward import configs
from fusedres.kernels.bn_backward.triton_kernels import close_affine
from fusedres.kernels.bn_relu.triton import bn_relu_kernel
from fusedres.kernels.bn_statistics.configs import bn_finalize as moment_blocks
from fusedres.kernels.bn_statistics.triton import load_pivot, merge_tiles, partial_statistics
from fusedres.kernels.triton_core.launch import ceil_div, choose, jit_for_any_batch, launch, loop_bound
from fusedres.kernels.triton_core.rows import row_tiles, tile
from fusedres.values import BnBranch, pixel_rows


@jit_for_any_batch
def dense_slice_kernel(
    grad_ptr,  # (M, C), rows grad_stride apart
    x_ptr,  # (M, C), rows x_stride apart; None, as the next two: a copy
    moments_ptr,  # (C, 2) float64: mean, M2
    corrections_ptr,  # (C, 2) float64
    out_ptr,  # (M, C), rows out_stride apart
    M,
    C,
    grad_stride,
    x_stride,
    out_stride,
    DTYPE: tl.constexpr,  # of the arithmetic
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, column = tile(tl.program_id(0), C, BLOCK_M, BLOCK_C)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    channel = columns < C
    inside = (rows < M)[:, None] & channel[None, :]
    value = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=inside, other=0)
    if corrections_ptr is not None:
        mean = tl.load(moments_ptr + 2 * columns, mask=channel, other=0).to(DTYPE)
        offset = tl.load(corrections_ptr + 2 * columns, mask=channel, other=0).to(DTYPE)
        slope = tl.load(corrections_ptr + 2 * columns + 1, mask=channel, other=0).to(DTYPE)
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0).to(DTYPE)
        value = value.to(DTYPE) - offset[None, :] - (x - mean[None, :]) * slope[None, :]
    out = out_ptr + rows[:, None] * out_stride + columns[None, :]
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit_for_any_batch
def dense_moments_kernel(
    partials_ptr,  # (T, 2, C) float32 or float64: mean of x − pivot, and M2
    rows_ptr,  # (T,) like the partials
    pivot_ptr,  # (C,) any type
    out_ptr,  # (C, 2) float64
    T,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pivot = load_pivot(pivot_ptr, C, columns, dtype)
    _, mean, m2 = merge_tiles(partials_ptr, rows_ptr, pivot, T, C, columns, dtype, True, BLOCK_T, BLOCK_C)
    tl.store(out_ptr + 2 * columns, mean.to(tl.float64) + pivot.to(tl.float64), mask=columns < C)
    tl.store(out_ptr + 2 * columns + 1, m2.to(tl.float64), mask=columns < C)


@jit_for_any_batch
def dense_backward_kernel(
    grad_ptr,  # (M, C)
    x_ptr,  # (M, C), rows `width` apart
    state_ptr,  # (4, C) float32 or float64: mean, invstd, scale, shift
    grad_x_ptr,  # like x
    out_grad_x_ptr,  # the same
    out_partials_ptr,  # (T, 2, C) of state's dtype
    M,
    C,
    width,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = state_ptr.dtype.element_ty
    first, column = tile(tl.program_id(0), C, BLOCK_M * steps, BLOCK_C)
    rows, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    channel = columns < C
    mean = tl.load(state_ptr + columns, mask=channel, other=0)
    scale = tl.load(state_ptr + 2 * C + columns, mask=channel, other=0)
    sum_d = tl.zeros([BLOCK_M, BLOCK_C], dtype)
    product = tl.zeros([BLOCK_M, BLOCK_C], dtype)
    for step in range(steps):
        row = first + step * BLOCK_M
        inside = (row + rows < M)[:, None] & channel[None, :]
        offsets = row * width + rows[:, None] * width + columns[None, :]
        d = tl.load(grad_ptr + row * C + rows[:, None] * C + columns[None, :], mask=inside, other=0).to(dtype)
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(dtype)
        d = close_affine(d, x, state_ptr, columns, channel, C)
        sum_d += d
        product += d * (x - mean[None, :])
        before = tl.load(grad_x_ptr + offsets, mask=inside, other=0).to(dtype)
        after = before + scale[None, :] * d
        tl.store(out_grad_x_ptr + offsets, after.to(out_grad_x_ptr.dtype.element_ty), mask=inside)
    out_partials_ptr += first // (BLOCK_M * steps) * 2 * C + columns
    tl.store(out_partials_ptr, tl.sum(sum_d, 0), mask=channel)
    tl.store(out_partials_ptr + C, tl.sum(product, 0), mask=channel)


@jit_for_any_batch
def dense_sums_kernel(
    partials_ptr,  # (T, 2, C) float32 or float64
    state_ptr,  # (4, C) of the same dtype
    corrections_ptr,  # (C, 2) float64; None: constant statistics
    out_corrections_ptr,  # the same
    out_ptr,  # (2, C) like the state: Σd, Σd·x̂
    T,
    C,
    count,  # M
    steps,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = columns < C
    sum_d = tl.zeros([BLOCK_T, BLOCK_C], partials_ptr.dtype.element_ty)
    product = tl.zeros([BLOCK_T, BLOCK_C], partials_ptr.dtype.element_ty)
    for step in range(steps):
        tiles = step * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (tiles < T)[:, None] & channel[None, :]
        partials = partials_ptr + tiles[:, None] * (2 * C) + columns[None, :]
        sum_d += tl.load(partials, mask=inside, other=0)
        product += tl.load(partials + C, mask=inside, other=0)
    invstd = tl.load(state_ptr + C + columns, mask=channel, other=0)
    total, normalised = tl.sum(sum_d, 0), tl.sum(product, 0) * invstd
    tl.store(out_ptr + columns, total, mask=channel)
    tl.store(out_ptr + C + columns, normalised, mask=channel)
    if corrections_ptr is not None:
        scale = tl.load(state_ptr + 2 * C + columns, mask=channel, other=0).to(tl.float64) / count
        offset = tl.load(corrections_ptr + 2 * columns, mask=channel, other=0)
        slope = tl.load(corrections_ptr + 2 * columns + 1, mask=channel, other=0)
        tl.store(out_corrections_ptr + 2 * columns, offset + scale * total.to(tl.float64), mask=channel)
        slope += scale * invstd.to(tl.float64) * normalised.to(tl.float64)
        tl.store(out_corrections_ptr + 2 * columns + 1, slope, mask=channel)


def _slice(
    grad: Tensor, x: Tensor | None, moments: Tensor | None, corrections: Tensor | None, out: Tensor, strides: list[int]
) -> None:
    """Copy or correct columns; strides: of the rows of grad, x and out."""
    channels, rows = out.shape[1], pixel_rows(out)
    candidates = row_tiles(channels, out.dtype)
    config = choose(candidates)
    arguments = {
        "grad_ptr": grad,
        "x_ptr": x,
        "moments_ptr": moments,
        "corrections_ptr": corrections,
        "out_ptr": out,
        "M": rows,
        "C": channels,
        "grad_stride": strides[0],
        "x_stride": strides[1],
        "out_stride": strides[2],
        "DTYPE": tl.float64 if out.dtype is torch.float64 else tl.float32,
    }
    grid = (ceil_div(rows, config["BLOCK_M"]) * ceil_div(channels, config["BLOCK_C"]),)
    launch(dense_slice_kernel, grid, arguments, config, candidates)


def dense_append_(buffer: Tensor, x: Tensor, first: int, moments: Tensor | None) -> None:
    """See fusedres.ops.dense_block."""
    width, channels = buffer.shape[1], x.shape[1]
    if not x.numel():
        return
    _slice(x, None, None, None, buffer[:, first : first + channels], [channels, channels, width])
    if moments is None:
        return
    partials, rows, pivot = partial_statistics(x)
    candidates = moment_blocks(channels, partials.dtype)
    config = choose(candidates)
    arguments = {
        "partials_ptr": partials,
        "rows_ptr": rows,
        "pivot_ptr": pivot,
        "out_ptr": moments[first : first + channels],
        "T": partials.shape[0],
        "C": channels,
    }
    launch(dense_moments_kernel, (ceil_div(channels, config["BLOCK_C"]),), arguments, config, candidates)


def dense_bn_relu(buffer: Tensor, state: Tensor) -> Tensor:
    """See fusedres.ops.dense_block."""
    n, width, h, w = buffer.shape
    channels = state.shape[1]
    out = torch.empty((n, channels, h, w), dtype=buffer.dtype, device=buffer.device, memory_format=torch.channels_last)
    candidates = row_tiles(channels, buffer.dtype)
    config = choose(candidates)
    arguments = {
        "x_ptr": buffer[:, :channels],
        "state_ptr": state,
        "pivot_ptr": None,
        "out_ptr": out,
        "M": n * h * w,
        "C": channels,
        "P": h,
        "Q": w,
        "stride_n": h * w * width,
        "stride_h": w * width,
        "stride_w": width,
        "IS_STRIDED": False,
    }
    grid = (ceil_div(n * h * w, config["BLOCK_M"]) * ceil_div(channels, config["BLOCK_C"]),)
    launch(bn_relu_kernel, grid, arguments, config, candidates)
    return out


def dense_bn_relu_backward_(grad: Tensor, buffer: BnBranch, grad_x: Tensor, corrections: Tensor) -> Tensor:
    """See fusedres.ops.dense_block."""
    x, state, batch_statistics = buffer
    width, channels = x.shape[1], grad.shape[1]
    rows = pixel_rows(grad)
    sums = (state.new_empty if rows else state.new_zeros)((2, channels))
    if not rows:
        return sums
    candidates = configs.reduction(rows, channels, grad.element_size())
    config = choose(candidates)
    tiles = ceil_div(rows, configs.row_tile(rows, channels))
    partials = state.new_empty((tiles, 2, channels))
    prefix = grad_x[:, :channels]
    arguments = {
        "grad_ptr": grad,
        "x_ptr": x[:, :channels],
        "state_ptr": state,
        "grad_x_ptr": prefix,
        "out_grad_x_ptr": prefix,
        "out_partials_ptr": partials,
        "M": rows,
        "C": channels,
        "width": width,
        "steps": loop_bound(configs.row_tile(rows, channels) // config["BLOCK_M"]),
    }
    launch(dense_backward_kernel, (tiles * ceil_div(channels, config["BLOCK_C"]),), arguments, config, candidates)
    candidates = configs.merge(channels)
    config = choose(candidates)
    corrected = corrections[:channels] if batch_statistics else None
    arguments = {
        "partials_ptr": partials,
        "state_ptr": state,
        "corrections_ptr": corrected,
        "out_corrections_ptr": corrected,
        "out_ptr": sums,
        "T": tiles,
        "C": channels,
        "count": rows,
        "steps": loop_bound(ceil_div(tiles, config["BLOCK_T"])),
    }
    launch(dense_sums_kernel, (ceil_div(channels, config["BLOCK_C"]),), arguments, config, candidates)
    return sums


def dense_gradient(
    buffer: Tensor, grad_x: Tensor, moments: Tensor | None, corrections: Tensor | None, first: int, channels: int
) -> Tensor:
    """See fusedres.ops.dense_block."""
    n, width, h, w = buffer.shape
    end = first + channels
    out = torch.empty((n, channels, h, w), dtype=buffer.dtype, device=buffer.device, memory_format=torch.channels_last)
    if not out.numel():
        return out
    corrected = moments is not None and corrections is not None
    _slice(
        grad_x[:, first:end],
        buffer[:, first:end] if corrected else None,
        None if moments is None else moments[first:end],
        None if corrections is None else corrections[first:end],
        out,
        [width, width, channels],
    )
    return out
