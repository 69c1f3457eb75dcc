"""BatchNorm's affine map and ReLU in Triton.

    out[m, c] = relu(scale[c]·x[m, c] + shift[c]) − pivot[c]      (Ioffe and Szegedy 2015)

m runs over the M = N·P·Q pixels that the stride selects. A program owns BLOCK_M rows by BLOCK_C channels and loads
their coefficients once. It reads each selected pixel of x once, and writes each element of out once.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton_core.launch import ceil_div, choose, jit_for_any_batch, launch
from fusedres.kernels.triton_core.rows import affine, pixel_offsets, pixels, relu, row_tiles, tile


@jit_for_any_batch
def bn_relu_kernel(
    x_ptr,  # (N, P, Q, C), strides (stride_n, stride_h, stride_w, 1)
    state_ptr,  # (4, C) float32 or float64, or None: no affine map and no ReLU
    pivot_ptr,  # (C,) like the state, or None
    out_ptr,  # (M, C) like x; x itself in place
    M,
    C,
    P,
    Q,
    stride_n,
    stride_h,
    stride_w,
    IS_STRIDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, column = tile(tl.program_id(0), C, BLOCK_M, BLOCK_C)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    pixel = pixel_offsets(row, P, Q, stride_n, stride_h, stride_w, IS_STRIDED, BLOCK_M)

    z = tl.load(x_ptr + pixel[:, None] + columns[None, :], mask=inside)
    if state_ptr is not None:
        z = relu(affine(z, state_ptr, C, columns))
    if pivot_ptr is not None:
        pivot = tl.load(pivot_ptr + columns, mask=columns < C)
        z = z.to(pivot.dtype) - pivot[None, :]
    tl.store(out_ptr + rows[:, None] * C + columns[None, :], z.to(out_ptr.dtype.element_ty), mask=inside)


def bn_relu(x: Tensor, state: Tensor | None, pivot: Tensor | None, stride: int) -> Tensor:
    """See fusedres.ops.bn_relu."""
    view, _ = pixels(x, stride)
    out = torch.empty(view.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _launch(x, state, pivot, stride, out)
    return out


def bn_relu_(x: Tensor, state: Tensor) -> None:
    """See fusedres.ops.bn_relu."""
    _launch(x, state, None, 1, x)


def _launch(x: Tensor, state: Tensor | None, pivot: Tensor | None, stride: int, out: Tensor) -> None:
    n, c, p, q = out.shape
    view, (stride_n, stride_h, stride_w) = pixels(x, stride)
    candidates = row_tiles(c, x.dtype)
    config = choose(candidates)
    arguments = {
        "x_ptr": view,
        "state_ptr": state,
        "pivot_ptr": pivot,
        "out_ptr": out,
        "M": n * p * q,
        "C": c,
        "P": p,
        "Q": q,
        "stride_n": stride_n,
        "stride_h": stride_h,
        "stride_w": stride_w,
        "IS_STRIDED": stride > 1,
    }
    grid = (ceil_div(n * p * q, config["BLOCK_M"]) * ceil_div(c, config["BLOCK_C"]),)
    launch(bn_relu_kernel, grid, arguments, config, candidates)
