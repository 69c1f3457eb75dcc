"""The forward passes of a residual block with convolutions of this package's own.

BatchNorm's statistics are taken where a convolution stores its output, and its affine map and ReLU are applied where
the next one loads it: between two convolutions only the raw output exists. A product that the plan leaves to the
library reads and writes whole tensors instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.convolution import convolution
from fusedres.autograd.forward import Tensors, in_dtype, unit_state
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, Branch, ConvBN, OnePass, Saved
from fusedres.ops.launch import Launches, launches

_CHANNELS_LAST = torch.channels_last
_Shortcut = tuple[Tensor | None, Tensor | None, int]  # as it lies, its state, its stride
_Joined = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]  # x, pivot, folded, offset, stride


class Raw(NamedTuple):
    """relu(BN(y)) before it is applied; y itself where state is None."""

    y: Tensor
    state: Tensor | None


def own_weights(plan: BlockPlan, tensors: Tensors, launch: Launches) -> list[Tensor | None]:
    """Every unit's weight in the plan's dtype and channels_last, converted in one launch; None where it is already."""
    found: list[Tensor | None] = [None] * len(plan.all_units)
    convert: list[int] = []
    for index, unit in enumerate(plan.all_units):
        weight = tensors[index * UNIT_TENSORS]
        assert weight is not None
        fits = weight.dtype is plan.dtype and weight.is_contiguous(memory_format=_CHANNELS_LAST)
        if any(unit.own) and not one_pass(plan, index) and not fits:
            convert.append(index)
    if convert:
        originals = [tensors[index * UNIT_TENSORS] for index in convert]
        for index, weight in zip(convert, launch.conv_weights(originals, plan.dtype), strict=True):
            found[index] = weight
    return found


def one_pass(plan: BlockPlan, index: int) -> bool:
    """Whether a unit takes its statistics before its convolution."""
    last = len(plan.units) - 1
    return (index == last and plan.one_pass[0]) or (index == last + 1 and plan.one_pass[1])


class ConvForward:
    """One forward of a block: the passes share the plan, its tensors and the converted weights."""

    def __init__(self, x: Tensor, plan: BlockPlan, tensors: Tensors) -> None:
        self.plan, self.tensors = plan, tensors
        self.launch = launches(plan.backend)
        self.entry = in_dtype(x, plan.dtype)
        self.weights = own_weights(plan, tensors, self.launch)
        self._offsets: dict[int, Tensor] = {}  # of one-pass units: the constants of their product

    def run(self, with_mask: bool) -> tuple[Tensor, Saved]:
        """relu(F(x) + S(x)), and what its backward needs."""
        plan = self.plan
        ys: list[Tensor] = []
        states: list[Tensor] = []
        h = Raw(self.entry, None)
        for index in range(len(plan.units) - 1):
            branch = self._conv_bn(h, index)
            assert branch.y is not None
            ys.append(branch.y)
            states.append(branch.state)
            h = Raw(branch.y, branch.state)
        last = self._end(h, len(plan.units) - 1)
        projection = None if plan.projection is None else self._end(Raw(self.entry, None), len(plan.units))
        out, mask = self._tail(h, last, projection, with_mask)
        return out, Saved(ys, states, last, projection, mask, self.weights)

    def infer(self) -> Tensor:
        """relu(F(x) + S(x)) where all statistics are constants: applied where a convolution stores its output."""
        plan, launch = self.plan, self.launch
        last = len(plan.units) - 1
        states = [unit_state(self.entry, unit, self.tensors, i, launch) for i, unit in enumerate(plan.all_units)]
        shortcut: _Shortcut = (self.entry, None, plan.pad_stride)
        if plan.projection is not None:
            shortcut = (self._library_or_own(Raw(self.entry, None), last + 1), states[-1], 1)
        h = self.entry
        for index, unit in enumerate(plan.units):
            end = shortcut if index == last else (None, None, 1)
            if unit.own.fprop:
                geometry = (unit.stride, unit.padding, unit.dilation)
                h = launch.conv_bn_add_relu(h, self._weight(index), *geometry, states[index], *end)
                continue
            h = convolution(h, self._weight(index), unit)
            if index < last:
                launch.bn_relu_(h, states[index])
            else:
                launch.bn_add_relu_(h, states[index], *end, False)
        return h

    def _weight(self, index: int) -> Tensor:
        weight = self.weights[index]
        if weight is None:
            weight = self.tensors[index * UNIT_TENSORS]
        assert weight is not None
        return weight

    def _library_or_own(self, h: Raw, index: int) -> Tensor:
        """The raw convolution, without statistics."""
        unit = self.plan.all_units[index]
        if unit.own.fprop:
            geometry = (unit.stride, unit.padding, unit.dilation)
            y: Tensor = self.launch.conv_fprop(h.y, self._weight(index), h.state, *geometry, False)[0]
            return y
        subsample = h.state is None and unit.pixelwise and unit.stride != (1, 1)
        source = h.y
        if h.state is not None or subsample:
            source = self.launch.bn_relu(h.y, h.state, None, unit.stride[0] if subsample else 1)
        return convolution(source, self._weight(index), unit, subsampled=subsample)

    def _conv_bn(self, h: Raw, index: int) -> Branch:
        """A convolution and its BatchNorm's state."""
        unit = self.plan.all_units[index]
        if not (unit.own.fprop and unit.batch_statistics):
            y = self._library_or_own(h, index)
            return Branch(y, unit_state(y, unit, self.tensors, index, self.launch), None)
        geometry = (unit.stride, unit.padding, unit.dilation)
        y, partials, rows = self.launch.conv_fprop(h.y, self._weight(index), h.state, *geometry, True)
        state = self.launch.bn_finalize(partials, rows, *self._norm(index), unit.momentum, unit.eps)
        return Branch(y, state, None)

    def _norm(self, index: int) -> tuple[Tensor | None, ...]:
        """BatchNorm's weight, bias and the statistics to be updated."""
        _, weight, bias, *running = self.tensors[index * UNIT_TENSORS : (index + 1) * UNIT_TENSORS]
        return (weight, bias, *running) if self.plan.all_units[index].update else (weight, bias, None, None, None)

    def _end(self, h: Raw, index: int) -> Branch:
        """The end of a branch: an ordinary convolution, or the statistics of one that is not run yet."""
        if not one_pass(self.plan, index):
            return self._conv_bn(h, index)
        unit: ConvBN = self.plan.all_units[index]
        weight = self.tensors[index * UNIT_TENSORS]
        stride = unit.stride[0]
        pivot, total, gram = self.launch.gram_statistics(h.y, h.state, stride)
        count = pixel_rows(h.y, stride)
        state, projected = self.launch.one_pass_statistics(
            weight, pivot, total, gram, count, *self._norm(index), unit.momentum, unit.eps
        )
        folded, self._offsets[index] = self.launch.one_pass_fold(weight, state, total, count, self.plan.dtype)
        return Branch(None, state, OnePass(pivot, total, projected, folded))

    def _tail(self, h: Raw, last: Branch, projection: Branch | None, with_mask: bool) -> tuple[Tensor, Tensor]:
        plan, launch = self.plan, self.launch
        end = len(plan.units) - 1
        shortcut: _Shortcut = (self.entry, None, plan.pad_stride)
        if projection is not None:
            shortcut = (projection.y, projection.state, 1)
        joined: _Joined = (None, None, None, None, 1)
        if plan.one_pass[1]:
            assert plan.projection is not None and projection is not None
            joined = (self.entry, *self._product(end + 1, projection), plan.projection.stride[0])
            shortcut = (None, None, 1)
        if plan.one_pass[0]:
            product = self._product(end, last)
            out, mask = launch.one_pass_tail(h.y, h.state, *product, 1, *shortcut, *joined, with_mask)
        elif plan.one_pass[1]:  # the projection's product, with the branch as its shortcut
            x, *product_and_stride = joined
            nothing = (None, None, None, None, 1)
            branch = (last.y, last.state, 1)
            out, mask = launch.one_pass_tail(x, None, *product_and_stride, *branch, *nothing, with_mask)
        else:
            out, mask = launch.bn_add_relu(last.y, last.state, *shortcut, with_mask)
        return out, mask

    def _product(self, index: int, branch: Branch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Pivot, folded weight and offset of a one-pass unit."""
        assert branch.one_pass is not None
        return branch.one_pass.pivot, branch.one_pass.folded, self._offsets[index]


def pixel_rows(x: Tensor, stride: int) -> int:
    """Pixels of all images when every stride-th is taken."""
    return x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
