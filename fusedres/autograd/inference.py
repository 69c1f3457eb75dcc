"""Inference: passes that keep nothing for backward. If all BatchNorms are constants, a few images run at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fusedres.autograd.convolution import prefers_own
from fusedres.autograd.folded_block import fold_block, run_folded
from fusedres.autograd.folded_convolution import add_shortcut
from fusedres.autograd.forward import Forward, unit_state
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, Inputs, Tensors
from fusedres.ops.launch import launches
from fusedres.values import Raw, ShortcutInput, in_dtype


def infer(inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> Tensor:
    """Return relu(F(x) + S(x)) if no gradient is wanted and all statistics are constants."""
    if _prefers_own(inputs, plan, tensors):
        folded = fold_block(inputs, plan, tensors, frozen=False)
        return in_parts(inputs, plan, lambda part, out: run_folded(part, plan, folded, out))
    launch = launches(plan.backend)
    entry = in_dtype(inputs.x[:0], plan.dtype)
    states = [unit_state(entry, unit, tensors, i, launch) for i, unit in enumerate(plan.all_units)]
    if plan.own_convolutions:
        return _infer(inputs, plan, tensors, states, None)
    return in_parts(inputs, plan, lambda part, out: _infer(part, plan, tensors, states, out))


def _prefers_own(inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> bool:
    """Return whether this package's kernels run all convolutions, with weights that are packed in this call."""
    shape: Sequence[int] = inputs.x.shape
    for index, unit in enumerate(plan.all_units):
        weight = tensors[index * UNIT_TENSORS]
        assert weight is not None
        source = inputs.shortcut.shape if index == len(plan.units) else shape
        shape = unit.output_shape(source, weight.shape)
        if weight.dtype is not plan.dtype or not prefers_own(weight, unit, plan.backend, shape):
            return False
    return True


def in_parts(inputs: Inputs, plan: BlockPlan, run: Callable[[Inputs, Tensor | None], Tensor]) -> Tensor:
    """Run inference on some images at a time: run(images, out) returns their result, in out unless that is None."""
    images, count = plan.infer_images, inputs.x.shape[0]
    if images >= count:
        return run(inputs, None)
    first = run(_images(inputs, 0, images), None)
    out: Tensor = launches(plan.backend).empty_batch(first, count)
    out[:images] = first
    for begin in range(images, count, images):
        run(_images(inputs, begin, images), out[begin : begin + images])
    return out


def _images(inputs: Inputs, begin: int, count: int) -> Inputs:
    other = None if inputs.other is None else inputs.other[begin : begin + count]
    return Inputs(inputs.x[begin : begin + count], other)


def _infer(inputs: Inputs, plan: BlockPlan, tensors: Tensors, states: list[Tensor], out: Tensor | None) -> Tensor:
    """Run the block on some images; the result goes into out if it is given."""
    passes = Forward(inputs, plan, tensors)
    launch, last = passes.launch, len(plan.units) - 1
    h = passes.entry
    for index, unit in enumerate(plan.units if plan.reads == "none" else plan.units[:-1]):
        if unit.own.fprop:
            h = launch.conv_bn_add_relu(h, passes.weight(index), unit.geometry, states[index])
        else:
            h = passes.convolution(Raw(h, None), index)
            launch.bn_relu_(h, states[index])
    if plan.reads == "none":
        return h if out is None else out.copy_(h)
    unit = plan.units[last]
    if unit.own.fprop:
        shortcut = _shortcut(passes, states)
        result: Tensor = launch.conv_bn_add_relu(h, passes.weight(last), unit.geometry, states[last], shortcut)
        return result
    y = passes.convolution(Raw(h, None), last)
    del h  # before the projection takes memory
    return add_shortcut(y, states[last], _shortcut(passes, states), plan.backend, out)


def _shortcut(passes: Forward, states: list[Tensor]) -> ShortcutInput:
    plan = passes.plan
    if plan.projection is None:
        return ShortcutInput(passes.shortcut_entry, None, plan.pad_stride)
    return ShortcutInput(passes.convolution(Raw(passes.shortcut_entry, None), len(plan.units)), states[-1])
