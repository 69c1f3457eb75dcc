"""The tail of a residual block in Triton: BatchNorm's affine map, shortcut, ReLU.

    z[m, c] = scale[c]·x[m, c] + shift[c] + S[m, c]      out = relu(z)      mask = NOT (z <= 0)      (He et al. 2015)

S is the shortcut itself, the shortcut with its own scale and shift, or every stride-th of its pixels with zero channels
appended. A program owns BLOCK_M rows by BLOCK_C channels of the result, and BLOCK_C / 8 bytes of mask per row. It reads
x and the selected pixels of the shortcut, and writes out and, if asked for, 1 bit per element. Each is touched once.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton_core.launch import ceil_div, choose, jit_for_any_batch, launch
from fusedres.kernels.triton_core.rows import affine, pixel_offsets, pixels, relu, row_tiles, tile
from fusedres.values import ShortcutInput, mask_shape


@jit_for_any_batch
def bn_add_relu_kernel(
    x_ptr,  # (M, C)
    state_ptr,  # (4, C) float32 or float64
    shortcut_ptr,  # (N, P, Q, shortcut_C) like x, strides (stride_n, stride_h, stride_w, 1)
    shortcut_state_ptr,  # (4, C) like the state, or None
    out_ptr,  # (M, C) like x; x itself in place
    out_mask_ptr,  # (M, ceil(C / 8)) uint8, or None
    M,
    C,
    P,
    Q,
    shortcut_C,
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
    offsets = rows[:, None] * C + columns[None, :]
    pixel = pixel_offsets(row, P, Q, stride_n, stride_h, stride_w, IS_STRIDED, BLOCK_M)
    reached = (rows < M)[:, None] & (columns < shortcut_C)[None, :]

    x = tl.load(x_ptr + offsets, mask=inside, other=0)
    branch = tl.load(shortcut_ptr + pixel[:, None] + columns[None, :], mask=reached, other=0)
    z = affine(x, state_ptr, C, columns)
    if shortcut_state_ptr is not None:
        branch = affine(branch, shortcut_state_ptr, C, columns)
    z += branch.to(z.dtype)
    tl.store(out_ptr + offsets, relu(z).to(out_ptr.dtype.element_ty), mask=inside)
    if out_mask_ptr is not None:
        # beyond the channels z is 0, and so are the bits
        bits = tl.reshape(tl.where(z <= 0, 0, 1), [BLOCK_M, BLOCK_C // 8, 8]) << tl.arange(0, 8)[None, None, :]
        width, bytes_ = (C + 7) // 8, column // 8 + tl.arange(0, BLOCK_C // 8)
        inside = (rows < M)[:, None] & (bytes_ < width)[None, :]
        tl.store(out_mask_ptr + rows[:, None] * width + bytes_[None, :], tl.sum(bits, 2).to(tl.uint8), mask=inside)


def bn_add_relu(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, _launch(x, state, shortcut, with_mask, out)


def bn_add_relu_(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu."""
    return _launch(x, state, shortcut, with_mask, x)


def bn_add_relu_out(x: Tensor, state: Tensor, shortcut: ShortcutInput, out: Tensor) -> None:
    """See fusedres.ops.bn_add_relu."""
    _launch(x, state, shortcut, False, out)


def _launch(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool, out: Tensor) -> Tensor:
    n, c, p, q = x.shape
    mask = torch.empty(mask_shape(x) if with_mask else (0,), dtype=torch.uint8, device=x.device)
    view, (stride_n, stride_h, stride_w) = pixels(shortcut.x, shortcut.stride)
    candidates = row_tiles(c, x.dtype)
    config = choose(candidates)
    arguments = {
        "x_ptr": x,
        "state_ptr": state,
        "shortcut_ptr": view,
        "shortcut_state_ptr": shortcut.state,
        "out_ptr": out,
        "out_mask_ptr": mask if with_mask else None,
        "M": n * p * q,
        "C": c,
        "P": p,
        "Q": q,
        "shortcut_C": shortcut.x.shape[1],
        "stride_n": stride_n,
        "stride_h": stride_h,
        "stride_w": stride_w,
        "IS_STRIDED": shortcut.stride > 1,
    }
    grid = (ceil_div(n * p * q, config["BLOCK_M"]) * ceil_div(c, config["BLOCK_C"]),)
    launch(bn_add_relu_kernel, grid, arguments, config, candidates)
    return mask
