"""The add of a residual block, and the statistics of the BatchNorm that opens the next one, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.autograd.memory import require_memory, statistics_kept_on_error
from fusedres.autograd.norm_act_conv import NormActConvPlan
from fusedres.autograd.plan import Tensors, norm_of
from fusedres.autograd.residual_block import count_path
from fusedres.ops.launch import launches


def run_sum(y: Tensor, shortcut: Tensor, plan: NormActConvPlan, norm: Tensors) -> tuple[Tensor, Tensor]:
    """Add the shortcut to y, in place; return the sum and the (4, C) state of the next step's BatchNorm.

    Args:
        y, shortcut: dense channels_last, of one shape and dtype.
        plan, norm: of the next step, see run_norm_act_conv; its statistics are those of the batch.
    """
    found: tuple[Tensor, Tensor] = SumStatisticsFunction.apply(y, shortcut, plan, norm)
    return found


class SumStatisticsFunction(torch.autograd.Function):
    """y + shortcut, and the statistics of that."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shortcut: Tensor, plan: NormActConvPlan, norm: Tensors) -> tuple[Tensor, Tensor]:
        """Run the pass."""
        unit, tensors = plan.units[0], (None, *norm)
        require_memory(y, (shortcut, *norm))
        with statistics_kept_on_error(tensors, (unit,)):
            state = launches(plan.backend).bn_statistics_of_sum_(y, shortcut, norm_of(tensors, 0, unit))
        count_path("sum_statistics")
        ctx.mark_dirty(y)
        ctx.mark_non_differentiable(state)
        return y, state

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Pass the gradient of the sum on to both terms."""
        return grad, grad, None, None
