"""BatchNorm of a 1x1 convolution before it runs (equations in fusedres.ops.one_pass), in Triton.

    μ = s/M     Cov = (G_z − s·μᵀ)/M     projected = W·Cov     mean = W·μ     var = rowsum(projected⊙W), at least 0
    W̃ = round(scale⊙W)     b = shift + scale⊙mean − W̃·μ

one_pass_project  A program owns BLOCK_K×BLOCK_C of projected. It reads rows of W and columns of G_z, forms Cov in
                  float64 on load, and multiplies in float64 or in true float32. It writes projected, and its columns'
                  shares of mean, W·t and var in float64. Program 0 counts the batch; the next launch reads the count.
one_pass_state    A program owns BLOCK_K channels. It adds the shares in fixed order in float64, and writes the state
                  and the running statistics.
one_pass_fold     A program owns BLOCK_K rows of W. It writes W̃ and b.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.bn_statistics.triton import store_average, store_state
from fusedres.kernels.one_pass import configs
from fusedres.kernels.triton_core.launch import ceil_div, choose, launch
from fusedres.values import Gram, Norm

# Up to this many multiplications, W·Cov is computed in float64: it costs little, and var loses nothing to cancellation.
FLOAT64_PRODUCTS = 1 << 24


@triton.jit
def load_weight(weight_ptr, k, c, stride_k, stride_c, K: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """Load W (K, C), of any strides and type, at channels k and inputs c (a column and a row), in dtype; 0 outside."""
    pointers = weight_ptr + k.to(tl.int64) * stride_k + c * stride_c
    return tl.load(pointers, mask=(k < K) & (c < C), other=0).to(dtype)


@triton.jit
def one_pass_project_kernel(
    weight_ptr,  # (K, C) any type and strides
    pivot_ptr,  # (C,) float32 or float64
    total_ptr,  # (C,) float64
    gram_ptr,  # (C, C) float64
    batches_ptr,  # () int64, or None
    out_ptr,  # (K, C) of pivot's dtype
    out_shares_ptr,  # (ceil(C / BLOCK_C), 3, K) float64: shares of mean, W·t and var
    out_batches_ptr,
    count: tl.float64,
    stride_k,
    stride_c,
    C: tl.constexpr,
    K: tl.constexpr,
    IS_WIDE: tl.constexpr,  # multiply in float64
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if IS_WIDE else out_ptr.dtype.element_ty
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) % tiles
    rows = tl.program_id(0) // tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(total_ptr + columns, mask=columns < C, other=0) / count
    inverse = 1 / tl.full([1, 1], count, tl.float64)

    projected = tl.zeros([BLOCK_K, BLOCK_C], dtype)
    for first in range(0, C, BLOCK_D):
        depth = first + tl.arange(0, BLOCK_D)
        weight = load_weight(weight_ptr, rows[:, None], depth[None, :], stride_k, stride_c, K, C, dtype)
        inside = (depth < C)[:, None] & (columns < C)[None, :]
        gram = tl.load(gram_ptr + depth[:, None] * C + columns[None, :], mask=inside, other=0)
        total = tl.load(total_ptr + depth, mask=depth < C, other=0)
        cov = ((gram - total[:, None] * mean[None, :]) * inverse).to(dtype)
        projected = tl.dot(weight, cov, projected, input_precision="ieee", out_dtype=dtype)

    weight = load_weight(weight_ptr, rows[:, None], columns[None, :], stride_k, stride_c, K, C, tl.float64)
    pivot = tl.load(pivot_ptr + columns, mask=columns < C, other=0).to(tl.float64)
    inside = (rows < K)[:, None] & (columns < C)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * C + columns[None, :], projected, mask=inside)
    out_shares_ptr += tile * 3 * K + rows
    tl.store(out_shares_ptr, tl.sum(weight * mean[None, :], 1), mask=rows < K)
    tl.store(out_shares_ptr + K, tl.sum(weight * pivot[None, :], 1), mask=rows < K)
    tl.store(out_shares_ptr + 2 * K, tl.sum(weight * projected.to(tl.float64), 1), mask=rows < K)
    if out_batches_ptr is not None:
        tl.store(out_batches_ptr, tl.load(batches_ptr) + 1, mask=tl.program_id(0) == 0)


@triton.jit
def one_pass_state_kernel(
    shares_ptr,  # (T, 3, K) float64: shares of mean, W·t and var
    weight_ptr,  # (K,) any type, or None: BatchNorm's
    bias_ptr,
    running_mean_ptr,  # (K,) any type, or None
    running_var_ptr,
    batches_ptr,  # () int64, including this batch; or None
    out_state_ptr,  # (4, K) float32 or float64
    out_running_mean_ptr,
    out_running_var_ptr,
    count: tl.float64,
    momentum: tl.float64,
    eps: tl.float64,
    K,
    T: tl.constexpr,
    IS_CUMULATIVE: tl.constexpr,  # averaging factor 1 / batches
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mean = tl.zeros([BLOCK_K], tl.float64)
    shift = tl.zeros([BLOCK_K], tl.float64)
    var = tl.zeros([BLOCK_K], tl.float64)
    for tile in range(T):
        share_ptr = shares_ptr + tile * 3 * K + rows
        mean += tl.load(share_ptr, mask=rows < K, other=0)
        shift += tl.load(share_ptr + K, mask=rows < K, other=0)
        var += tl.load(share_ptr + 2 * K, mask=rows < K, other=0)
    var = tl.where(var < 0, 0.0, var)  # NaN stays NaN
    store_state(out_state_ptr, mean, var, weight_ptr, bias_ptr, eps, K, rows, BLOCK_K)
    if out_running_mean_ptr is not None:
        factor = tl.full([BLOCK_K], momentum, tl.float64)
        if IS_CUMULATIVE:
            factor = tl.full([BLOCK_K], 1, tl.float64) / tl.load(batches_ptr).to(tl.float64)
        store_average(running_mean_ptr, out_running_mean_ptr, mean + shift, factor, K, rows)
        store_average(running_var_ptr, out_running_var_ptr, var * (count / (count - 1)), factor, K, rows)


@triton.jit
def one_pass_fold_kernel(
    weight_ptr,  # (K, C) any type and strides
    state_ptr,  # (4, K) float32 or float64: mean, invstd, scale, shift
    total_ptr,  # (C,) float64
    out_ptr,  # (K, C) of the activations' dtype
    out_offset_ptr,  # (K,) like state
    count: tl.float64,
    stride_k,
    stride_c,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mean = tl.load(state_ptr + rows, mask=rows < K, other=0)
    scale = tl.load(state_ptr + 2 * K + rows, mask=rows < K, other=0)
    shift = tl.load(state_ptr + 3 * K + rows, mask=rows < K, other=0)
    total = tl.zeros([BLOCK_K, BLOCK_C], dtype)
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        weight = load_weight(weight_ptr, rows[:, None], columns[None, :], stride_k, stride_c, K, C, dtype)
        centre = (tl.load(total_ptr + columns, mask=columns < C, other=0) / count).to(dtype)
        folded = (scale[:, None] * weight).to(out_ptr.dtype.element_ty)
        inside = (rows < K)[:, None] & (columns < C)[None, :]
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * C + columns[None, :], folded, mask=inside)
        total += folded.to(dtype) * centre[None, :]
    tl.store(out_offset_ptr + rows, shift + scale * mean - tl.sum(total, 1), mask=rows < K)


def one_pass_statistics(conv_weight: Tensor, gram: Gram, count: int, norm: Norm) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass."""
    pivot, total, squares = gram
    weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps = norm
    channels, in_channels = conv_weight.shape[:2]
    wide = channels * in_channels * in_channels <= FLOAT64_PRODUCTS
    dtype = torch.float64 if wide else pivot.dtype
    if wide and conv_weight.itemsize == 2:
        conv_weight = conv_weight.float()  # Triton 3.6 cannot compile a float64 product of 16-bit loads
    candidates = configs.project(channels, in_channels, dtype)
    config = choose(candidates, "one_pass_project", dtype, channels, in_channels)
    tiles = ceil_div(in_channels, config["BLOCK_C"])
    projected = torch.empty((channels, in_channels), dtype=pivot.dtype, device=pivot.device)
    shares = torch.empty((tiles, 3, channels), dtype=torch.float64, device=pivot.device)
    arguments = {
        "weight_ptr": conv_weight,
        "pivot_ptr": pivot,
        "total_ptr": total,
        "gram_ptr": squares,
        "batches_ptr": num_batches_tracked,
        "out_ptr": projected,
        "out_shares_ptr": shares,
        "out_batches_ptr": num_batches_tracked,
        "count": float(count),
        "stride_k": conv_weight.stride(0),
        "stride_c": conv_weight.stride(1),
        "C": in_channels,
        "K": channels,
        "IS_WIDE": wide,
    }
    launch(one_pass_project_kernel, (ceil_div(channels, config["BLOCK_K"]) * tiles,), arguments, config, candidates)

    averaged = running_mean is not None and running_var is not None
    state = torch.empty((4, channels), dtype=pivot.dtype, device=pivot.device)
    candidates = configs.vectors(channels)
    config = choose(candidates, "one_pass_state", channels, tiles)
    arguments = {
        "shares_ptr": shares,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "running_mean_ptr": running_mean if averaged else None,
        "running_var_ptr": running_var if averaged else None,
        "batches_ptr": num_batches_tracked if momentum is None else None,
        "out_state_ptr": state,
        "out_running_mean_ptr": running_mean if averaged else None,
        "out_running_var_ptr": running_var if averaged else None,
        "count": float(count),
        "momentum": 0.0 if momentum is None else float(momentum),
        "eps": float(eps),
        "K": channels,
        "T": tiles,
        "IS_CUMULATIVE": momentum is None,
    }
    launch(one_pass_state_kernel, (ceil_div(channels, config["BLOCK_K"]),), arguments, config, candidates)
    return state, projected


def one_pass_fold(
    conv_weight: Tensor, state: Tensor, total: Tensor, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    channels, in_channels = conv_weight.shape[:2]
    folded = torch.empty((channels, in_channels), dtype=dtype, device=state.device)
    offset = torch.empty(channels, dtype=state.dtype, device=state.device)
    candidates = configs.rows(in_channels)
    config = choose(candidates, "one_pass_fold", dtype, channels, in_channels)
    arguments = {
        "weight_ptr": conv_weight,
        "state_ptr": state,
        "total_ptr": total,
        "out_ptr": folded,
        "out_offset_ptr": offset,
        "count": float(count),
        "stride_k": conv_weight.stride(0),
        "stride_c": conv_weight.stride(1),
        "C": in_channels,
        "K": channels,
    }
    launch(one_pass_fold_kernel, (ceil_div(channels, config["BLOCK_K"]),), arguments, config, candidates)
    return folded, offset
