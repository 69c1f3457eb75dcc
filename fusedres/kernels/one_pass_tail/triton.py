"""The one-pass tail's forward in one GEMM. Its backward is in reduce.py and dgrad.py, the small products in one_pass.

    out = relu(z'·W̃ᵀ + b + S),  z' = relu(scale·z + shift) − t, rounded to z's dtype

A program owns BLOCK_M rows of BLOCK_K output channels. Programs of the same rows run side by side. S is the shortcut
as in bn_add_relu, or the projection x'·W̃ₓᵀ + bₓ, which extends the reduction axis. The programs read z, W̃, and the
shortcut or x and W̃ₓ, and write out and its packed bits. The outputs of convolution and projection are never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.one_pass.products import one_pass_products
from fusedres.kernels.one_pass.statistics import one_pass_fold
from fusedres.kernels.one_pass_tail import configs
from fusedres.kernels.one_pass_tail.dgrad import one_pass_dgrad
from fusedres.kernels.one_pass_tail.reduce import one_pass_reduce
from fusedres.kernels.triton_core.centred import grid_arguments, load_centred, load_channels, load_tile, pixel_offsets
from fusedres.kernels.triton_core.gemm import column_slices
from fusedres.kernels.triton_core.launch import ceil_div, choose, gpu, input_precision, jit_for_any_batch, launch
from fusedres.kernels.triton_core.product import add_product
from fusedres.values import Centred, Folded, ShortcutInput, mask_shape

__all__ = ["one_pass_dgrad", "one_pass_fold", "one_pass_products", "one_pass_reduce", "one_pass_tail"]


@triton.jit
def add_centred_product(
    acc,
    z_ptr,
    state_ptr,
    pivot_ptr,
    folded_ptr,
    offsets,
    k,
    C: tl.constexpr,
    K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return acc + z'·W̃ᵀ; folded is W̃ (K, C)."""
    weight_offsets = k * C
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        z = load_centred(z_ptr, state_ptr, pivot_ptr, offsets, columns, C, C % BLOCK_C == 0, 1)
        pointers = folded_ptr + weight_offsets[None, :] + columns[:, None]
        if EVEN_K and C % BLOCK_C == 0:
            weight = tl.load(pointers)
        else:
            weight = tl.load(pointers, mask=(columns < C)[:, None] & (k < K)[None, :], other=0)
        acc = add_product(acc, z, weight, True, PRECISION)
    return acc


@triton.jit
def load_shortcut(
    shortcut_ptr, state_ptr, offsets, k, dtype, K: tl.constexpr, SHORTCUT_C: tl.constexpr, EVEN_K: tl.constexpr
):
    """Load channels k of a shortcut: 0 beyond its SHORTCUT_C channels; normalised if there is a state (4, K)."""
    shortcut = load_tile(shortcut_ptr, offsets, k, SHORTCUT_C, EVEN_K and SHORTCUT_C == K, 1).to(dtype)
    if state_ptr is not None:
        scale = load_channels(state_ptr + 2 * K, k, K, EVEN_K, 1)
        shortcut = scale * shortcut + load_channels(state_ptr + 3 * K, k, K, EVEN_K, 1)
    return shortcut


@triton.jit
def store_relu(z, out_ptr, out_mask_ptr, rows, first, k, M, K: tl.constexpr):
    """Store relu(z) into out (M, K) at these rows and channels k, from `first` on, and its packed bits."""
    closed = z <= 0  # NaN is open, as in torch
    out = tl.where(closed, 0.0, z).to(out_ptr.dtype.element_ty)
    wide = rows.to(tl.int64)[:, None]
    tl.store(out_ptr + wide * K + k[None, :], out, mask=(rows < M)[:, None] & (k < K)[None, :])
    if out_mask_ptr is not None:
        size: tl.constexpr = z.shape[1] // 8
        width: tl.constexpr = (K + 7) // 8
        bits = tl.where(closed | (k >= K)[None, :], 0, 1) << (k % 8)[None, :]
        packed = tl.sum(tl.reshape(bits, [z.shape[0], size, 8]), 2).to(tl.uint8)
        bytes_ = first // 8 + tl.arange(0, size)
        inside = (rows < M)[:, None] & (bytes_ < width)[None, :]
        tl.store(out_mask_ptr + wide * width + bytes_[None, :], packed, mask=inside)


