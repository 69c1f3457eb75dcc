"""The passes of forward.py and backward.py without Python between them, for plain calls on the CPU.

Each returns None, before anything was computed, where the C++ core does not serve the call: the others then run.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

from fusedres.autograd.plan import BlockPlan, ConvBN
from fusedres.kernels import cpu_block
from fusedres.ops.launch import direct


@cache
def _connected() -> bool:
    return cpu_block.connect(ConvBN._fields, BlockPlan._fields)


def _serves(x: Tensor, plan: BlockPlan) -> bool:
    return plan.backend == "cpu" and plan.dtype is x.dtype and direct() and _connected()


def forward(x: Tensor, plan: BlockPlan, tensors: tuple[Tensor | None, ...]) -> list[Tensor] | None:
    """The result of forward.forward_passes, then what it saves (Saved.flat)."""
    return cpu_block.forward(x, plan, tensors) if _serves(x, plan) else None


def infer(x: Tensor, plan: BlockPlan, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """As forward.infer."""
    return cpu_block.infer(x, plan, tensors) if _serves(x, plan) else None


def backward(
    grad_out: Tensor, plan: BlockPlan, saved: tuple[Tensor | None, ...], needs: list[bool], donated: bool
) -> list[Tensor | None] | None:
    """As backward.Backward, from x, the parameters and Saved.flat."""
    x = saved[0]
    assert x is not None
    return cpu_block.backward(grad_out, plan, saved, needs, donated) if _serves(x, plan) else None
