"""The C++ core: dtype codes, gate codes and fresh buffers, shared by the cpu kernels."""

from __future__ import annotations

import torch  # before the core: both then share torch's OpenMP runtime
from torch import Tensor

from fusedres import _C

DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

GATE_NONE, GATE_BITS, GATE_OUTPUT, GATE_RECOMPUTE = range(4)


def address(tensor: Tensor | None) -> int:
    """The tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def code(tensor: Tensor | None) -> int:
    """The dtype code of a tensor; any code for None."""
    return 0 if tensor is None else DTYPE_CODE[tensor.dtype]


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, dtype and layout."""
    return _advised(torch.empty_like(tensor))


def empty_channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised channels_last tensor of this shape and another's dtype and device."""
    return _advised(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last))


def _advised(tensor: Tensor) -> Tensor:
    if tensor.numel() * tensor.element_size() >= _C.LARGE_BYTES:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor


def gate_code(gate: Tensor | None) -> int:
    """What a gate tensor holds: nothing, bits (uint8) or a ReLU's output."""
    if gate is None:
        return GATE_NONE
    return GATE_BITS if gate.dtype is torch.uint8 else GATE_OUTPUT
