"""ReLU's backward in Triton kernels: load a tile of a gradient, 0 where its gate is closed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.reference_core import masked


def gate_kind(gate: Tensor | None) -> str:
    """Return a kernel's GATE: "none", "bits" (packed, uint8) or "output" (the ReLU's output, like the gradient)."""
    if gate is None:
        return "none"
    return "output" if gate.dtype.is_floating_point else "bits"


def before_product(grad: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return grad and its gate in the form that a kernel with a matrix product takes.

    Triton 3.6 cannot compile a float64 product of values that depend on 8-bit loads. In float64 the gate is therefore
    applied here, and the kernel gets no gate.
    """
    if gate is None or grad.dtype is not torch.float64:
        return grad, gate
    return masked(grad, gate).contiguous(memory_format=torch.channels_last), None


@triton.jit
def load_bits(bits_ptr, row, column, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load (BLOCK_M, BLOCK_C) of packed bits (M, ceil(C / 8)) as 0 or 1; a byte is loaded once for 8 channels."""
    width = (C + 7) // 8
    rows = tl.arange(0, BLOCK_M)
    bytes_ = column // 8 + tl.arange(0, BLOCK_C // 8)
    inside = (row + rows < M)[:, None] & (bytes_ < width)[None, :]
    packed = tl.load(bits_ptr + row * width + rows[:, None] * width + bytes_[None, :], mask=inside, other=0)
    bits = (packed[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [BLOCK_M, BLOCK_C])


@triton.jit
def load_gated(grad_ptr, gate_ptr, row, column, M, C, GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load (BLOCK_M, BLOCK_C) of grad (M, C) from (row, column) on; 0 if closed or outside; row is int64."""
    rows, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    inside = (row + rows < M)[:, None] & (columns < C)[None, :]
    offsets = row * C + rows[:, None] * C + columns[None, :]
    d = tl.load(grad_ptr + offsets, mask=inside, other=0)
    if GATE == "bits":
        d = tl.where(load_bits(gate_ptr, row, column, M, C, BLOCK_M, BLOCK_C) == 0, 0.0, d)
    if GATE == "output":
        d = tl.where(tl.load(gate_ptr + offsets, mask=inside, other=0) <= 0, 0.0, d)  # NaN is open, as in torch
    return d
