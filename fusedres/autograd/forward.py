"""The forward passes of a residual block on a channels_last input, for own and for the library's convolutions.

A convolution of this package's own takes BatchNorm's statistics where it stores its output. Where it loads its input,
it applies the affine map and ReLU of the BatchNorm before it. So between two such convolutions only the raw output
exists. The library's convolutions read and write whole tensors, with a pass before and after each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.autograd import one_pass
from fusedres.autograd.convolution import convolution_of
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, Branch, ConvBN, Inputs, Saved, Tensors, norm_of
from fusedres.autograd.synchronised import synchronised_state
from fusedres.ops.launch import Launches, direct, launches
from fusedres.values import Folded, Raw, ShortcutInput, in_dtype


def unit_state(y: Tensor, unit: ConvBN, tensors: Tensors, index: int, launch: Launches) -> Tensor:
    """Return the (4, C) state of a unit's BatchNorm, from y or from the running statistics."""
    norm = norm_of(tensors, index, unit)
    if unit.group is not None:
        return synchronised_state(y, unit, norm, launch)
    state: Tensor = launch.bn_statistics(y, norm) if unit.batch_statistics else launch.bn_frozen(y, norm)
    return state


def own_weights(plan: BlockPlan, tensors: Tensors, launch: Launches) -> list[Tensor | None]:
    """Return every unit's weight in the plan's dtype and channels_last, converted in one launch.

    A weight that needs no conversion is None in the list. If the library runs all convolutions, the list is empty.
    """
    if not plan.own_convolutions:
        return []
    found: list[Tensor | None] = [None] * len(plan.all_units)
    convert: list[int] = []
    for index, unit in enumerate(plan.all_units):
        weight = tensors[index * UNIT_TENSORS]
        assert weight is not None
        fits = weight.dtype is plan.dtype and weight.is_contiguous(memory_format=torch.channels_last)
        if any(unit.own) and not plan.is_one_pass(index) and not fits:
            convert.append(index)
    if convert:
        originals = [tensors[index * UNIT_TENSORS] for index in convert]
        for index, weight in zip(convert, launch.conv_weights(originals, plan.dtype), strict=True):
            found[index] = weight
    return found


