"""Convolution weights in the layout and dtype that the kernels read, in Triton.

    out[k, r, s, c] = weight[k, c, r, s] in out's dtype, for up to four weights in one launch

A program owns BLOCK_M rows (k, r, s) of BLOCK_C channels of one weight. Axis 1 of the grid is the weight, axis 0 its
tiles; programs past the end of a small weight do nothing. The launch reads each weight and writes each result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.conv_weights import configs
from fusedres.kernels.triton_core.launch import ceil_div, choose, launch


@triton.jit
def convert_tile(
    weight_ptr,  # (K, C, R, S), any strides
    out_ptr,  # (K, R, S, C), dense
    K,
    C,
    R,
    S,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Convert one tile of one weight, given by the program id of axis 0; all arguments but the blocks may be None."""
    if weight_ptr is not None:
        column_tiles = tl.cdiv(C, BLOCK_C)
        tile = tl.program_id(0)
        rows = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (rows < K * R * S)[:, None] & (columns < C)[None, :]
        k, r, s = rows // (R * S), rows // S % R, rows % S
        source = k.to(tl.int64) * stride_k + r * stride_r + s * stride_s
        w = tl.load(weight_ptr + source[:, None] + (columns * stride_c)[None, :], mask=inside, other=0)
        target = rows.to(tl.int64) * C
        tl.store(out_ptr + target[:, None] + columns[None, :], w.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def conv_weights_kernel(
    weight0_ptr,
    out0_ptr,
    K0,
    C0,
    R0,
    S0,
    stride_k0,
    stride_c0,
    stride_r0,
    stride_s0,
    weight1_ptr,
    out1_ptr,
    K1,
    C1,
    R1,
    S1,
    stride_k1,
    stride_c1,
    stride_r1,
    stride_s1,
    weight2_ptr,
    out2_ptr,
    K2,
    C2,
    R2,
    S2,
    stride_k2,
    stride_c2,
    stride_r2,
    stride_s2,
    weight3_ptr,
    out3_ptr,
    K3,
    C3,
    R3,
    S3,
    stride_k3,
    stride_c3,
    stride_r3,
    stride_s3,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    which = tl.program_id(1)
    if which == 0:
        convert_tile(
            weight0_ptr, out0_ptr, K0, C0, R0, S0, stride_k0, stride_c0, stride_r0, stride_s0, BLOCK_M, BLOCK_C
        )
    if which == 1:
        convert_tile(
            weight1_ptr, out1_ptr, K1, C1, R1, S1, stride_k1, stride_c1, stride_r1, stride_s1, BLOCK_M, BLOCK_C
        )
    if which == 2:
        convert_tile(
            weight2_ptr, out2_ptr, K2, C2, R2, S2, stride_k2, stride_c2, stride_r2, stride_s2, BLOCK_M, BLOCK_C
        )
    if which == 3:
        convert_tile(
            weight3_ptr, out3_ptr, K3, C3, R3, S3, stride_k3, stride_c3, stride_r3, stride_s3, BLOCK_M, BLOCK_C
        )


_SIZES = ("K", "C", "R", "S", "stride_k", "stride_c", "stride_r", "stride_s")


def conv_weights(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """See fusedres.ops.conv_weights."""
    converted = [torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last) for weight in weights]
    candidates = configs.conv_weights(max(weight.shape[1] for weight in weights))
    config = choose(candidates)
    arguments: dict[str, Any] = dict.fromkeys(conv_weights_kernel.arg_names[: 4 * (2 + len(_SIZES))])
    tiles = 0
    for i, weight in enumerate(weights):
        # the stride of an axis of size 1 is arbitrary; 0 keeps the alignment of the other strides
        strides = (stride if size > 1 else 0 for size, stride in zip(weight.shape, weight.stride(), strict=True))
        values = (*weight.shape, *strides)
        arguments |= {f"weight{i}_ptr": weight, f"out{i}_ptr": converted[i]}
        arguments |= {f"{name}{i}": value for name, value in zip(_SIZES, values, strict=True)}
        k, c, r, s = weight.shape
        tiles = max(tiles, ceil_div(k * r * s, config["BLOCK_M"]) * ceil_div(c, config["BLOCK_C"]))
    launch(conv_weights_kernel, (tiles, len(weights)), arguments, config, candidates)
    return converted
