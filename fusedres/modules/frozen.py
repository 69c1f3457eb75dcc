"""Inference with weights that no longer change: BatchNorm folded into the convolutions once, weights laid out once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.autograd import UNIT_TENSORS, BlockPlan, ConvBN, in_format, to_channels_last
from fusedres.autograd.forward import in_parts
from fusedres.ops.launch import launches


class FrozenConv(NamedTuple):
    """A convolution with its BatchNorm folded in: weight scale⊙W in oneDNN's own layout where it serves, bias shift."""

    weight: Tensor
    bias: Tensor
    packed: bool
    unit: ConvBN

    def __call__(self, x: Tensor) -> Tensor:
        """Scale⊙(W * x) + shift, channels_last."""
        stride, padding, dilation, groups = self.unit[:4]
        if self.packed:
            y: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, padding, stride, dilation, groups, "none", [], ""
            )
        else:
            y = torch.convolution(x, self.weight, self.bias, stride, padding, dilation, False, (0, 0), groups)
        return y.contiguous(memory_format=torch.channels_last)


class FrozenBlock(NamedTuple):
    """The folded convolutions of a block, the projection's last, for inputs of one kind."""

    kind: tuple[torch.dtype, torch.device, torch.dtype]
    convs: tuple[FrozenConv, ...]
    identities: tuple[Tensor, ...]  # states that only apply the ReLU, one a convolution


class Frozen:
    """What fusedres.freeze leaves on a block: its folds, made at the next call and for each kind of input.

    A block that leaves eval mode drops this object, and with it whatever a call in another thread still folds.
    """

    def __init__(self) -> None:
        self._block: FrozenBlock | None = None

    def folded(self, x: Tensor, plan: BlockPlan, tensors: tuple[Tensor | None, ...]) -> FrozenBlock:
        """The folds for an input like x."""
        block = self._block
        if block is None or block.kind != input_kind(x, plan):
            block = self._block = fold(x, plan, tensors)
        return block


def input_kind(x: Tensor, plan: BlockPlan) -> tuple[torch.dtype, torch.device, torch.dtype]:
    """What the folds depend on besides the weights."""
    return x.dtype, x.device, plan.dtype


def fold(x: Tensor, plan: BlockPlan, tensors: tuple[Tensor | None, ...]) -> FrozenBlock:
    """Folds every unit of a block whose statistics are constants, in float32 or wider, rounded once.

    Weights that oneDNN packs are packed for inputs of x's size: packed for no size, a strided 1x1 convolution of a few
    images took six times the time. Other sizes run as well, some of them slower.
    """
    units = plan.units if plan.projection is None else (*plan.units, plan.projection)
    convs: list[FrozenConv] = []
    identities: list[Tensor] = []
    launch = launches(plan.backend)
    example = x[:0].to(plan.dtype)
    entry = (min(plan.infer_images, x.shape[0]), *x.shape[1:])
    size = entry  # of the unit's input
    for index, unit in enumerate(units):
        if index == len(plan.units):
            size = entry  # the projection's
        conv_weight, weight, bias, mean, var, _ = tensors[UNIT_TENSORS * index : UNIT_TENSORS * (index + 1)]
        assert conv_weight is not None and mean is not None and var is not None
        state = launch.bn_frozen(example, weight, bias, mean, var, unit.eps)
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


def run_frozen(x: Tensor, plan: BlockPlan, frozen: FrozenBlock) -> Tensor:
    """relu(F(x) + S(x)) of the folded block; x in any memory format."""
    x = to_channels_last(x)
    y = in_parts(x, plan, lambda part, out: _run(part, plan, frozen, out))
    return in_format(y, plan.channels_last)


def _run(x: Tensor, plan: BlockPlan, frozen: FrozenBlock, out: Tensor | None) -> Tensor:
    """The folded block on some images, into out where given."""
    launch = launches(plan.backend)
    h = entry = x.to(plan.dtype)
    last = len(plan.units) - 1
    for index in range(last):
        h = frozen.convs[index](h)
        launch.bn_relu_(h, frozen.identities[index])
    y = frozen.convs[last](h)
    shortcut, stride = (entry, plan.pad_stride) if plan.projection is None else (frozen.convs[last + 1](entry), 1)
    if out is None:
        launch.bn_add_relu_(y, frozen.identities[last], shortcut, None, stride, False)
        return y
    launch.bn_add_relu_out(y, frozen.identities[last], shortcut, None, stride, out)
    return out
