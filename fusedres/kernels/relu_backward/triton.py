"""The gradient that passes a ReLU, and its column sums, in Triton.

    d = grad where the gate is open, else 0      Σd per channel

relu_backward_kernel  A program owns BLOCK_M·steps rows of BLOCK_C channels. It reads grad and the gate, and writes d
                      and one partial sum per channel.
merge_sums_kernel     A program owns BLOCK_C channels of all T partials, and adds them in fixed order. It reads (T, C)
                      and writes (C,).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fusedres.kernels.bn_backward import configs
from fusedres.kernels.triton_core.gate import gate_kind, load_gated
from fusedres.kernels.triton_core.launch import ceil_div, choose, jit_for_any_batch, launch, loop_bound
from fusedres.kernels.triton_core.rows import tile
from fusedres.values import Gated, arithmetic_dtype


@jit_for_any_batch
def relu_backward_kernel(
    grad_ptr,  # (M, C)
    gate_ptr,  # packed bits (M, ceil(C / 8)) uint8, or like grad
    out_ptr,  # like grad
    out_partials_ptr,  # (T, C) float32 or float64
    M,
    C,
    steps,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first, column = tile(tl.program_id(0), C, BLOCK_M * steps, BLOCK_C)
    rows, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_M, BLOCK_C], out_partials_ptr.dtype.element_ty)
    for step in range(steps):
        row = first + step * BLOCK_M
        inside = (row + rows < M)[:, None] & (columns < C)[None, :]
        d = load_gated(grad_ptr, gate_ptr, row, column, M, C, GATE, BLOCK_M, BLOCK_C)
        tl.store(out_ptr + row * C + rows[:, None] * C + columns[None, :], d, mask=inside)
        total += d.to(total.dtype)
    tl.store(out_partials_ptr + first // (BLOCK_M * steps) * C + columns, tl.sum(total, 0), mask=columns < C)


@jit_for_any_batch
def merge_sums_kernel(
    partials_ptr,  # (T, C)
    out_ptr,  # (C,) of the same dtype
    T,
    C,
    steps,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_T, BLOCK_C], partials_ptr.dtype.element_ty)
    for step in range(steps):
        tiles = step * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (tiles < T)[:, None] & (columns < C)[None, :]
        total += tl.load(partials_ptr + tiles[:, None] * C + columns[None, :], mask=inside, other=0)
    tl.store(out_ptr + columns, tl.sum(total, 0), mask=columns < C)


def relu_backward(gated: Gated) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.relu_backward."""
    grad, gate = gated
    channels = grad.shape[1]
    rows = grad.numel() // channels
    candidates = configs.reduction(rows, channels, grad.element_size())
    config = choose(candidates)
    tiles = ceil_div(rows, configs.row_tile(rows, channels))
    d = torch.empty_like(grad)
    partials = torch.empty((tiles, channels), dtype=arithmetic_dtype(grad.dtype), device=grad.device)
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "out_ptr": d,
        "out_partials_ptr": partials,
        "M": rows,
        "C": channels,
        "steps": loop_bound(configs.row_tile(rows, channels) // config["BLOCK_M"]),
        "GATE": gate_kind(gate),
    }
    launch(relu_backward_kernel, (tiles * ceil_div(channels, config["BLOCK_C"]),), arguments, config, candidates)
    candidates = configs.merge(channels)
    config = choose(candidates)
    sums = partials.new_empty(channels)
    arguments = {"partials_ptr": partials, "out_ptr": sums, "T": tiles, "C": channels}
    arguments["steps"] = loop_bound(ceil_div(tiles, config["BLOCK_T"]))
    launch(merge_sums_kernel, (ceil_div(channels, config["BLOCK_C"]),), arguments, config, candidates)
    return d, sums
