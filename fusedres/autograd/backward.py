"""The backward passes of a residual block, for own and for the library's convolutions.

With d = dL/dout where NOT (out <= 0), else 0: dL/dx = S'(x)ᵀd + F'(x)ᵀd. The shortcut's term is added to the branch's
own gradient last, straight from grad_out and the mask: by the first convolution's dgrad where that is this package's
own, else in place.

The gradient dy of a convolution's output is formed where this package's own products load it, or written once
(`stored`). It is written for the library, and for a 3x3 convolution: its two products would otherwise form it nine
times for each element. An own dgrad masks its result with the previous layer's ReLU, recomputed from that layer's raw
output, and takes the two sums of that layer's BatchNorm where it stores the result. After a dgrad of the library's, one
more pass does both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.autograd import one_pass
from fusedres.autograd.convolution import convolution_backward
from fusedres.autograd.plan import UNIT_PARAMS, BlockPlan, Branch, Inputs, Saved
from fusedres.ops.launch import Launches, launches
from fusedres.values import (
    DENSE,
    BnBranch,
    Centred,
    Gated,
    Gradient,
    NormState,
    Raw,
    ShortcutGradient,
    in_dtype,
    pixel_rows,
)


def stored(gradient: Gradient, launch: Launches) -> Gradient:
    """Return the gradient with dy written out."""
    return gradient if gradient.y is None else Gradient(launch.bn_backward_apply(gradient)[0])


class Backward:
    """One backward of a block: the gradients of x, of conv weight, BN weight, BN bias of every unit, and of the other.

    Index 0 of `needs` and of the result is x, then UNIT_PARAMS for each unit, then the shortcut's other input; what is
    not needed stays None. If `donated`, the raw outputs of the last unit and of the projection may be overwritten with
    their gradients.
    """

    def __init__(
        self,
        grad_out: Tensor,
        inputs: Inputs,
        plan: BlockPlan,
        params: tuple[Tensor | None, ...],
        saved: Saved,
        needs: list[bool],
        donated: bool,
    ) -> None:
        self.gated = Gated(grad_out.contiguous(memory_format=torch.channels_last), saved.mask)
        self.inputs = inputs
        self.entry = in_dtype(inputs.x.contiguous(memory_format=torch.channels_last), plan.dtype)
        self.shortcut_entry = self.entry
        if inputs.other is not None:
            self.shortcut_entry = in_dtype(inputs.other.contiguous(memory_format=torch.channels_last), plan.dtype)
        self.plan, self.params, self.saved, self.needs, self.donated = plan, params, saved, needs, donated
        self.launch = launches(plan.backend)
        self.grads: list[Tensor | None] = [None] * len(needs)
        self._partials: dict[int, Tensor] = {}  # of weight gradients, by unit

    def run(self) -> list[Tensor | None]:
        """Return the gradients, in the order of `needs`."""
        last = len(self.plan.units) - 1
        gradient, shortcut = self._ends()
        for index in range(last - 1 if self.plan.one_pass[0] else last, -1, -1):
            if gradient is None:
                break
            if index == 0:
                self.grads[0] = self._first(gradient, shortcut)
            elif self._needs_first(index):
                gradient = self._through(index, gradient)
            else:
                self._convolution(index, gradient, self._input(index))
                break
        self._finalize_weights()
        return self.grads

    def _ends(self) -> tuple[Gradient | None, ShortcutGradient | None]:
        """Return the gradient before the branch's last ReLU, see _tail, and what the shortcut adds to that of x."""
        if self.plan.reads == "none":
            grad = self.gated.grad.clone(memory_format=torch.channels_last)
            return self._through_norm(len(self.plan.units) - 1, in_dtype(grad, self.plan.dtype)), None
        gradient, of_projection = self._tail()
        shortcut = self._shortcut(of_projection)
        if self.plan.reads == "other":
            if self.needs[-1]:
                assert shortcut is not None
                self.grads[-1] = self._of_other(shortcut)
            return gradient, None
        return gradient, shortcut

    def _of_other(self, shortcut: ShortcutGradient) -> Tensor:
        """Return the gradient of the shortcut's own input."""
        grad, gate, stride = shortcut
        if gate is not None or stride != 1:
            grad = torch.zeros_like(self.shortcut_entry)
            self.launch.shortcut_grad_(grad, shortcut)
        return grad

    def _needs_first(self, units: int) -> bool:
        """Return whether the gradient of x, or of a parameter of the branch's first units, is needed."""
        return any(self.needs[: 1 + UNIT_PARAMS * units])

    def _needs_shortcut(self) -> bool:
        """Return whether the gradient of what the shortcut reads is needed."""
        return self.needs[-1 if self.plan.reads == "other" else 0]

    def _needs_sums(self, index: int) -> bool:
        return self.needs[2 + UNIT_PARAMS * index] or self.needs[3 + UNIT_PARAMS * index]

    def _input(self, index: int) -> Raw:
        """Return what a unit of the branch reads."""
        return Raw(self.entry, None) if index == 0 else Raw(self.saved.ys[index - 1], self.saved.states[index - 1])

    def _bn_branch(self, index: int) -> BnBranch:
        """Return the raw output of an ordinary unit, as its BatchNorm reads it."""
        last, saved = len(self.plan.units) - 1, self.saved
        if index < last:
            y, state = saved.ys[index], saved.states[index]
        else:
            end = saved.last if index == last else saved.projection
            assert end is not None and end.y is not None
            y, state = end.y, end.state
        return BnBranch(y, state, self.plan.all_units[index].batch_statistics)

    def _weight(self, index: int) -> Tensor:
        weight = self.saved.weights[index] if self.saved.weights else None
        if weight is None:
            weight = self.params[UNIT_PARAMS * index]
        assert weight is not None
        return weight

    def _set_norm_grads(self, index: int, sum_d: Tensor, sum_product: Tensor, copy: bool = False) -> None:
        """Put both gradients in their place; copy: sum_d, as it is another unit's gradient too."""
        slot = UNIT_PARAMS * index
        for offset, value in ((2, sum_product), (3, sum_d)):
            parameter = self.params[slot + offset - 1]
            if self.needs[slot + offset] and parameter is not None:
                if copy and offset == 3:
                    value = value.to(parameter.dtype, copy=True)
                self.grads[slot + offset] = in_dtype(value, parameter.dtype)

    # --- the tail ----------------------------------------------------------------------------------------------------

    def _tail(self) -> tuple[Gradient | None, Gradient | Tensor | None]:
        """Return the gradients before the last ReLU: of the branch, and of the projection.

        Of the branch it is the gradient of the last unit's convolution, or of the unit's before if the last is
        one-pass. Of the projection it is that of its convolution's output, or of x at the pixels that it reads if it is
        one-pass. A one-pass unit's is None if nothing that is needed depends on it.
        """
        if not any(self.plan.one_pass):
            return self._ordinary_tail()
        return self._product_tail() if self.plan.own_convolutions else self._stored_tail()

    def _ordinary_tail(self) -> tuple[Gradient, Gradient | None]:
        index = len(self.plan.units) - 1
        x = self._bn_branch(index)
        shortcut = None if self.plan.projection is None else self._bn_branch(index + 1)
        with_sums = self._needs_sums(index) or (shortcut is not None and self._needs_sums(index + 1))
        if self.donated:
            sums = self.launch.bn_add_relu_backward_(self.gated, x, shortcut, with_sums)
            dy, dy_projection = x.x, None if shortcut is None else shortcut.x
        else:
            dy, dy_projection, sums = self.launch.bn_add_relu_backward(self.gated, x, shortcut, with_sums)
        self._set_norm_grads(index, sums[0], sums[1])
        if shortcut is None:
            return Gradient(dy), None
        assert dy_projection is not None
        self._set_norm_grads(index + 1, sums[0], sums[2], copy=True)
        return Gradient(dy), Gradient(dy_projection)

    def _stored_tail(self) -> tuple[Gradient | None, Gradient | Tensor | None]:
        """Do the same with one-pass units that the library convolves."""
        plan, last = self.plan, len(self.plan.units) - 1
        d, sum_d = self.launch.relu_backward(self.gated)
        gradient: Gradient | None = None
        of_projection: Gradient | Tensor | None = None
        if plan.one_pass[0]:
            grad_h = self._stored_one_pass(last, d, sum_d)
            gradient = None if grad_h is None else self._through_norm(last - 1, grad_h)
        if plan.one_pass[1]:
            of_projection = self._stored_one_pass(last + 1, d, sum_d)
        # An ordinary branch turns d into its own gradient in place, last, when nothing else reads d.
        if not plan.one_pass[0]:
            gradient = self._through_norm(last, d, relu=False)
        elif plan.projection is not None and not plan.one_pass[1]:
            of_projection = self._through_norm(last + 1, d, relu=False)
        return gradient, of_projection

    def _stored_one_pass(self, index: int, d: Tensor, sum_d: Tensor) -> Tensor | None:
        """Return the gradient of a one-pass unit's input, after its ReLU, if something that is needed depends on it."""
        slot, of_branch = 1 + UNIT_PARAMS * index, index < len(self.plan.units)
        needs_input = self._needs_first(index) if of_branch else self._needs_shortcut()
        if not (needs_input or self.needs[slot] or self._needs_sums(index)):
            return None
        h = self._input(index) if of_branch else Raw(self.shortcut_entry, None)
        branch = self.saved.last if of_branch else self.saved.projection
        assert branch is not None
        grad_h, grad_conv, grad_norm = self._one_pass_gradients(index, d, sum_d, h, branch, needs_input)
        self._set_norm_grads(index, sum_d, grad_norm, copy=True)
        if self.needs[slot]:
            self.grads[slot] = grad_conv
        return grad_h

    def _one_pass_gradients(
        self, index: int, d: Tensor, sum_d: Tensor, h: Raw, branch: Branch, needs_input: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        stride = self.plan.all_units[index].stride[0]
        return one_pass.backward_stored(d, sum_d, h, self._weight(index), branch, stride, needs_input, self.launch)

    def _product_tail(self) -> tuple[Gradient | None, Gradient | Tensor | None]:
        """Do the same with one-pass units, if the tail was one product."""
        plan, saved, last = self.plan, self.saved, len(self.plan.units) - 1
        x = None
        if plan.one_pass[1]:
            assert plan.projection is not None and saved.projection is not None
            x = one_pass.centred(self.shortcut_entry, saved.projection, plan.projection.stride[0])
        if not plan.one_pass[0]:
            assert x is not None
            cross, _, sum_d = self.launch.one_pass_reduce(self.gated, x, None)
            found = self._product(last + 1, x, None, (cross, sum_d))
            return stored(self._on_load(last), self.launch), None if found is None else found[0]
        h = self._input(last)
        z = one_pass.centred(h.y, saved.last)
        cross, x_cross, sum_d = self.launch.one_pass_reduce(self.gated, z, h.state, x)
        found = self._product(last, z, h.state, (cross, sum_d))
        gradient = None if found is None else self._after_norm(last - 1, *found)
        if x is not None:
            found = self._product(last + 1, x, None, (x_cross, sum_d))
            return gradient, None if found is None else found[0]
        return gradient, None if plan.projection is None else self._on_load(last + 1)

    def _product(
        self, index: int, z: Centred, z_state: Tensor | None, sums: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Return the gradient of a one-pass unit's input, before its ReLU, and its sums; None if it is not needed."""
        slot, of_branch = 1 + UNIT_PARAMS * index, index < len(self.plan.units)
        weight, branch = self.params[slot - 1], self.saved.last if of_branch else self.saved.projection
        assert weight is not None and branch is not None
        needs_input = self._needs_first(index) if of_branch else self._needs_shortcut()
        found, grad_conv, grad_norm = one_pass.backward_product(
            self.gated, z, z_state, sums, weight, branch, needs_input, self.launch
        )
        both = all(self.plan.one_pass)  # one sum is the gradient of the last unit's and of the projection's bias
        self._set_norm_grads(index, sums[1], grad_norm, copy=both and not of_branch)
        if self.needs[slot]:
            self.grads[slot] = grad_conv
        return found

    # --- BatchNorm and ReLU ------------------------------------------------------------------------------------------

    def _on_load(self, index: int) -> Gradient:
        """Return the gradient of an ordinary last convolution, or projection, beside a one-pass unit."""
        branch = self._bn_branch(index)
        partials = self.launch.bn_backward_reduce(self.gated, Raw(branch.x, branch.state))
        return Gradient(*self.gated, branch.x, self._coefficients(index, branch, partials))

    def _coefficients(self, index: int, branch: BnBranch, partials: Tensor) -> Tensor:
        sums, coefficients, _ = self.launch.bn_backward_coefficients(
            partials, pixel_rows(branch.x), NormState(branch.state, branch.batch_statistics)
        )
        self._set_norm_grads(index, sums[0], sums[1])
        result: Tensor = coefficients
        return result

    def _after_norm(self, index: int, d: Tensor, partials: Tensor) -> Gradient:
        """Turn the gradient of an inner BatchNorm's output, and its sums, into that of the convolution's output."""
        branch, unit = self._bn_branch(index), self.plan.units[index]
        gradient = Gradient(d, None, branch.x, self._coefficients(index, branch, partials))
        # A 1x1 convolution that reads the block's input has two products that can form dy on load.
        on_load = index == 0 and unit.pixelwise and unit.own.dgrad and unit.own.wgrad
        return gradient if on_load else stored(gradient, self.launch)

    def _through_norm(self, index: int, grad: Tensor, relu: bool = True) -> Gradient:
        """Turn the gradient after BatchNorm and ReLU into that of the convolution's output, in place."""
        sums = self.launch.bn_relu_backward_(grad, self._bn_branch(index), relu, self._needs_sums(index))
        self._set_norm_grads(index, sums[0], sums[1])
        return Gradient(grad)

    # --- convolutions ------------------------------------------------------------------------------------------------

    def _through(self, index: int, gradient: Gradient) -> Gradient:
        """Run both products of an inner convolution, and the ReLU and BatchNorm before it."""
        unit, h = self.plan.units[index], self._input(index)
        if not unit.own.dgrad:
            grad_h = self._convolution(index, gradient, h, with_input=True)
            assert grad_h is not None
            return self._through_norm(index - 1, grad_h)
        self._convolution(index, gradient, h)
        d, partials = self.launch.conv_dgrad(gradient, self._weight(index), list(h.y.shape), unit.geometry, h)
        return self._after_norm(index - 1, d, partials)

    def _first(self, gradient: Gradient, shortcut: ShortcutGradient | None) -> Tensor | None:
        """Return the gradient of x: that of the first convolution plus the shortcut's.

        Under autocast x may be wider than the plan's dtype. The terms of an identity are then added in x's dtype, as in
        eager. A projection's gradient has been rounded already: autograd casts the sum, after the terms are freed.
        """
        unit, h = self.plan.units[0], self._input(0)
        if not self.needs[0]:
            self._convolution(0, gradient, h)
            return None
        x_dtype = self.inputs.x.dtype
        in_x_dtype = shortcut is not None and x_dtype is not self.plan.dtype and self.plan.projection is None
        grad: Tensor | None
        if unit.own.dgrad:
            self._convolution(0, gradient, h)
            size, in_product = list(h.y.shape), None if in_x_dtype else shortcut
            grad, _ = self.launch.conv_dgrad(gradient, self._weight(0), size, unit.geometry, None, in_product)
            if not in_x_dtype:
                return grad
        else:
            grad = self._convolution(0, gradient, h, with_input=True)
        if shortcut is None:
            return grad
        assert grad is not None
        if in_x_dtype:
            grad = in_dtype(grad, x_dtype)
            shortcut = shortcut._replace(grad=in_dtype(shortcut.grad, x_dtype))
        self.launch.shortcut_grad_(grad, shortcut)
        return grad

    def _convolution(self, index: int, gradient: Gradient, h: Raw, with_input: bool = False) -> Tensor | None:
        """Put the weight's gradient in its place; with_input: also return the gradient of the input."""
        unit, slot = self.plan.all_units[index], 1 + UNIT_PARAMS * index
        wanted = self.needs[slot]
        if wanted and unit.own.wgrad:
            kernel = list(self._weight(index).shape[2:])
            self._partials[index] = self.launch.conv_wgrad(gradient, h, kernel, unit.geometry)
            wanted = False
        if not (wanted or with_input):
            return None
        dy = stored(gradient, self.launch).grad
        grad_h, grad_weight = convolution_backward(
            dy,
            h,
            self._weight(index),
            unit,
            (with_input, wanted),
            self.plan.backend,
            subsampled=unit.subsamples and index == len(self.plan.units),
        )
        parameter = self.params[slot - 1]
        if grad_weight is not None and parameter is not None:
            self.grads[slot] = in_dtype(grad_weight, parameter.dtype)
        return grad_h

    def _shortcut(self, of_projection: Gradient | Tensor | None) -> ShortcutGradient | None:
        """Return what the shortcut adds to the gradient of x; put a projection's weight gradient in its place."""
        unit = self.plan.projection
        if unit is None:
            return ShortcutGradient(*self.gated, self.plan.pad_stride)
        if of_projection is None:
            return None
        if isinstance(of_projection, Tensor):
            return ShortcutGradient(of_projection, None, unit.stride[0])
        index, x = len(self.plan.units), Raw(self.shortcut_entry, None)
        if not self._needs_shortcut():
            self._convolution(index, of_projection, x)
            return None
        if unit.own.dgrad and unit.pixelwise:
            self._convolution(index, of_projection, x)
            n, _, height, width = of_projection.grad.shape
            size = [n, self.shortcut_entry.shape[1], height, width]  # the pixels that it reads
            grad = self.launch.conv_dgrad(of_projection, self._weight(index), size, DENSE)[0]
            return ShortcutGradient(grad, None, unit.stride[0])
        of_input = self._convolution(index, stored(of_projection, self.launch), x, with_input=True)
        assert of_input is not None
        return ShortcutGradient(of_input, None, unit.stride[0] if unit.subsamples else 1)

    def _finalize_weights(self) -> None:
        if not self._partials:
            return
        indices = list(self._partials)
        weights = [self.params[UNIT_PARAMS * index] for index in indices]
        found = self.launch.conv_wgrad_finalize([self._partials[index] for index in indices], weights)
        for index, grad in zip(indices, found, strict=True):
            self.grads[1 + UNIT_PARAMS * index] = grad
