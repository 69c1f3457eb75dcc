"""Inference: passes that keep nothing for backward, and frozen blocks.

If all BatchNorms of a block use constant statistics, it runs a few images at a time. `Frozen` serves fusedres.freeze:
it folds BatchNorm into the convolutions once, and lays the weights out once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.forward import Forward, unit_state
from fusedres.autograd.layout import in_format
from fusedres.autograd.memory import dense
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, ConvBN, Inputs, Tensors
from fusedres.ops.launch import launches
from fusedres.values import Raw, ShortcutInput, in_dtype


def infer(inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> Tensor:
    """Return relu(F(x) + S(x)) if no gradient is wanted and all statistics are constants."""
    launch = launches(plan.backend)
    entry = in_dtype(inputs.x[:0], plan.dtype)
    states = [unit_state(entry, unit, tensors, i, launch) for i, unit in enumerate(plan.all_units)]
    if plan.own_convolutions:
        return _infer(inputs, plan, tensors, states, None)
    return in_parts(inputs, plan, lambda part, out: _infer(part, plan, tensors, states, out))


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
        return _copied(h, out)
    unit = plan.units[last]
    if unit.own.fprop:
        shortcut = _shortcut(passes, states)
        result: Tensor = launch.conv_bn_add_relu(h, passes.weight(last), unit.geometry, states[last], shortcut)
        return result
    y = passes.convolution(Raw(h, None), last)
    del h  # before the projection takes memory
    return _tail(y, states[last], _shortcut(passes, states), plan, out)


def _copied(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _shortcut(passes: Forward, states: list[Tensor]) -> ShortcutInput:
    plan = passes.plan
    if plan.projection is None:
        return ShortcutInput(passes.shortcut_entry, None, plan.pad_stride)
    return ShortcutInput(passes.convolution(Raw(passes.shortcut_entry, None), len(plan.units)), states[-1])


def _tail(y: Tensor, state: Tensor, shortcut: ShortcutInput, plan: BlockPlan, out: Tensor | None) -> Tensor:
    """Run the add and the last ReLU; the result goes into out if it is given, else into y."""
    launch = launches(plan.backend)
    if out is None:
        launch.bn_add_relu_(y, state, shortcut, False)
        return y
    launch.bn_add_relu_out(y, state, shortcut, out)
    return out


class FrozenConv(NamedTuple):
    """A convolution with its BatchNorm folded in: weight scale⊙W, in oneDNN's own layout if packed, and bias shift."""

    weight: Tensor
    bias: Tensor
    packed: bool
    unit: ConvBN

    def __call__(self, x: Tensor) -> Tensor:
        """Return scale⊙(W * x) + shift in channels_last."""
        stride, padding, dilation, groups = self.unit[:4]
        if self.packed:
            y: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, padding, stride, dilation, groups, "none", [], ""
            )
        else:
            y = torch.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        return y.contiguous(memory_format=torch.channels_last)


class FrozenBlock(NamedTuple):
    """The folded convolutions of a block, the projection's last, for inputs of one kind."""

    kind: tuple[torch.dtype, torch.device, torch.dtype]
    convs: tuple[FrozenConv, ...]
    identities: tuple[Tensor, ...]  # states that only apply the ReLU, one per convolution


class Frozen:
    """What fusedres.freeze leaves on a block: the folded convolutions, made at the first call with each kind of input.

    A block that leaves eval mode drops this object. So what a call in another thread folds meanwhile is dropped too.
    """

    def __init__(self) -> None:
        self._block: FrozenBlock | None = None
        self._parts: dict[int, Frozen] = {}

    def folded(self, inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> FrozenBlock:
        """The folds for inputs like these."""
        block = self._block
        if block is None or block.kind != input_kind(inputs.x, plan):
            block = self._block = fold(inputs, plan, tensors)
        return block

    def part(self, index: int) -> Frozen:
        """What is kept of one of the parts that a block with filters runs in."""
        return self._parts.setdefault(index, Frozen())


def input_kind(x: Tensor, plan: BlockPlan) -> tuple[torch.dtype, torch.device, torch.dtype]:
    """What the folds depend on besides the weights."""
    return x.dtype, x.device, plan.dtype


def fold(inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> FrozenBlock:
    """Fold every unit of a block with constant statistics, in float32 or wider, and round once.

    Weights that oneDNN packs are packed for inputs of x's size: packed without a size, a strided 1x1 convolution of a
    few images took six times as long. Other sizes run too, some of them slower.
    """
    convs: list[FrozenConv] = []
    identities: list[Tensor] = []
    launch = launches(plan.backend)
    x, images = inputs.x, min(plan.infer_images, inputs.x.shape[0])
    example = x[:0].to(plan.dtype)
    size = (images, *x.shape[1:])  # of the unit's input
    for index, unit in enumerate(plan.all_units):
        if index == len(plan.units):
            size = (images, *inputs.shortcut.shape[1:])  # the projection's
        conv_weight = tensors[UNIT_TENSORS * index]
        assert conv_weight is not None
        state = unit_state(example, unit, tensors, index, launch)
        folded = (conv_weight.detach().to(state.dtype) * state[2].view(-1, 1, 1, 1)).to(plan.dtype)
        packed = plan.dtype is torch.float32 and x.is_cpu and torch.backends.mkldnn.is_available()
        if packed:
            folded = torch.ops.mkldnn._reorder_convolution_weight(
                folded.contiguous(), unit.padding, unit.stride, unit.dilation, unit.groups, list(size)
            )
        size = unit.output_shape(size, conv_weight.shape)
        convs.append(FrozenConv(folded, state[3].to(plan.dtype), packed, unit))
        identity = torch.zeros_like(state)
        identity[1:3] = 1
        identities.append(identity)
    return FrozenBlock(input_kind(x, plan), tuple(convs), tuple(identities))


def run_frozen(inputs: Inputs, plan: BlockPlan, frozen: FrozenBlock) -> Tensor:
    """Return relu(F(x) + S(x)) of the folded block; inputs in any memory format."""
    inputs = dense(inputs)
    y = in_parts(inputs, plan, lambda part, out: _run_frozen(part, plan, frozen, out))
    return in_format(y, plan.channels_last)


def _run_frozen(inputs: Inputs, plan: BlockPlan, frozen: FrozenBlock, out: Tensor | None) -> Tensor:
    """Run the folded block on some images; the result goes into out if it is given."""
    launch = launches(plan.backend)
    h, entry = inputs.x.to(plan.dtype), inputs.shortcut.to(plan.dtype)
    last = len(plan.units) - 1
    for index in range(last + 1 if plan.reads == "none" else last):
        h = frozen.convs[index](h)
        launch.bn_relu_(h, frozen.identities[index])
    if plan.reads == "none":
        return _copied(h, out)
    y = frozen.convs[last](h)
    shortcut = ShortcutInput(entry, None, plan.pad_stride)
    if plan.projection is not None:
        shortcut = ShortcutInput(frozen.convs[last + 1](entry))
    return _tail(y, frozen.identities[last], shortcut, plan, out)
