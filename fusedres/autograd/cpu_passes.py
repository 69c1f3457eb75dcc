"""The passes of forward.py, inference.py and backward.py in C++ (csrc/residual_block), for plain calls on the CPU.

No Python runs between the passes, and torch's convolutions are called through torch's C interface, which is looked up
at run time in the imported torch. If the C++ core does not serve a call, the function returns None before anything is
computed, and the passes in Python run instead.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from fusedres import _C
from fusedres.autograd.plan import BlockPlan, ConvBN, Tensors
from fusedres.ops.launch import direct


@cache
def _connected() -> bool:
    """Hand torch's functions to the core; return False if this torch lacks one.

    The core reads the named tuples of a plan by position, and checks the names of their fields here.
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
    _C.connect_torch(addresses, to_handle, from_handles, ConvBN._fields, BlockPlan._fields)
    return True


def _serves(x: Tensor, plan: BlockPlan) -> bool:
    return plan.backend == "cpu" and plan.dtype is x.dtype and plan.in_cpp and direct() and _connected()


def forward(x: Tensor, plan: BlockPlan, tensors: Tensors) -> list[Tensor] | None:
    """Return the result of Forward.run, then what it saves (Saved.flat)."""
    if not _serves(x, plan):
        return None
    found: list[Tensor] | None = _C.residual_block_forward(x, plan, tensors, torch.get_num_threads())
    return found


def infer(x: Tensor, plan: BlockPlan, tensors: Tensors) -> Tensor | None:
    """Return the result of inference.infer."""
    if not _serves(x, plan):
        return None
    found: Tensor | None = _C.residual_block_infer(x, plan, tensors, torch.get_num_threads())
    return found


def backward(
    grad_out: Tensor, plan: BlockPlan, saved: tuple[Tensor | None, ...], needs: list[bool], donated: bool
) -> list[Tensor | None] | None:
    """Return the result of Backward.run; saved: x, the parameters and Saved.flat."""
    x = saved[0]
    assert x is not None
    if not _serves(x, plan):
        return None
    threads = torch.get_num_threads()
    found: list[Tensor | None] | None = _C.residual_block_backward(grad_out, plan, saved, needs, donated, threads)
    return found
