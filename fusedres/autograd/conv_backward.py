"""The backward passes of a residual block with convolutions of this package's own.

A gradient dy behind a BatchNorm is formed where it is loaded, or written once (`Gradient.stored`) for a 3x3
convolution, whose two products would otherwise form it nine times an element. dgrad masks its result with the previous
layer's ReLU, recomputed from that layer's raw output, and takes that BatchNorm's two sums where it stores it; the first
dgrad adds the shortcut's gradient there instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.conv_forward import Raw, pixel_rows
from fusedres.autograd.convolution import convolution_backward
from fusedres.autograd.forward import in_dtype
from fusedres.autograd.plan import UNIT_PARAMS, BlockPlan, Branch, ConvBN, Saved
from fusedres.ops.launch import Launches, launches


class Gradient(NamedTuple):
    """dy of a convolution's output: grad itself, or formed from the gradient behind its BatchNorm."""

    grad: Tensor
    gate: Tensor | None = None
    y: Tensor | None = None
    coefficients: Tensor | None = None

    def stored(self, launch: Launches) -> Gradient:
        """dy written out."""
        if self.y is None:
            return self
        return Gradient(launch.bn_backward_apply(self.grad, self.gate, self.y, self.coefficients, None, None)[0])


class ShortcutGradient(NamedTuple):
    """What the shortcut sends to x: grad where the gate is open, to every stride-th pixel."""

    grad: Tensor
    gate: Tensor | None
    stride: int


