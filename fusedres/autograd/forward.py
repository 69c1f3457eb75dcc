"""The forward passes of a residual block on a channels_last input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedres.autograd.convolution import convolution
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, Branch, ConvBN, OnePass, Saved
from fusedres.ops.launch import Launches, direct, launches

Tensors = tuple[Tensor | None, ...]  # UNIT_TENSORS of every unit, one after the other


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor converted, or itself."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def unit_state(y: Tensor, unit: ConvBN, tensors: Tensors, index: int, launch: Launches) -> Tensor:
    """The (4, C) state of a unit's BatchNorm: from y, or from the running statistics."""
    _, weight, bias, mean, var, batches = tensors[index * UNIT_TENSORS : (index + 1) * UNIT_TENSORS]
    if not unit.batch_statistics:
        return launch.bn_frozen(y, weight, bias, mean, var, unit.eps)
    if not unit.update:
        mean = var = batches = None
    return launch.bn_statistics(y, weight, bias, mean, var, batches, unit.momentum, unit.eps)


def _weight(tensors: Tensors, index: int) -> Tensor:
    weight = tensors[index * UNIT_TENSORS]
    assert weight is not None
    return weight


def _one_pass(
    h: Tensor, state: Tensor | None, stride: int, unit: ConvBN, tensors: Tensors, index: int, launch: Launches
) -> tuple[Tensor, Branch]:
    """The raw convolution of the centred input, and the branch's end. With a state h is raw: relu(BN(h)) is meant."""
    conv_weight, weight, bias, mean, var, batches = tensors[index * UNIT_TENSORS : (index + 1) * UNIT_TENSORS]
    assert conv_weight is not None
    if not unit.update:
        mean = var = batches = None
    z, pivot, total, gram = launch.gram(h, state, stride)
    count = z.numel() // z.shape[1]
    end_state, projected = launch.one_pass_statistics(
        conv_weight, pivot, total, gram, count, weight, bias, mean, var, batches, unit.momentum, unit.eps
    )
    return convolution(z, conv_weight, unit, subsampled=True), Branch(None, end_state, OnePass(pivot, total, projected))


def forward_passes(x: Tensor, plan: BlockPlan, tensors: Tensors, with_mask: bool) -> tuple[Tensor, Saved]:
    """relu(F(x) + S(x)), and what its backward needs."""
    launch = launches(plan.backend)
    entry = in_dtype(x, plan.dtype)
    ys: list[Tensor] = []
    states: list[Tensor] = []
    h = entry
    last_index = len(plan.units) - 1
    for index in range(last_index):
        unit = plan.units[index]
        y = convolution(h, _weight(tensors, index), unit)
        state = unit_state(y, unit, tensors, index, launch)
        ys.append(y)
        states.append(state)
        if index + 1 < last_index or not plan.one_pass[0]:
            h = launch.bn_relu(y, state, None, 1)
    unit = plan.units[last_index]
    if plan.one_pass[0]:
        y, last = _one_pass(ys[-1], states[-1], 1, unit, tensors, last_index, launch)
    else:
        y = convolution(h, _weight(tensors, last_index), unit)
        last = Branch(y, unit_state(y, unit, tensors, last_index, launch), None)
    del h

    if plan.projection is None:
        shortcut, projection, stride = entry, None, plan.pad_stride
    else:
        shortcut, projection = _projection(entry, plan, plan.projection, tensors)
        stride = 1
    shortcut_state = None if projection is None else projection.state

    in_place = direct() or torch.compiler.is_compiling()
    # The result goes into a raw convolution output that nobody saves, where there is one.
    # Not where a dispatch mode may have kept it, as selective checkpoints do.
    if last.y is None and in_place:
        mask = launch.bn_add_relu_(y, last.state, shortcut, shortcut_state, stride, with_mask)
        return y, Saved(ys, states, last, projection, mask)
    if projection is not None and projection.y is None and in_place:
        mask = launch.bn_add_relu_(shortcut, projection.state, y, last.state, 1, with_mask)
        return shortcut, Saved(ys, states, last, projection, mask)
    out, mask = launch.bn_add_relu(y, last.state, shortcut, shortcut_state, stride, with_mask)
    return out, Saved(ys, states, last, projection, mask)


def _projection(entry: Tensor, plan: BlockPlan, unit: ConvBN, tensors: Tensors) -> tuple[Tensor, Branch]:
    """The projection's raw convolution and its end. A strided 1x1 reads every stride-th pixel: taken out before."""
    index, launch = len(plan.units), launches(plan.backend)
    if plan.one_pass[1]:
        return _one_pass(entry, None, unit.stride[0], unit, tensors, index, launch)
    source, subsampled = _projection_source(entry, unit, launch)
    y = convolution(source, _weight(tensors, index), unit, subsampled=subsampled)
    return y, Branch(y, unit_state(y, unit, tensors, index, launch), None)


def _projection_source(entry: Tensor, unit: ConvBN, launch: Launches) -> tuple[Tensor, bool]:
    if unit.pixelwise and unit.stride != (1, 1):
        return launch.bn_relu(entry, None, None, unit.stride[0]), True
    return entry, False


def infer(x: Tensor, plan: BlockPlan, tensors: Tensors) -> Tensor:
    """relu(F(x) + S(x)) where no gradient is wanted and all statistics are constants: nothing is kept."""
    launch = launches(plan.backend)
    states: list[Tensor] = []
    units = plan.units if plan.projection is None else (*plan.units, plan.projection)
    entry = in_dtype(x[:0], plan.dtype)
    for index, unit in enumerate(units):
        states.append(unit_state(entry, unit, tensors, index, launch))
    return in_parts(x, plan, lambda part, out: _infer(part, plan, tensors, states, out))


def in_parts(x: Tensor, plan: BlockPlan, run: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """Runs inference some images at a time: run(images, where their result goes, fresh where None) -> result."""
    images = plan.infer_images
    if images >= x.shape[0]:
        return run(x, None)
    first = run(x[:images], None)
    out: Tensor = launches(plan.backend).empty_batch(first, x.shape[0])
    out[:images] = first
    for begin in range(images, x.shape[0], images):
        run(x[begin : begin + images], out[begin : begin + images])
    return out


def _infer(x: Tensor, plan: BlockPlan, tensors: Tensors, states: list[Tensor], out: Tensor | None) -> Tensor:
    """The block on some images, into out where given."""
    launch = launches(plan.backend)
    h = entry = in_dtype(x, plan.dtype)
    last_index = len(plan.units) - 1
    for index in range(last_index):
        h = convolution(h, _weight(tensors, index), plan.units[index])
        launch.bn_relu_(h, states[index])
    y = convolution(h, _weight(tensors, last_index), plan.units[last_index])
    del h
    if plan.projection is None:
        shortcut, shortcut_state, stride = entry, None, plan.pad_stride
    else:
        source, subsampled = _projection_source(entry, plan.projection, launch)
        shortcut = convolution(source, _weight(tensors, last_index + 1), plan.projection, subsampled=subsampled)
        shortcut_state, stride = states[last_index + 1], 1
    if out is None:
        launch.bn_add_relu_(y, states[last_index], shortcut, shortcut_state, stride, False)
        return y
    launch.bn_add_relu_out(y, states[last_index], shortcut, shortcut_state, stride, out)
    return out
