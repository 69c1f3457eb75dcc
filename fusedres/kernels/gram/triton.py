"""Gram matrix and column sums of z' = z − t, z = relu(scale·x + shift), in three launches; z' is rounded to x's dtype.

    t = the average of the first rows of z        s = Σ z'        G = z'ᵀz'

gram_pivot     A program owns BLOCK_C channels of the first rows. It writes t (C,).
gram_tiles     A program owns a BLOCK_A×BLOCK_B tile of G over BLOCK_M·steps rows. Tiles completely below the diagonal
               are left out. It reads the columns of both sides of its tile, and writes one split of G (C, C). The tiles
               of the first row also write one split of s (C,), and z' if asked for.
gram_finalize  A program owns BLOCK elements of s, and of G on and above its diagonal. It adds all splits in fixed order
               in float64, and writes s and both halves of G.

If one tile covers C, x is read once. Otherwise repeated reads of x come from the L2 cache, because all tiles of the
same rows run side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fusedres.kernels.gram import configs
from fusedres.kernels.triton_core.centred import grid_arguments, load_activated, load_centred, pixel_offsets
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
from fusedres.values import arithmetic_dtype

_PIVOT_ROWS = 8


@jit_for_any_batch
def gram_pivot_kernel(
    x_ptr,  # (N, H, W, C)
    state_ptr,  # (4, C) float32 or float64: mean, invstd, scale, shift; or None
    out_ptr,  # (C,) float32 or float64
    M,
    P,
    Q,
    H,
    W,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, ROWS)
    offsets = pixel_offsets(rows, M, P, Q, H, W, C, STRIDE)
    z = load_activated(x_ptr, state_ptr, dtype, offsets, columns, C, C % BLOCK_C == 0, 1)
    total = tl.sum(tl.where((rows < M)[:, None], z, 0.0), 0)
    tl.store(out_ptr + columns, total / tl.minimum(M, ROWS), mask=columns < C)


@jit_for_any_batch
def gram_tiles_kernel(
    x_ptr,  # (N, H, W, C)
    state_ptr,  # (4, C) float32 or float64: mean, invstd, scale, shift; or None
    pivot_ptr,  # (C,) float32 or float64
    out_ptr,  # (S, C + 1, C) of pivot's dtype: splits of G, each followed by its split of s
    out_z_ptr,  # (M, C) like x, or None
    M,
    P,
    Q,
    H,
    W,
    steps,  # per split
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    dtype = pivot_ptr.dtype.element_ty
    tiles_b: tl.constexpr = (C + BLOCK_B - 1) // BLOCK_B
    tile = tl.program_id(0)
    column_a, column_b = tile // tiles_b * BLOCK_A, tile % tiles_b * BLOCK_B
    if column_a >= column_b + BLOCK_B:
        return
    split = tl.program_id(1)
    columns_a, columns_b = column_a + tl.arange(0, BLOCK_A), column_b + tl.arange(0, BLOCK_B)
    once = tl.where(column_a == 0, C, 0)  # channels whose z' and sum this program writes
    matrix = tl.zeros([BLOCK_A, BLOCK_B], dtype)
    total = tl.zeros([16, BLOCK_B], dtype)  # threads own rows 16 apart, so they exchange nothing inside the loop
    for step in range(steps):
        rows = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets = pixel_offsets(rows, M, P, Q, H, W, C, STRIDE)
        b = load_centred(x_ptr, state_ptr, pivot_ptr, offsets, columns_b, C, C % BLOCK_B == 0, 1)
        b = tl.where((rows < M)[:, None], b, 0.0).to(b.dtype)
        if out_z_ptr is not None:
            inside = (rows < M)[:, None] & (columns_b < once)[None, :]
            tl.store(out_z_ptr + rows.to(tl.int64)[:, None] * C + columns_b[None, :], b, mask=inside)
        if C <= BLOCK_A and BLOCK_A == BLOCK_B:
            a = tl.trans(b)
        else:
            a = load_centred(x_ptr, state_ptr, pivot_ptr, offsets, columns_a, C, C % BLOCK_A == 0, 0)
        matrix = add_product(matrix, a, b, True, PRECISION)
        total += tl.sum(tl.reshape(b.to(dtype), [BLOCK_M // 16, 16, BLOCK_B]), 0)
    out_ptr += split.to(tl.int64) * (C + 1) * C
    inside = (columns_a < C)[:, None] & (columns_b < C)[None, :]
    tl.store(out_ptr + columns_a[:, None] * C + columns_b[None, :], matrix, mask=inside)
    tl.store(out_ptr + C * C + columns_b, tl.sum(total, 0), mask=columns_b < once)


@jit_for_any_batch
def gram_finalize_kernel(
    splits_ptr,  # (S, C + 1, C) float32 or float64
    out_total_ptr,  # (C,) float64
    out_ptr,  # (C, C) float64
    S,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = elements // C, elements % C
    upper = row <= column
    wanted = upper | (row == C)
    sums = tl.zeros([BLOCK_S, BLOCK], tl.float64)
    for first in range(0, S, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        pointers = splits_ptr + split.to(tl.int64)[:, None] * ((C + 1) * C) + elements[None, :]
        sums += tl.load(pointers, mask=(split < S)[:, None] & wanted[None, :], other=0).to(tl.float64)
    value = tl.sum(sums, 0)
    tl.store(out_ptr + row * C + column, value, mask=upper)
    tl.store(out_ptr + column * C + row, value, mask=upper)
    tl.store(out_total_ptr + column, value, mask=row == C)


def _first(x: Tensor, rows: int) -> Tensor:
    """Return the pixels, lines or images that hold the first rows of x."""
    p, q = x.shape[2:]
    if q >= rows:
        return x[:1, :, :1, :rows]
    return x[:1, :, : ceil_div(rows, q)] if p * q >= rows else x[: ceil_div(rows, p * q)]


def _launch(x: Tensor, state: Tensor | None, stride: int, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    taken = x[:, :, ::stride, ::stride]
    n, channels, p, q = taken.shape
    dtype = arithmetic_dtype(x.dtype)
    pivot = torch.empty(channels, dtype=dtype, device=x.device)
    rows = n * p * q
    arguments: dict[str, Any] = {"x_ptr": taken, "state_ptr": state, "M": rows, "P": p, "Q": q, "C": channels}
    arguments |= grid_arguments(x, stride)
    candidates = configs.pivot(channels)
    config = choose(candidates, "gram_pivot", x.dtype, channels)
    first = arguments | {"x_ptr": _first(taken, _PIVOT_ROWS), "out_ptr": pivot, "ROWS": _PIVOT_ROWS}
    launch(gram_pivot_kernel, (ceil_div(channels, config["BLOCK_C"]),), first, config, candidates)

    candidates = configs.tiles(channels, x.dtype, gpu(x.device))
    config = choose(candidates, "gram_tiles", x.dtype, rows, channels, "plain" if state is None else "normalised")
    steps = configs.steps(rows, channels, config, dtype, x.device)
    count = ceil_div(rows, config["BLOCK_M"] * steps)
    splits = torch.empty((count, channels + 1, channels), dtype=dtype, device=x.device)
    grid = (ceil_div(channels, config["BLOCK_A"]) * ceil_div(channels, config["BLOCK_B"]), count)
    arguments |= {"pivot_ptr": pivot, "out_ptr": splits, "out_z_ptr": out, "steps": loop_bound(steps)}
    arguments["PRECISION"] = input_precision(x.dtype)
    launch(gram_tiles_kernel, grid, arguments, config, candidates)

    total = torch.empty(channels, dtype=torch.float64, device=x.device)
    matrix = torch.empty((channels, channels), dtype=torch.float64, device=x.device)
    candidates = merge(count)
    config = choose(candidates, "gram_finalize", dtype, count, channels)
    arguments = {"splits_ptr": splits, "out_total_ptr": total, "out_ptr": matrix, "C": channels}
    arguments["S"] = loop_bound(count)
    launch(gram_finalize_kernel, (ceil_div(splits[0].numel(), config["BLOCK"]),), arguments, config, candidates)
    return pivot, total, matrix


def gram(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    out = torch.empty_like(x[:, :, ::stride, ::stride], memory_format=torch.channels_last)
    return out, *_launch(x, state, stride, out)


def gram_statistics(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    return _launch(x, state, stride, None)
