"""Runs one call of a fused block: by its plan, in parts around the filters in its branch, or unfused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.autograd import BlockPlan, Frozen, Inputs, count_path, run_block, run_frozen, wants_gradients
from fusedres.modules.anatomy import Anatomy, Unit
from fusedres.modules.calls import Options, holds_inference_tensors, keep_reason
from fusedres.modules.filters import filtered, split
from fusedres.modules.parts import at
from fusedres.modules.reading import Tensors, read_block, read_input


def run_plan(cls: Any, block: nn.Module, x: Tensor, plan: BlockPlan, tensors: Tensors, frozen: Frozen | None) -> Tensor:
    """Run a block of the fused class cls by the plan of a call.

    Raises:
        UncheckedError: the plan is from an earlier call and does not fit; nothing was computed.
    """
    recorded = wants_gradients(x, tensors)
    if holds_inference_tensors(x, tensors, recorded or any(unit.update for unit in plan.all_units)):
        return run_unfused(cls, block, x, "a tensor was made in inference mode")
    result = _run_fused(Inputs(x), plan, tensors, frozen)
    keep_reason(block, "")
    return result


def run_unfused(cls: Any, block: nn.Module, x: Tensor, reason: str | None) -> Tensor:
    """Run the stock forward of the fused class cls; reason: why, for report() (None: it is in the block's parts)."""
    count_path("unfused")
    keep_reason(block, reason)
    result: Tensor = cls._stock.forward(block, x)
    return result


def _run_fused(inputs: Inputs, plan: BlockPlan, tensors: Tensors, frozen: Frozen | None) -> Tensor:
    recorded = wants_gradients(inputs.x, (inputs.other, *tensors))
    constant = not any(unit.batch_statistics for unit in plan.all_units)
    if frozen is not None and not recorded and constant and not torch.compiler.is_compiling():
        count_path("frozen_forward")
        return run_frozen(inputs, plan, frozen.folded(inputs, plan, tensors))
    return run_block(inputs, plan, tensors, recorded)


def run_filtered(cls: Any, block: nn.Module, x: Tensor, anatomy: Anatomy, backend: str, options: Options) -> Tensor:
    """Run a block with filters: each part of the branch fused, and the filters by calling them.

    An error in a later part comes after earlier ones have updated their statistics, as in torch.

    Raises:
        ShapeError, DtypeError, RuntimeError, ValueError: see reading.py.
    """
    units = anatomy.units if anatomy.projection is None else (*anatomy.units, anatomy.projection)
    tensors = tuple(tensor for unit in units for tensor in unit.tensors)
    written = wants_gradients(x, tensors) or any(unit.settings.update for unit in units)
    if holds_inference_tensors(x, tensors, written):
        return run_unfused(cls, block, x, "a tensor was made in inference mode")
    h = x
    *first, last = split(anatomy)
    for index, part in enumerate(first):
        h = _run_part(cls, block, filtered(part.filters, h), part.anatomy, (backend, options, index), None)
    # What the shortcut reads is x itself if it has no filter, but the branch reads something else then.
    other = filtered(anatomy.filters[-1], x)
    h = filtered(last.filters, h)
    result = _run_part(cls, block, h, last.anatomy, (backend, options, len(first)), None if other is h else other)
    keep_reason(block, "")
    return result


def _run_part(
    cls: Any, block: nn.Module, h: Tensor, anatomy: Anatomy, how: tuple[str, Options, int], other: Tensor | None
) -> Tensor:
    """Run one part of a branch; how: the backend, the block's options, and the part's number."""
    backend, options, index = how
    given = read_input(cls.__name__, h, backend, options.conv, None)._replace(other=other)
    found = read_block(given, anatomy, options.memory)
    if isinstance(found, str):
        return _by_modules(block, h, anatomy, h if other is None else other)
    return _run_fused(Inputs(h, other), *found, None if options.frozen is None else options.frozen.part(index))


def _by_modules(block: nn.Module, h: Tensor, anatomy: Anatomy, other: Tensor) -> Tensor:
    """Run one part by calling its modules, where no kernel can run it."""

    def conv_bn(unit: Unit, h: Tensor) -> Tensor:
        result: Tensor = at(block, unit.norm_name)(at(block, unit.conv_name)(h))
        return result

    for unit in anatomy.units[:-1]:
        h = F.relu(conv_bn(unit, h))
    h = conv_bn(anatomy.units[-1], h)
    if anatomy.projection is not None:
        h = h + conv_bn(anatomy.projection, other)
    elif not anatomy.chained:
        h = h + other
    return F.relu(h)