class ConvBackward:
    """One backward of a block: the gradients of x and of conv weight, BN weight, BN bias of every unit.

    Index 0 of `needs` and of the result is x, then UNIT_PARAMS a unit; what is not needed stays None.
    """

    def __init__(
        self,
        grad_out: Tensor,
        x: Tensor,
        plan: BlockPlan,
        params: tuple[Tensor | None, ...],
        saved: Saved,
        needs: list[bool],
    ) -> None:
        channels_last = torch.channels_last
        self.grad_out = grad_out.contiguous(memory_format=channels_last)
        self.x_dtype = x.dtype
        self.entry = in_dtype(x.contiguous(memory_format=channels_last), plan.dtype)
        self.plan, self.params, self.saved, self.needs = plan, params, saved, needs
        self.launch = launches(plan.backend)
        self.grads: list[Tensor | None] = [None] * len(needs)
        self._partials: dict[int, Tensor] = {}  # of weight gradients, by unit

    def run(self) -> list[Tensor | None]:
        """The gradients, in the order of `needs`."""
        gradient, of_projection = self._tail()
        shortcut = self._shortcut(of_projection)
        del of_projection
        last = len(self.plan.units) - 1
        for index in range(last - 1 if self.plan.one_pass[0] else last, -1, -1):
            if gradient is None:
                break
            if index > 0 and not self._needs_first(index):
                self._weight_gradient(index, gradient, self._input(index))
                break
            if index == 0:
                self.grads[0] = self._first(gradient, shortcut)
            else:
                gradient = self._through(index, gradient)
        self._finalize_weights()
        return self.grads

    def _needs_first(self, units: int) -> bool:
        """Whether the gradient of x, or of a parameter of the branch's first `units` units, is asked for."""
        return any(self.needs[: 1 + UNIT_PARAMS * units])

    def _input(self, index: int) -> Raw:
        """What a unit of the branch reads."""
        return Raw(self.entry, None) if index == 0 else Raw(self.saved.ys[index - 1], self.saved.states[index - 1])

    def _weight(self, index: int) -> Tensor:
        weight = self.saved.weights[index]
        if weight is None:
            weight = self.params[UNIT_PARAMS * index]
        assert weight is not None
        return weight

    def _set_norm_grads(self, index: int, sum_d: Tensor, sum_product: Tensor, copy: bool = False) -> None:
        """Puts both gradients in their place; copy: sum_d goes to another unit too, and none share memory."""
        slot = UNIT_PARAMS * index
        for offset, value in ((2, sum_product), (3, sum_d)):
            parameter = self.params[slot + offset - 1]
            if self.needs[slot + offset] and parameter is not None:
                if copy and offset == 3:
                    value = value.to(parameter.dtype, copy=True)
                self.grads[slot + offset] = in_dtype(value, parameter.dtype)

    # --- the tail ----------------------------------------------------------------------------------------------------

    def _tail(self) -> tuple[Gradient | None, Gradient | Tensor | None]:
        """Gradients behind the last ReLU: of the last unit (the one before where that is one-pass), of the projection.

        The projection's is that of its convolution's output, or that of x on its pixels where it is one-pass. A
        one-pass unit's is None where it leads to nothing that is asked for.
        """
        plan, saved = self.plan, self.saved
        if not any(plan.one_pass):
            return self._ordinary_tail()
        last = len(plan.units) - 1
        joined = saved.projection if plan.one_pass[1] else None
        gradient: Gradient | None = None
        of_projection: Gradient | Tensor | None = None
        if plan.one_pass[0]:
            h = self._input(last)
            cross, x_cross, sum_d = self._reduce(h, 1, saved.last, joined)
            found = self._one_pass(last, h, 1, cross, sum_d, saved.last)
            if found is not None:
                gradient = self._behind_norm(last - 1, *found)
            if joined is not None:
                found = self._one_pass(last + 1, Raw(self.entry, None), self._x_stride(), x_cross, sum_d, joined)
                of_projection = None if found is None else found[0]
            elif saved.projection is not None:
                of_projection = self._ordinary(last + 1, saved.projection)
        else:
            assert joined is not None
            x = Raw(self.entry, None)
            cross, _, sum_d = self._reduce(x, self._x_stride(), joined, None)
            found = self._one_pass(last + 1, x, self._x_stride(), cross, sum_d, joined)
            of_projection = None if found is None else found[0]
            gradient = self._ordinary(last, saved.last).stored(self.launch)
        return gradient, of_projection

    def _ordinary_tail(self) -> tuple[Gradient, Gradient | None]:
        last, projection, plan = self.saved.last, self.saved.projection, self.plan
        index = len(plan.units) - 1
        assert last.y is not None
        if projection is None:
            gradient = self._ordinary(index, last)
            return gradient.stored(self.launch), None
        assert plan.projection is not None
        branches = (last.y, last.state, projection.y, projection.state)
        partials = self.launch.bn_backward_reduce(self.grad_out, self.saved.mask, *branches)
        sums, coefficients, of_projection = self.launch.bn_backward_coefficients(
            partials,
            pixel_rows(last.y, 1),
            last.state,
            plan.units[-1].batch_statistics,
            projection.state,
            plan.projection.batch_statistics,
        )
        self._set_norm_grads(index, sums[0], sums[1])
        self._set_norm_grads(index + 1, sums[0], sums[2], copy=True)
        dy, dy_projection = self.launch.bn_backward_apply(
            self.grad_out, self.saved.mask, last.y, coefficients, projection.y, of_projection
        )
        return Gradient(dy), Gradient(dy_projection)

    def _ordinary(self, index: int, branch: Branch) -> Gradient:
        """The gradient of one branch's last convolution, whatever the other branch is."""
        assert branch.y is not None
        partials = self.launch.bn_backward_reduce(self.grad_out, self.saved.mask, branch.y, branch.state, None, None)
        coefficients = self._coefficients(index, partials, branch.y, branch.state)
        return Gradient(self.grad_out, self.saved.mask, branch.y, coefficients)

    def _coefficients(self, index: int, partials: Tensor, y: Tensor, state: Tensor) -> Tensor:
        sums, coefficients, _ = self.launch.bn_backward_coefficients(
            partials, pixel_rows(y, 1), state, self.plan.all_units[index].batch_statistics, None, False
        )
        self._set_norm_grads(index, sums[0], sums[1])
        result: Tensor = coefficients
        return result

    def _behind_norm(self, index: int, d: Tensor, partials: Tensor) -> Gradient:
        """The gradient of an inner convolution, from the masked one behind its BatchNorm and that one's sums."""
        y, state = self.saved.ys[index], self.saved.states[index]
        gradient = Gradient(d, None, y, self._coefficients(index, partials, y, state))
        return gradient if self._on_load(index) else gradient.stored(self.launch)

    def _on_load(self, index: int) -> bool:
        """Whether both products form dy on load: a 1x1 convolution whose input is there as it is."""
        unit = self.plan.units[index]
        return index == 0 and unit.pixelwise and unit.own.dgrad and unit.own.wgrad

    # --- one-pass units ----------------------------------------------------------------------------------------------

    def _x_stride(self) -> int:
        assert self.plan.projection is not None
        return self.plan.projection.stride[0]

    def _reduce(self, h: Raw, stride: int, branch: Branch, joined: Branch | None) -> tuple[Tensor, Tensor, Tensor]:
        assert branch.one_pass is not None
        extra: tuple[Tensor | None, Tensor | None, int] = (None, None, 1)
        if joined is not None:
            assert joined.one_pass is not None
            extra = (self.entry, joined.one_pass.pivot, self._x_stride())
        cross, x_cross, sum_d = self.launch.one_pass_reduce(
            self.grad_out, self.saved.mask, h.y, h.state, branch.one_pass.pivot, stride, *extra
        )
        return cross, x_cross, sum_d

    def _one_pass(
        self, index: int, h: Raw, stride: int, cross: Tensor, sum_d: Tensor, branch: Branch
    ) -> tuple[Tensor, Tensor] | None:
        """The gradient of a one-pass unit's input, masked with its ReLU where it has one, and the sums behind that.

        None where that gradient is not asked for.
        """
        one, weight = branch.one_pass, self.params[UNIT_PARAMS * index]
        assert one is not None
        grad_conv, grad_norm, quadratic, constant = self.launch.one_pass_products(
            cross,
            sum_d,
            weight,
            one.folded,
            branch.state,
            one.projected,
            one.total,
            pixel_rows(h.y, stride),
            self.plan.dtype,
        )
        if self.needs[1 + UNIT_PARAMS * index]:
            self.grads[1 + UNIT_PARAMS * index] = grad_conv
        both = all(self.plan.one_pass)  # one sum is the gradient of the last unit's and the projection's bias
        self._set_norm_grads(index, sum_d, grad_norm, copy=both and index == len(self.plan.units))
        if not self._needs_first(0 if index == len(self.plan.units) else index):
            return None
        masked = h.state is not None
        dz, partials = self.launch.one_pass_dgrad(
            self.grad_out, self.saved.mask, h.y, h.state, one.pivot, one.folded, quadratic, constant, stride, masked
        )
        return dz, partials

    # --- convolutions ------------------------------------------------------------------------------------------------

    def _geometry(self, unit: ConvBN) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return unit.stride, unit.padding, unit.dilation

    def _through(self, index: int, gradient: Gradient) -> Gradient:
        """Both products of an inner convolution, and the ReLU and BatchNorm before it."""
        unit, h = self.plan.units[index], self._input(index)
        if not unit.own.dgrad:
            dz = self._weight_gradient(index, gradient, h, with_input=True)
            assert dz is not None and h.state is not None
            sums = self.launch.bn_relu_backward_(
                dz, h.y, h.state, True, self.plan.units[index - 1].batch_statistics, True
            )
            self._set_norm_grads(index - 1, sums[0], sums[1])
            return Gradient(dz)
        self._weight_gradient(index, gradient, h)
        d, partials = self.launch.conv_dgrad(
            *gradient, self._weight(index), list(h.y.shape), *self._geometry(unit), h.y, h.state, None, None, 1
        )
        return self._behind_norm(index - 1, d, partials)

    def _first(self, gradient: Gradient, shortcut: ShortcutGradient | None) -> Tensor | None:
        """Both products of the first convolution, and the shortcut's gradient."""
        unit, h = self.plan.units[0], self._input(0)
        if not self.needs[0]:
            self._weight_gradient(0, gradient, h)
            return None
        assert shortcut is not None
        if unit.own.dgrad and self.x_dtype is self.plan.dtype:
            self._weight_gradient(0, gradient, h)
            grad_x: Tensor = self.launch.conv_dgrad(
                *gradient, self._weight(0), list(h.y.shape), *self._geometry(unit), None, None, *shortcut
            )[0]
            return grad_x
        if unit.own.dgrad:  # under autocast x is wider: both terms are added in its dtype
            self._weight_gradient(0, gradient, h)
            grad = self.launch.conv_dgrad(
                *gradient, self._weight(0), list(h.y.shape), *self._geometry(unit), None, None, None, None, 1
            )[0]
        else:
            grad = self._weight_gradient(0, gradient, h, with_input=True)
        grad = in_dtype(grad, self.x_dtype)
        self.launch.shortcut_grad_(grad, in_dtype(shortcut.grad, self.x_dtype), shortcut.gate, shortcut.stride)
        return grad

    def _weight_gradient(self, index: int, gradient: Gradient, h: Raw, with_input: bool = False) -> Tensor | None:
        """Puts the weight's gradient in its place; with_input: also the library's gradient of the input."""
        unit = self.plan.all_units[index]
        slot = 1 + UNIT_PARAMS * index
        wanted = self.needs[slot]
        if wanted and unit.own.wgrad:
            kernel = list(self._weight(index).shape[2:])
            self._partials[index] = self.launch.conv_wgrad(*gradient, *h, kernel, *self._geometry(unit))
            wanted = False
        if not (wanted or with_input):
            return None
        z = h.y if h.state is None or not wanted else self.launch.bn_relu(h.y, h.state, None, 1)
        parameter = self.params[UNIT_PARAMS * index]
        assert parameter is not None
        dy = gradient.stored(self.launch).grad
        grad_h, grad_weight = convolution_backward(dy, z, self._weight(index), unit, (with_input, wanted))
        if grad_weight is not None:
            self.grads[slot] = in_dtype(grad_weight, parameter.dtype)
        return grad_h

    def _shortcut(self, of_projection: Gradient | Tensor | None) -> ShortcutGradient | None:
        """What the shortcut sends to x; a projection's weight gradient goes to its place."""
        unit = self.plan.projection
        if unit is None:
            return ShortcutGradient(self.grad_out, self.saved.mask, self.plan.pad_stride)
        if of_projection is None:
            return None
        if isinstance(of_projection, Tensor):
            return ShortcutGradient(of_projection, None, unit.stride[0])
        index, h = len(self.plan.units), Raw(self.entry, None)
        if not self.needs[0]:
            self._weight_gradient(index, of_projection, h)
            return None
        if not (unit.own.dgrad and unit.pixelwise):
            grad = self._weight_gradient(index, of_projection.stored(self.launch), h, with_input=True)
            assert grad is not None
            return ShortcutGradient(grad, None, 1)
        self._weight_gradient(index, of_projection, h)
        n, _, height, width = of_projection.grad.shape
        size = [n, self.entry.shape[1], height, width]  # the pixels that it read
        dense = ((1, 1), (0, 0), (1, 1))
        grad = self.launch.conv_dgrad(*of_projection, self._weight(index), size, *dense, None, None, None, None, 1)[0]
        return ShortcutGradient(grad, None, unit.stride[0])

    def _finalize_weights(self) -> None:
        if not self._partials:
            return
        indices = list(self._partials)
        weights = [self.params[UNIT_PARAMS * index] for index in indices]
        found = self.launch.conv_wgrad_finalize([self._partials[index] for index in indices], weights)
        for index, grad in zip(indices, found, strict=True):
            self.grads[1 + UNIT_PARAMS * index] = grad
