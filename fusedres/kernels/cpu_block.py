"""The passes of a residual block in C++ (csrc/residual_block), around torch's convolutions.

The core calls those through torch's C interface, which it finds at run time in the torch that is imported.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusedres import _C


def connect(unit_fields: tuple[str, ...], plan_fields: tuple[str, ...]) -> bool:
    """Hands torch's functions to the core; False where this torch lacks one.

    The core reads a plan's named tuples by position: their fields are given to be checked.
    """
    try:
        library = ctypes.CDLL(torch._C.__file__)
        names = [*_C.torch_functions(), *([_C.ERROR_TEXT_FUNCTION] if hasattr(library, _C.ERROR_TEXT_FUNCTION) else [])]
        addresses = {name: ctypes.cast(library[name], ctypes.c_void_p).value for name in names}
        conversions = torch._C._aoti
        to_handle = conversions.unsafe_alloc_void_ptr_from_tensor
        from_handles = conversions.alloc_tensors_by_stealing_from_void_ptrs
    except (AttributeError, OSError):
        return False
    _C.connect_torch(addresses, to_handle, from_handles, unit_fields, plan_fields)
    return True


def forward(x: Tensor, plan: Any, tensors: tuple[Tensor | None, ...]) -> list[Tensor] | None:
    """Result, mask, every convolution's raw output, every BatchNorm's state; None where the core does not serve."""
    found: list[Tensor] | None = _C.residual_block_forward(x, plan, tensors, torch.get_num_threads())
    return found


def infer(x: Tensor, plan: Any, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """The result where all statistics are constants and nothing is kept; None where the core does not serve."""
    found: Tensor | None = _C.residual_block_infer(x, plan, tensors, torch.get_num_threads())
    return found


def backward(
    grad_out: Tensor, plan: Any, saved: tuple[Tensor | None, ...], needs: list[bool], donated: bool
) -> list[Tensor | None] | None:
    """The gradients in the order of needs; None where the core does not serve.

    Saved: x, three parameters a unit, and what forward returned behind the result. Donated: the convolutions' raw
    outputs may be overwritten with their gradients.
    """
    threads = torch.get_num_threads()
    found: list[Tensor | None] | None = _C.residual_block_backward(grad_out, plan, saved, needs, donated, threads)
    return found
