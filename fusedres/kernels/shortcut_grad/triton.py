"""The shortcut's share of the input gradient in Triton.

    grad_x[n, p·stride, q·stride, c] += d[m, c]      d = grad where the gate is open, else 0; m = (n, p, q)

A program owns BLOCK_M rows of grad by BLOCK_C channels of grad_x. It reads those channels of grad and gate once, and
reads and writes the pixels of grad_x that the stride selects once.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton_core.gate import gate_kind, load_gated
from fusedres.kernels.triton_core.launch import ceil_div, choose, jit_for_any_batch, launch
from fusedres.kernels.triton_core.rows import pixel_offsets, pixels, row_tiles, tile
from fusedres.values import ShortcutGradient


@jit_for_any_batch
def shortcut_grad_kernel(
    grad_x_ptr,  # (N, P, Q, C), strides (stride_n, stride_h, stride_w, 1)
    grad_ptr,  # (M, grad_C) like grad_x
    gate_ptr,  # (M, ceil(grad_C / 8)) uint8, or (M, grad_C) like grad, or None
    out_ptr,  # grad_x itself
    M,
    C,
    P,
    Q,
    grad_C,
    stride_n,
    stride_h,
    stride_w,
    GATE: tl.constexpr,
    IS_STRIDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, column = tile(tl.program_id(0), C, BLOCK_M, BLOCK_C)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    pixel = pixel_offsets(row, P, Q, stride_n, stride_h, stride_w, IS_STRIDED, BLOCK_M)

    offsets = pixel[:, None] + columns[None, :]
    grad_x = tl.load(grad_x_ptr + offsets, mask=inside)
    d = load_gated(grad_ptr, gate_ptr, row, column, M, grad_C, GATE, BLOCK_M, BLOCK_C)
    wide: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = grad_x.to(wide) + d.to(wide)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


def shortcut_grad_(grad_x: Tensor, shortcut: ShortcutGradient) -> None:
    """See fusedres.ops.shortcut_grad."""
    grad, gate, stride = shortcut
    n, grad_c, p, q = grad.shape
    c = grad_x.shape[1]
    view, (stride_n, stride_h, stride_w) = pixels(grad_x, stride)
    if c < grad_c:  # the appended channels are not read
        grad = grad[:, :c]
        if gate is not None:
            gate = gate[:, :c] if gate_kind(gate) == "output" else gate[..., : ceil_div(c, 8)]
    candidates = row_tiles(c, grad.dtype)
    config = choose(candidates)
    arguments = {
        "grad_x_ptr": view,
        "grad_ptr": grad,
        "gate_ptr": gate,
        "out_ptr": view,
        "M": n * p * q,
        "C": c,
        "P": p,
        "Q": q,
        "grad_C": grad_c,
        "stride_n": stride_n,
        "stride_h": stride_h,
        "stride_w": stride_w,
        "GATE": gate_kind(gate),
        "IS_STRIDED": stride > 1,
    }
    grid = (ceil_div(n * p * q, config["BLOCK_M"]) * ceil_div(c, config["BLOCK_C"]),)
    launch(shortcut_grad_kernel, grid, arguments, config, candidates)
