"""The ends of a block whose convolution runs again in backward, so that its output need not be saved."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.autograd.convolution import convolution_of
from fusedres.autograd.plan import UNIT_PARAMS, BlockPlan, Inputs, Saved
from fusedres.values import Raw, in_dtype


def with_outputs(saved: Saved, inputs: Inputs, plan: BlockPlan, params: tuple[Tensor | None, ...]) -> Saved:
    """Return what was saved, with the raw outputs that were not."""
    last, projection, end = saved.last, saved.projection, len(plan.units)

    def output(index: int, h: Raw) -> Tensor:
        weight = params[UNIT_PARAMS * index]
        assert weight is not None
        return convolution_of(h, weight, plan.all_units[index], plan.backend, projects=index == end)

    if plan.recompute[0]:
        h = Raw(saved.ys[-1], saved.states[-1]) if saved.ys else Raw(_entry(inputs.x, plan), None)
        last = last._replace(y=output(end - 1, h))
    if plan.recompute[1]:
        assert projection is not None
        projection = projection._replace(y=output(end, Raw(_entry(inputs.shortcut, plan), None)))
    return saved._replace(last=last, projection=projection)


def _entry(x: Tensor, plan: BlockPlan) -> Tensor:
    return in_dtype(x.contiguous(memory_format=torch.channels_last), plan.dtype)
