"""The small products of the one-pass tail's backward, in three launches; equations in fusedres.ops.one_pass.

    dγ = r⊙(rowsum(W⊙G) − mean⊙Σd)     c2 = scale⊙r⊙dγ/M     dW = scale⊙G − (scale⊙Σd/M)·sᵀ − M·c2⊙projected
    Q̃ = round(Wᵀ·diag(c2)·W)           constant = (s/M)ᵀ·Q̃ − (Σd/M)ᵀ·W̃

one_pass_parameters  A program owns BLOCK_K rows of W. It reads W, G and projected, and writes dW, dγ, c2.
one_pass_quadratic   A program owns a BLOCK_A×BLOCK_B tile of Q over BLOCK_D·STEPS of the K channels, in true float32
                     or float64. Tiles completely below the diagonal are left out. It reads the columns of W of both
                     sides of its tile, and writes its split of Q. The first row of tiles also reads W̃, and writes a
                     split of (Σd/M)ᵀ·W̃.
one_pass_constant    A program owns BLOCK_A rows of Q and adds all splits in fixed order. Below the diagonal it reads
                     the mirror image. It writes Q̃ and the constant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.one_pass import configs
from fusedres.kernels.one_pass.statistics import load_weight
from fusedres.kernels.triton_core.launch import ceil_div, choose, launch
from fusedres.values import GramState


@triton.jit
def one_pass_parameters_kernel(
    weight_ptr,  # (K, C) any type and strides
    cross_ptr,  # (K, C) float32 or float64, like all following ones unless noted
    sum_d_ptr,  # (K,)
    state_ptr,  # (4, K): mean, invstd, scale, shift
    projected_ptr,  # (K, C)
    total_ptr,  # (C,) float64
    out_ptr,  # (K, C) any type and strides
    out_grad_weight_ptr,  # (K,)
    out_c2_ptr,  # (K,)
    count: tl.float64,
    stride_k,
    stride_c,
    out_stride_k,
    out_stride_c,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = cross_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_offsets = rows.to(tl.int64)[:, None] * C
    mean = tl.load(state_ptr + rows, mask=rows < K, other=0)
    invstd = tl.load(state_ptr + K + rows, mask=rows < K, other=0)
    scale = tl.load(state_ptr + 2 * K + rows, mask=rows < K, other=0)
    sum_d = tl.load(sum_d_ptr + rows, mask=rows < K, other=0)

    product = tl.zeros([BLOCK_K, BLOCK_C], dtype)
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = (rows < K)[:, None] & (columns < C)[None, :]
        weight = load_weight(weight_ptr, rows[:, None], columns[None, :], stride_k, stride_c, K, C, dtype)
        product += weight * tl.load(cross_ptr + row_offsets + columns[None, :], mask=inside, other=0)
    grad_weight = invstd * (tl.sum(product, 1) - mean * sum_d)
    tl.store(out_grad_weight_ptr + rows, grad_weight, mask=rows < K)
    inverse = (1 / tl.full([BLOCK_K], count, tl.float64)).to(dtype)
    tl.store(out_c2_ptr + rows, scale * invstd * grad_weight * inverse, mask=rows < K)

    of_total = scale * sum_d * inverse
    of_projected = scale * invstd * grad_weight
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = (rows < K)[:, None] & (columns < C)[None, :]
        cross = tl.load(cross_ptr + row_offsets + columns[None, :], mask=inside, other=0)
        projected = tl.load(projected_ptr + row_offsets + columns[None, :], mask=inside, other=0)
        total = tl.load(total_ptr + columns, mask=columns < C, other=0).to(dtype)
        grad = scale[:, None] * cross - of_total[:, None] * total[None, :] - of_projected[:, None] * projected
        pointers = out_ptr + rows.to(tl.int64)[:, None] * out_stride_k + columns[None, :] * out_stride_c
        tl.store(pointers, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def one_pass_quadratic_kernel(
    weight_ptr,  # (K, C) any type and strides
    c2_ptr,  # (K,) float32 or float64
    folded_ptr,  # (K, C) of the activations' dtype
    sum_d_ptr,  # (K,) of c2's dtype
    out_ptr,  # (S, C + 1, C) of c2's dtype: splits of Q, each followed by its split of (Σd/M)ᵀ·W̃
    count: tl.float64,
    stride_k,
    stride_c,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    dtype: tl.constexpr = c2_ptr.dtype.element_ty
    tiles_b: tl.constexpr = (C + BLOCK_B - 1) // BLOCK_B
    tile = tl.program_id(0)
    column_a, column_b = tile // tiles_b * BLOCK_A, tile % tiles_b * BLOCK_B
    if column_a >= column_b + BLOCK_B:
        return
    split = tl.program_id(1)
    columns_a, columns_b = column_a + tl.arange(0, BLOCK_A), column_b + tl.arange(0, BLOCK_B)
    once = tl.where(column_a == 0, C, 0)  # channels of W̃ that this program sums
    inverse = (1 / tl.full([1], count, tl.float64)).to(dtype)
    matrix = tl.zeros([BLOCK_A, BLOCK_B], dtype)
    total = tl.zeros([BLOCK_D, BLOCK_B], dtype)
    for step in range(STEPS):
        k = (split * STEPS + step) * BLOCK_D + tl.arange(0, BLOCK_D)
        c2 = tl.load(c2_ptr + k, mask=k < K, other=0)
        a = load_weight(weight_ptr, k[None, :], columns_a[:, None], stride_k, stride_c, K, C, dtype) * c2[None, :]
        b = load_weight(weight_ptr, k[:, None], columns_b[None, :], stride_k, stride_c, K, C, dtype)
        matrix = tl.dot(a, b, matrix, input_precision="ieee", out_dtype=dtype)
        folded = load_weight(folded_ptr, k[:, None], columns_b[None, :], C, 1, K, once, dtype)
        total += (tl.load(sum_d_ptr + k, mask=k < K, other=0) * inverse)[:, None] * folded
    out_ptr += split.to(tl.int64) * (C + 1) * C
    inside = (columns_a < C)[:, None] & (columns_b < C)[None, :]
    tl.store(out_ptr + columns_a[:, None] * C + columns_b[None, :], matrix, mask=inside)
    tl.store(out_ptr + C * C + columns_b, tl.sum(total, 0), mask=columns_b < once)


@triton.jit
def one_pass_constant_kernel(
    splits_ptr,  # (S, C + 1, C) float32 or float64
    total_ptr,  # (C,) float64
    out_ptr,  # (C, C) of the activations' dtype
    out_constant_ptr,  # (C,) like the splits
    count: tl.float64,
    S: tl.constexpr,
    C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    dtype: tl.constexpr = splits_ptr.dtype.element_ty
    size: tl.constexpr = (C + 1) * C
    rows = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    total = tl.zeros([BLOCK_A, BLOCK_B], dtype)
    for first in range(0, C, BLOCK_B):
        columns = first + tl.arange(0, BLOCK_B)
        inside = (rows < C)[:, None] & (columns < C)[None, :]
        low = tl.minimum(rows[:, None], columns[None, :])
        high = tl.maximum(rows[:, None], columns[None, :])
        matrix = tl.zeros([BLOCK_A, BLOCK_B], dtype)
        for split in tl.static_range(S):
            matrix += tl.load(splits_ptr + split * size + low * C + high, mask=inside, other=0)
        rounded = matrix.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * C + columns[None, :], rounded, mask=inside)
        centre = (tl.load(total_ptr + columns, mask=columns < C, other=0) / count).to(dtype)
        total += rounded.to(dtype) * centre[None, :]
    constant = tl.sum(total, 1)
    for split in tl.static_range(S):
        constant -= tl.load(splits_ptr + split * size + C * C + rows, mask=rows < C, other=0)
    tl.store(out_constant_ptr + rows, constant, mask=rows < C)


def one_pass_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    gram_state: GramState,
    count: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    state, projected, total = gram_state
    channels, in_channels = folded.shape
    grad_conv, grad_weight, c2 = torch.empty_like(conv_weight), torch.empty_like(sum_d), torch.empty_like(sum_d)
    sizes = {
        "count": float(count),
        "stride_k": conv_weight.stride(0),
        "stride_c": conv_weight.stride(1),
        "C": in_channels,
        "K": channels,
    }
    candidates = configs.rows(in_channels)
    config = choose(candidates, "one_pass_parameters", sum_d.dtype, channels, in_channels)
    arguments = {
        "weight_ptr": conv_weight,
        "cross_ptr": cross,
        "sum_d_ptr": sum_d,
        "state_ptr": state,
        "projected_ptr": projected,
        "total_ptr": total,
        "out_ptr": grad_conv,
        "out_grad_weight_ptr": grad_weight,
        "out_c2_ptr": c2,
        "out_stride_k": grad_conv.stride(0),
        "out_stride_c": grad_conv.stride(1),
        **sizes,
    }
    launch(one_pass_parameters_kernel, (ceil_div(channels, config["BLOCK_K"]),), arguments, config, candidates)

    candidates = configs.quadratic(channels, in_channels, sum_d.dtype, sum_d.device)
    config = choose(candidates, "one_pass_quadratic", sum_d.dtype, channels, in_channels)
    splits = ceil_div(channels, config["BLOCK_D"] * config["STEPS"])
    partial = torch.empty((splits, in_channels + 1, in_channels), dtype=sum_d.dtype, device=sum_d.device)
    arguments = {
        "weight_ptr": conv_weight,
        "c2_ptr": c2,
        "folded_ptr": folded,
        "sum_d_ptr": sum_d,
        "out_ptr": partial,
        **sizes,
    }
    grid = (ceil_div(in_channels, config["BLOCK_A"]) * ceil_div(in_channels, config["BLOCK_B"]), splits)
    launch(one_pass_quadratic_kernel, grid, arguments, config, candidates)

    quadratic = torch.empty((in_channels, in_channels), dtype=dtype, device=sum_d.device)
    constant = torch.empty(in_channels, dtype=sum_d.dtype, device=sum_d.device)
    candidates = configs.constant(in_channels)
    config = choose(candidates, "one_pass_constant", dtype, splits, in_channels)
    arguments = {
        "splits_ptr": partial,
        "total_ptr": total,
        "out_ptr": quadratic,
        "out_constant_ptr": constant,
        "count": float(count),
        "S": splits,
        "C": in_channels,
    }
    launch(one_pass_constant_kernel, (ceil_div(in_channels, config["BLOCK_A"]),), arguments, config, candidates)
    return grad_conv, grad_weight, quadratic, constant