class Forward:
    """One forward of a block: its passes share the plan, the tensors and the converted weights."""

    def __init__(self, inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> None:
        self.plan, self.tensors = plan, tensors
        self.launch = launches(plan.backend)
        self.entry = in_dtype(inputs.x, plan.dtype)
        self.shortcut_entry = self.entry if inputs.other is None else in_dtype(inputs.other, plan.dtype)
        self.weights = own_weights(plan, tensors, self.launch)
        # What the ends leave for the tail and do not save: raw outputs, or folded products that are still to run.
        self._outputs: dict[int, Tensor] = {}
        self._products: dict[int, Folded] = {}

    def run(self, with_mask: bool) -> tuple[Tensor, Saved]:
        """Return relu(F(x) + S(x)), or relu(F(x)) without a shortcut, and what its backward needs."""
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
        if plan.reads == "none":
            assert last.y is not None
            out = self.launch.bn_relu(last.y, last.state, None, 1)
            return out, Saved(ys, states, last, None, None, self.weights)
        projection = None if plan.projection is None else self._end(Raw(self.shortcut_entry, None), len(plan.units))
        tail = self._one_pass_tail if self._products else self._tail
        out, mask = tail(h, last, projection, with_mask)
        return out, Saved(ys, states, last, projection, mask, self.weights)

    def weight(self, index: int) -> Tensor:
        """Return a unit's weight as its convolution takes it."""
        weight = self.weights[index] if self.weights else None
        if weight is None:
            weight = self.tensors[index * UNIT_TENSORS]
        assert weight is not None
        return weight

    def convolution(self, h: Raw, index: int) -> Tensor:
        """Run the raw convolution of a unit, without statistics."""
        unit = self.plan.all_units[index]
        if unit.own.fprop:
            y: Tensor = self.launch.conv_fprop(h, self.weight(index), unit.geometry, False)[0]
            return y
        projects = index == len(self.plan.units)
        return convolution_of(h, self.weight(index), unit, self.plan.backend, projects=projects)

    def _conv_bn(self, h: Raw, index: int) -> Branch:
        """Run a convolution, and compute its BatchNorm's state."""
        unit = self.plan.all_units[index]
        if not (unit.own.fprop and unit.batch_statistics):
            y = self.convolution(h, index)
            return Branch(y, unit_state(y, unit, self.tensors, index, self.launch))
        y, partials, rows = self.launch.conv_fprop(h, self.weight(index), unit.geometry, True)
        return Branch(y, self.launch.bn_finalize(partials, rows, norm_of(self.tensors, index, unit)))

    def _end(self, h: Raw, index: int) -> Branch:
        """Run the end of a branch: an ordinary convolution, or a one-pass unit."""
        plan = self.plan
        if not plan.is_one_pass(index):
            branch = self._conv_bn(h, index)
            if not plan.recomputes(index) or branch.y is None:
                return branch
            self._outputs[index] = branch.y
            return Branch(None, branch.state)
        unit, weight = plan.all_units[index], self.tensors[index * UNIT_TENSORS]
        assert weight is not None
        norm = norm_of(self.tensors, index, unit)
        if plan.own_convolutions:
            branch, self._products[index] = one_pass.fold(h, unit, weight, norm, self.launch)
        else:
            branch, self._outputs[index] = one_pass.convolve_centred(h, unit, weight, norm, plan.backend)
        return branch

    def _tail(self, h: Raw, last: Branch, projection: Branch | None, with_mask: bool) -> tuple[Tensor, Tensor]:
        """Run the add and the last ReLU, in the memory of a raw output that nobody saves, if there is one."""
        launch, end = self.launch, len(self.plan.units)
        y = self._outputs.get(end - 1, last.y)
        assert y is not None
        shortcut = ShortcutInput(self.shortcut_entry, None, self.plan.pad_stride)
        if projection is not None:
            projected = self._outputs.get(end, projection.y)
            assert projected is not None
            shortcut = ShortcutInput(projected, projection.state)
        # A dispatch mode may have kept the raw output, as selective checkpoints do.
        in_place = direct() or torch.compiler.is_compiling()
        if in_place and end - 1 in self._outputs:
            return y, launch.bn_add_relu_(y, last.state, shortcut, with_mask)
        if in_place and projection is not None and end in self._outputs:
            mask = launch.bn_add_relu_(shortcut.x, projection.state, ShortcutInput(y, last.state), with_mask)
            return shortcut.x, mask
        out, mask = launch.bn_add_relu(y, last.state, shortcut, with_mask)
        return out, mask

    def _one_pass_tail(self, h: Raw, last: Branch, projection: Branch | None, with_mask: bool) -> tuple[Tensor, Tensor]:
        """Run the same as one product of the last unit, of the projection, or of both."""
        plan, end = self.plan, len(self.plan.units)
        joined = None
        if plan.one_pass[1]:
            assert plan.projection is not None and projection is not None
            joined = one_pass.centred(self.shortcut_entry, projection, plan.projection.stride[0])
        if not plan.one_pass[0]:  # the projection's product, with the branch as its shortcut
            assert last.y is not None
            branch = ShortcutInput(last.y, last.state)
            out, mask = self.launch.one_pass_tail(joined, None, self._products[end], branch, None, None, with_mask)
            return out, mask
        shortcut: ShortcutInput | None = ShortcutInput(self.shortcut_entry, None, plan.pad_stride)
        if projection is not None:
            shortcut = None if projection.y is None else ShortcutInput(projection.y, projection.state)
        z = one_pass.centred(h.y, last)
        out, mask = self.launch.one_pass_tail(
            z, h.state, self._products[end - 1], shortcut, joined, self._products.get(end), with_mask
        )
        return out, mask
