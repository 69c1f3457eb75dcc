"""The backward passes of a residual block, in the order that keeps the fewest tensors alive.

With d = dL/dout where NOT (out <= 0), else 0: dL/dx = S'(x)ᵀd + F'(x)ᵀd. The shortcut's term is added into the branch's
own gradient last, straight from grad_out and the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.autograd.convolution import convolution_backward
from fusedres.autograd.forward import in_dtype
from fusedres.autograd.plan import UNIT_PARAMS, BlockPlan, ConvBN, OnePass, Saved
from fusedres.ops.launch import launches


class Backward:
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
        donated: bool,
    ) -> None:
        if not grad_out.is_contiguous(memory_format=torch.channels_last):
            grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        self.grad_out = grad_out
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        self.x_dtype = x.dtype
        self.entry = in_dtype(x, plan.dtype)
        self.plan, self.params, self.saved, self.needs = plan, params, saved, needs
        self.launch = launches(plan.backend)
        self.donated = donated  # the saved outputs may be overwritten with their gradients
        self.grads: list[Tensor | None] = [None] * len(needs)

    def run(self) -> list[Tensor | None]:
        """The gradients, in the order of `needs`."""
        plan, saved = self.plan, self.saved
        grad, grad_projection = self._tail()
        shortcut = self._projection_convolution(grad_projection)
        del grad_projection
        last = len(plan.units) - 1
        # Where the last unit was one-pass, grad is already that of its input.
        for index in range(last - 1 if saved.last.one_pass else last, -1, -1):
            if grad is None or not self._needs_first(index + 1):
                return self.grads
            unit = plan.units[index]
            if index < last:
                sums = self.launch.bn_relu_backward_(
                    grad, saved.ys[index], saved.states[index], True, unit.batch_statistics, self._needs_sums(index)
                )
                self._set_norm_grads(index, sums)
            if index > 0:
                h = self.launch.bn_relu(saved.ys[index - 1], saved.states[index - 1], None, 1)
            else:
                h = self.entry
            grad = self._convolution(index, unit, grad, h, self._needs_first(index))
            del h
        if grad is None:
            return self.grads
        if plan.projection is None:
            grad = in_dtype(grad, self.x_dtype)  # under autocast x may be wider: both terms are added in its dtype
            grad_out = in_dtype(self.grad_out, self.x_dtype)
            self.launch.shortcut_grad_(grad, grad_out, saved.mask, plan.pad_stride)
        elif shortcut is not None:
            self.launch.shortcut_grad_(grad, shortcut[0], None, shortcut[1])
        self.grads[0] = grad
        return self.grads

    def _weight(self, index: int) -> Tensor:
        weight = self.params[UNIT_PARAMS * index]
        assert weight is not None
        return weight

    def _needs_first(self, units: int) -> bool:
        """Whether the gradient of x, or of a parameter of the branch's first `units` units, is asked for."""
        return any(self.needs[: 1 + UNIT_PARAMS * units])

    def _needs_sums(self, index: int) -> bool:
        return self.needs[2 + UNIT_PARAMS * index] or self.needs[3 + UNIT_PARAMS * index]

    def _set_norm_grads(self, index: int, sums: Tensor | Sequence[Tensor]) -> None:
        """From Σd and Σd·x̂."""
        slot = UNIT_PARAMS * index
        if self.needs[slot + 2]:
            self.grads[slot + 2] = in_dtype(sums[1], self.params[slot + 1].dtype)  # type: ignore[union-attr]
        if self.needs[slot + 3]:
            self.grads[slot + 3] = in_dtype(sums[0], self.params[slot + 2].dtype)  # type: ignore[union-attr]

    def _convolution(
        self, index: int, unit: ConvBN, grad: Tensor, h: Tensor, need_h: bool, subsampled: bool = False
    ) -> Tensor | None:
        """The gradient of h where needed; the weight's goes to its slot."""
        slot = 1 + UNIT_PARAMS * index
        grad_h, self.grads[slot] = convolution_backward(
            grad, h, self._weight(index), unit, (need_h, self.needs[slot]), subsampled=subsampled
        )
        return grad_h

    def _tail(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients behind the last ReLU: of the last unit and of the projection.

        Each is that of the convolution's output, or of the convolution's input where the unit is one-pass; then it is
        None where it leads to nothing that is asked for.
        """
        plan, saved = self.plan, self.saved
        last, projection = saved.last, saved.projection
        if last.one_pass or (projection is not None and projection.one_pass):
            return self._tail_one_pass()
        index = len(plan.units) - 1
        assert last.y is not None
        needs_sums = self._needs_sums(index) or (projection is not None and self._needs_sums(index + 1))
        y, projection_y = last.y, None if projection is None else projection.y
        arguments = (
            self.grad_out,
            saved.mask,
            y,
            last.state,
            plan.units[-1].batch_statistics,
            projection_y,
            None if projection is None else projection.state,
            plan.projection is not None and plan.projection.batch_statistics,
            needs_sums,
        )
        if self.donated:
            sums = self.launch.bn_add_relu_backward_(*arguments)
            grad, grad_projection = y, projection_y
        else:
            grad, grad_projection, sums = self.launch.bn_add_relu_backward(*arguments)
        self._set_norm_grads(index, sums)
        if projection is None:
            return grad, None
        self._set_norm_grads(index + 1, (sums[0].clone(), sums[2]))  # no two gradients share memory
        return grad, grad_projection

    def _tail_one_pass(self) -> tuple[Tensor | None, Tensor | None]:
        plan, saved = self.plan, self.saved
        index = len(plan.units) - 1
        d, sum_d = self.launch.relu_backward(self.grad_out, saved.mask)
        grad: Tensor | None = None
        grad_projection: Tensor | None = None
        source: tuple[Tensor, Tensor | None, Tensor, int]
        if saved.last.one_pass:
            source = (saved.ys[-1], saved.states[-1], saved.last.one_pass.pivot, 1)
            needed = self._needs_first(index)
            grad = self._one_pass(index, d, sum_d, source, saved.last.state, saved.last.one_pass, needed)
        if saved.projection is not None and saved.projection.one_pass and plan.projection is not None:
            source = (self.entry, None, saved.projection.one_pass.pivot, plan.projection.stride[0])
            branch = saved.projection
            needed = self._needs_first(0)
            grad_projection = self._one_pass(
                index + 1, d, sum_d, source, branch.state, saved.projection.one_pass, needed
            )
        # An ordinary branch turns d into its own gradient in place, last, when nobody else reads it.
        if not saved.last.one_pass:
            grad = self._ordinary(index, d, saved.last.y, saved.last.state, plan.units[-1])
        if saved.projection is not None and not saved.projection.one_pass and plan.projection is not None:
            branch = saved.projection
            grad_projection = self._ordinary(index + 1, d, branch.y, branch.state, plan.projection)
        return grad, grad_projection

    def _one_pass(
        self,
        index: int,
        d: Tensor,
        sum_d: Tensor,
        source: tuple[Tensor, Tensor | None, Tensor, int],  # of ops.bn_relu: what to centre, state, pivot, stride
        state: Tensor,
        one_pass: OnePass,
        needs_input: bool,
    ) -> Tensor | None:
        slot = 1 + UNIT_PARAMS * index
        if not (needs_input or self.needs[slot] or self._needs_sums(index)):
            return None
        z = self.launch.bn_relu(*source)
        grad_z, grad_conv, grad_weight = self.launch.one_pass_backward(
            d, sum_d, z, self._weight(index), state, one_pass.projected, one_pass.total, needs_input
        )
        self._set_norm_grads(index, (sum_d.clone(), grad_weight))  # the other branch may hand out sum_d too
        if self.needs[slot]:
            self.grads[slot] = grad_conv
        return grad_z if needs_input else None

    def _ordinary(self, index: int, d: Tensor, y: Tensor | None, state: Tensor, unit: ConvBN) -> Tensor:
        assert y is not None
        sums = self.launch.bn_relu_backward_(d, y, state, False, unit.batch_statistics, self._needs_sums(index))
        self._set_norm_grads(index, sums)
        return d

    def _projection_convolution(self, grad: Tensor | None) -> tuple[Tensor, int] | None:
        """The gradient that the projection sends to x, with the stride of the pixels it reaches."""
        unit, branch = self.plan.projection, self.saved.projection
        if grad is None or unit is None or branch is None:
            return None
        if branch.one_pass:
            return grad, unit.stride[0]
        subsampled = unit.pixelwise and unit.stride != (1, 1)
        stride = unit.stride[0] if subsampled else 1
        h = self.launch.bn_relu(self.entry, None, None, stride) if subsampled else self.entry
        grad_h = self._convolution(len(self.plan.units), unit, grad, h, self.needs[0], subsampled)
        return None if grad_h is None else (grad_h, stride)