@jit_for_any_batch
def one_pass_tail_kernel(
    z_ptr,  # (N, H, W, C)
    state_ptr,  # (4, C) float32 or float64: mean, invstd, scale, shift; or None
    pivot_ptr,  # (C,); this and all following ones have state's dtype unless noted
    folded_ptr,  # (K, C) of z's dtype
    offset_ptr,  # (K,)
    shortcut_ptr,  # (N, SHORTCUT_H, SHORTCUT_W, SHORTCUT_C) of z's dtype, or None
    shortcut_state_ptr,  # (4, K), or None
    x_ptr,  # (N, X_H, X_W, X_C) of z's dtype, or None
    x_pivot_ptr,  # (X_C,), or None
    x_folded_ptr,  # (K, X_C) of z's dtype, or None
    x_offset_ptr,  # (K,), or None
    out_ptr,  # (M, K) of z's dtype
    out_mask_ptr,  # (M, ceil(K / 8)) uint8, or None
    M,
    P,
    Q,
    H,
    W,
    SHORTCUT_H,
    SHORTCUT_W,
    X_H,
    X_W,
    STRIDE: tl.constexpr,
    SHORTCUT_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    SHORTCUT_C: tl.constexpr,
    X_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = pivot_ptr.dtype.element_ty
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    even_k: tl.constexpr = K % BLOCK_K == 0
    tile = tl.program_id(0)
    rows = tile // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tile % tiles_k * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype)
    offsets = pixel_offsets(rows, M, P, Q, H, W, C, STRIDE)
    acc = add_centred_product(
        acc, z_ptr, state_ptr, pivot_ptr, folded_ptr, offsets, k, C, K, even_k, PRECISION, BLOCK_C
    )
    if x_ptr is not None:
        offsets = pixel_offsets(rows, M, P, Q, X_H, X_W, X_C, X_STRIDE)
        acc = add_centred_product(
            acc, x_ptr, None, x_pivot_ptr, x_folded_ptr, offsets, k, X_C, K, even_k, PRECISION, BLOCK_C
        )
    if shortcut_ptr is not None:
        offsets = pixel_offsets(rows, M, P, Q, SHORTCUT_H, SHORTCUT_W, SHORTCUT_C, SHORTCUT_STRIDE)
    width: tl.constexpr = min(BLOCK_K, 64)
    slices = column_slices(acc, width)  # limits the registers
    for i in tl.static_range(len(slices)):
        first = first_k + i * width
        k = first + tl.arange(0, width)
        part = slices[i] + load_channels(offset_ptr, k, K, even_k, 1)
        if x_ptr is not None:
            part += load_channels(x_offset_ptr, k, K, even_k, 1)
        if shortcut_ptr is not None:
            part += load_shortcut(shortcut_ptr, shortcut_state_ptr, offsets, k, dtype, K, SHORTCUT_C, even_k)
        store_relu(part, out_ptr, out_mask_ptr, rows, first, k, M, K)


def one_pass_tail(
    z: Centred,
    z_state: Tensor | None,
    folded: Folded,
    shortcut: ShortcutInput | None,
    x: Centred | None,
    x_folded: Folded | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    source, pivot, stride = z
    share, share_state, share_stride = (None, None, 1) if shortcut is None else shortcut
    joined, x_pivot, x_stride = (None, None, 1) if x is None else x
    x_weight, x_offset = (None, None) if x_folded is None else x_folded
    taken = source[:, :, ::stride, ::stride]
    n, in_channels, p, q = taken.shape
    channels, rows = folded.folded.shape[0], n * p * q
    out = torch.empty((n, channels, p, q), dtype=source.dtype, device=source.device, memory_format=torch.channels_last)
    mask = torch.empty(mask_shape(out) if with_mask else (0,), dtype=torch.uint8, device=source.device)
    candidates = configs.tail(channels, in_channels, x is not None, source.dtype, gpu(source.device))
    x_channels = 0 if joined is None else joined.shape[1]
    config = choose(candidates, "one_pass_tail", source.dtype, rows, in_channels, channels, x_channels)
    arguments = {
        "z_ptr": taken,
        "state_ptr": z_state,
        "pivot_ptr": pivot,
        "folded_ptr": folded.folded,
        "offset_ptr": folded.offset,
        "shortcut_ptr": None if share is None else share[:, :, ::share_stride, ::share_stride],
        "shortcut_state_ptr": share_state,
        "x_ptr": None if joined is None else joined[:, :, ::x_stride, ::x_stride],
        "x_pivot_ptr": x_pivot,
        "x_folded_ptr": x_weight,
        "x_offset_ptr": x_offset,
        "out_ptr": out,
        "out_mask_ptr": mask if with_mask else None,
        "M": rows,
        "P": p,
        "Q": q,
        "C": in_channels,
        "K": channels,
        "PRECISION": input_precision(source.dtype),
        **grid_arguments(source, stride),
        **grid_arguments(share, share_stride, "SHORTCUT_"),
        **grid_arguments(joined, x_stride, "X_"),
        "SHORTCUT_C": 0 if share is None else share.shape[1],
        "X_C": x_channels,
    }
    grid = (ceil_div(rows, config["BLOCK_M"]) * ceil_div(channels, config["BLOCK_K"]),)
    launch(one_pass_tail_kernel, grid, arguments, config, candidates)
    return out, mask
