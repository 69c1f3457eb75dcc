"""Residual blocks with constant statistics whose BatchNorms are folded into the convolutions."""

from __future__ import annotations

from torch import Tensor

from fusedres.autograd.folded_convolution import FoldedConvolution, LibraryConvolution, add_shortcut, fold
from fusedres.autograd.forward import unit_state
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, Inputs, Tensors
from fusedres.kernels.cpu_convolution import Purpose
from fusedres.ops.launch import launches
from fusedres.values import ShortcutInput, in_dtype


def fold_block(inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> tuple[FoldedConvolution, ...]:
    """Fold every unit of a block with constant statistics, for many calls."""
    found: list[FoldedConvolution] = []
    launch = launches(plan.backend)
    images = min(plan.infer_images, inputs.x.shape[0])
    example = inputs.x[:0].to(plan.dtype)
    shape = (images, *inputs.x.shape[1:])  # of the unit's input
    for index, unit in enumerate(plan.all_units):
        if index == len(plan.units):
            shape = (images, *inputs.shortcut.shape[1:])  # the projection's
        weight = tensors[UNIT_TENSORS * index]
        assert weight is not None
        state = unit_state(example, unit, tensors, index, launch)
        found.append(fold(weight, state, unit, shape, plan.dtype, plan.backend, purpose=Purpose.FROZEN))
        shape = unit.output_shape(shape, weight.shape)
    return tuple(found)


def run_folded(
    inputs: Inputs,
    plan: BlockPlan,
    convolutions: tuple[FoldedConvolution, ...],
    out: Tensor | None,
    owned: bool = False,
) -> Tensor:
    """Run a folded block on some images.

    Args:
        out: where the result goes, or None.
        owned: nobody else reads the inputs, and the result may be in their memory.
    """
    h, entry = in_dtype(inputs.x, plan.dtype), in_dtype(inputs.shortcut, plan.dtype)
    *inner, last = convolutions[: len(plan.units)]
    for convolution in inner:
        h = convolution(h)
    if plan.reads == "none":
        return last(h, None, True, out)
    if plan.projection is not None:
        entry, owned = convolutions[-1](entry, None, False), True
    if plan.projection is not None or (plan.pad_stride == 1 and entry.shape[1] == last.identity.shape[1]):
        if owned and out is None and isinstance(last, LibraryConvolution):
            return last.onto(h, entry)
        return last(h, entry, True, out)
    y = last(h, None, False)
    return add_shortcut(y, last.identity, ShortcutInput(entry, None, plan.pad_stride), plan.backend, out)
