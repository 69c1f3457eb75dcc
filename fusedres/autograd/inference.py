"""Inference: passes that keep nothing for backward. If all BatchNorms are constants, a few images run at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fusedres.autograd.folded_convolution import PanelConvolution, add_shortcut, fold_panels, uses_panels
from fusedres.autograd.forward import Forward, unit_state
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, Inputs, Tensors
from fusedres.kernels.cpu_convolution import Purpose, takes
from fusedres.ops.launch import direct, launches
from fusedres.values import Raw, ShortcutInput, in_dtype


def infer(inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> Tensor:
    """Return relu(F(x) + S(x)) if no gradient is wanted and all statistics are constants."""
    launch = launches(plan.backend)
    entry = in_dtype(inputs.x[:0], plan.dtype)
    states = [unit_state(entry, unit, tensors, i, launch) for i, unit in enumerate(plan.all_units)]
    if plan.own_convolutions:
        return _Passes(inputs, plan, tensors, states, {}).run(None)
    panels = _panels(inputs, plan, tensors, states)
    return in_parts(inputs, plan, lambda part, out: _Passes(part, plan, tensors, states, panels).run(out))


def _panels(inputs: Inputs, plan: BlockPlan, tensors: Tensors, states: list[Tensor]) -> dict[int, PanelConvolution]:
    """Return the convolutions, by their index, that are faster in this package's own kernel with BatchNorm folded in.

    The projection does as the last convolution, whose sums it is added to.
    """
    found: dict[int, PanelConvolution] = {}
    weights = [tensors[index * UNIT_TENSORS] for index in range(len(plan.all_units))]
    last, end = len(plan.units) - 1, len(plan.units)
    if plan.backend != "cpu" or not direct():
        return found

    def pack(index: int, shape: Sequence[int]) -> None:
        unit, weight = plan.all_units[index], weights[index]
        assert weight is not None
        found[index] = fold_panels(weight, states[index], unit, shape, plan.backend, Purpose.FORWARD)

    shape: Sequence[int] = inputs.x.shape
    for index, unit in enumerate(plan.units):
        weight, projected = weights[index], weights[-1]
        assert weight is not None and projected is not None
        follows = index < last or plan.projection is None or takes(projected.dtype, plan.projection.groups)
        own = uses_panels(shape, weight, unit, weight.dtype, plan.backend, Purpose.FORWARD)
        if weight.dtype is plan.dtype and follows and own:
            pack(index, shape)
        shape = unit.output_shape(shape, weight.shape)
    if plan.projection is not None and last in found:
        pack(end, inputs.shortcut.shape)
    return found


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


class _Passes:
    """The block on some images; `panels` are the convolutions that need no pass after them."""

    def __init__(
        self,
        inputs: Inputs,
        plan: BlockPlan,
        tensors: Tensors,
        states: list[Tensor],
        panels: dict[int, PanelConvolution],
    ) -> None:
        self.plan, self.states, self.panels = plan, states, panels
        self.passes = Forward(inputs, plan, tensors)

    def run(self, out: Tensor | None) -> Tensor:
        """Return the result, in out if it is given."""
        plan, passes = self.plan, self.passes
        h = passes.entry
        for index in range(len(plan.units) if plan.reads == "none" else len(plan.units) - 1):
            h = self._conv_bn_relu(h, index)
        if plan.reads == "none":
            return h if out is None else out.copy_(h)
        last = len(plan.units) - 1
        if last in self.panels:
            return self._packed_end(h, out)
        if plan.units[last].own.fprop:
            geometry, state = plan.units[last].geometry, self.states[last]
            weight = passes.weight(last)
            result: Tensor = passes.launch.conv_bn_add_relu(h, weight, geometry, state, self._shortcut())
            return result
        y = passes.convolution(Raw(h, None), last)
        del h  # before the projection takes memory
        return add_shortcut(y, self.states[last], self._shortcut(), plan.backend, out)

    def _conv_bn_relu(self, h: Tensor, index: int) -> Tensor:
        passes, unit, state = self.passes, self.plan.units[index], self.states[index]
        if index in self.panels:
            return self.panels[index](h)
        if unit.own.fprop:
            result: Tensor = passes.launch.conv_bn_add_relu(h, passes.weight(index), unit.geometry, state)
            return result
        y = passes.convolution(Raw(h, None), index)
        passes.launch.bn_relu_(y, state)
        return y

    def _packed_end(self, h: Tensor, out: Tensor | None) -> Tensor:
        """Run the last convolution as panels, and the rest."""
        plan, entry, last = self.plan, self.passes.shortcut_entry, self.panels[len(self.plan.units) - 1]
        if plan.projection is not None:
            return last(h, self.panels[len(plan.units)](entry, None, False), True, out)
        if plan.pad_stride == 1 and entry.shape[1] == last.identity.shape[1]:
            return last(h, entry, True, out)
        y = last(h, None, False)
        return add_shortcut(y, last.identity, ShortcutInput(entry, None, plan.pad_stride), plan.backend, out)

    def _shortcut(self) -> ShortcutInput:
        plan, passes = self.plan, self.passes
        if plan.projection is None:
            return ShortcutInput(passes.shortcut_entry, None, plan.pad_stride)
        raw = passes.convolution(Raw(passes.shortcut_entry, None), len(plan.units))
        return ShortcutInput(raw, self.states[-1])
