"""The passes of forward.py and backward.py without Python between them, for plain calls on the CPU.

Each returns None, before anything was computed, where the C++ core does not serve the call: the others then run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fusedres.autograd.plan import BlockPlan, Branch, ConvBN, Saved
from fusedres.kernels import cpu_block
from fusedres.ops.launch import direct

_NO_ONE_PASS = (False, False)
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


@cache
def _connected() -> bool:
    return cpu_block.connect(ConvBN._fields, BlockPlan._fields)


def _serves(x: Tensor, plan: BlockPlan) -> bool:
    return (
        plan.backend == "cpu" and plan.dtype is x.dtype and plan.one_pass == _NO_ONE_PASS and direct() and _connected()
    )


def forward(x: Tensor, plan: BlockPlan, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Saved] | None:
    """As forward.forward_passes, with a mask."""
    found = cpu_block.forward(x, plan, tensors) if _serves(x, plan) else None
    if found is None:
        return None
    last = len(plan.units) - 1
    depth = last + 1 if plan.projection is None else last + 2
    out, mask, outputs, states = found[0], found[1], found[2 : 2 + depth], found[2 + depth :]
    end = Branch(outputs[last], states[last], None)
    projection = None if plan.projection is None else Branch(outputs[-1], states[-1], None)
    return out, Saved(outputs[:last], states[:last], end, projection, mask)


def infer(x: Tensor, plan: BlockPlan, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """As forward.infer."""
    return cpu_block.infer(x, plan, tensors) if _serves(x, plan) else None


def backward(
    grad_out: Tensor,
    x: Tensor,
    plan: BlockPlan,
    params: tuple[Tensor | None, ...],
    saved: Saved,
    needs: list[bool],
) -> list[Tensor | None] | None:
    """As backward.Backward."""
    last, projection = saved.last, saved.projection
    if last.y is None or not _serves(x, plan):
        return None
    outputs, states = [*saved.ys, last.y], [*saved.states, last.state]
    if projection is not None:
        if projection.y is None:
            return None
        outputs.append(projection.y)
        states.append(projection.state)
    return cpu_block.backward(grad_out, x, saved.mask, plan, params, outputs, states, needs, not _keeps_graph())
