"""The gradient of the one-pass tail's input.

    dz = d·W̃ − z'·Q̃ + constant,  d = grad where the bits of gate are open, else 0; z' as in triton.py

A program owns BLOCK_M rows of BLOCK_C channels. It reads grad, gate and W̃, then z and Q̃ in a second loop with the same
accumulator, and writes dz. After a ReLU it also writes partial sums, and reads its own tile of z again for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.one_pass_tail import configs
from fusedres.kernels.one_pass_tail.gradient import load_d
from fusedres.kernels.one_pass_tail.reference import ROWS_A_PARTIAL
from fusedres.kernels.triton_core.centred import grid_arguments, load_centred, load_channels, load_tile, pixel_offsets
from fusedres.kernels.triton_core.gate import before_product
from fusedres.kernels.triton_core.gemm import column_slices
from fusedres.kernels.triton_core.launch import ceil_div, choose, gpu, input_precision, jit_for_any_batch, launch
from fusedres.kernels.triton_core.product import add_product
from fusedres.values import Centred, Gated


@triton.jit
def store_partials(out_ptr, d, normalised, tile, columns, M, C: tl.constexpr, PARTIAL: tl.constexpr):
    """Store Σd and Σd·x̂ of every PARTIAL rows of a row tile into (ceil(M / PARTIAL), 2, C)."""
    parts: tl.constexpr = d.shape[0] // PARTIAL
    sums = tl.sum(tl.reshape(d, [parts, PARTIAL, d.shape[1]]), 1)
    products = tl.sum(tl.reshape(d * normalised, [parts, PARTIAL, d.shape[1]]), 1)
    part = tile * parts + tl.arange(0, parts)
    pointers = out_ptr + part.to(tl.int64)[:, None] * (2 * C) + columns[None, :]
    inside = (part * PARTIAL < M)[:, None] & (columns < C)[None, :]
    tl.store(pointers, sums, mask=inside)
    tl.store(pointers + C, products, mask=inside)


@jit_for_any_batch
def one_pass_dgrad_kernel(
    grad_ptr,  # (M, K)
    gate_ptr,  # (M, ceil(K / 8)) uint8, or None
    z_ptr,  # (N, H, W, C) of grad's dtype
    state_ptr,  # (4, C) float32 or float64: mean, invstd, scale, shift; or None
    pivot_ptr,  # (C,) of state's dtype, like constant and the partials
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
        acc = add_product(acc, d, weight, gate_ptr is not None, PRECISION)
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
        acc = add_product(acc, z, quadratic, True, PRECISION)
    width: tl.constexpr = min(BLOCK_C, 32)
    slices = column_slices(acc, width)  # limits the registers
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


def one_pass_dgrad(
    gated: Gated, z: Centred, z_state: Tensor | None, folded: Tensor, quadratic: Tensor, constant: Tensor, masked: bool
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass_tail."""
    grad, gate = before_product(*gated)
    source, pivot, stride = z
    n, channels, p, q = grad.shape
    rows, in_channels = n * p * q, source.shape[1]
    taken = source[:, :, ::stride, ::stride]
    out = torch.empty_like(taken, memory_format=torch.channels_last)
    partials = pivot.new_empty((ceil_div(rows, ROWS_A_PARTIAL) if masked else 0, 2, in_channels))
    candidates = configs.dgrad(channels, in_channels, grad.dtype, gpu(grad.device))
    config = choose(candidates, "one_pass_dgrad", grad.dtype, rows, in_channels, channels)
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "z_ptr": taken,
        "state_ptr": z_state,
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
        **grid_arguments(source, stride),
    }
    grid = (ceil_div(rows, config["BLOCK_M"]) * ceil_div(in_channels, config["BLOCK_C"]),)
    launch(one_pass_dgrad_kernel, grid, arguments, config, candidates)
    return out, partials
