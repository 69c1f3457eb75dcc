"""The backward passes of a block in which the statistics of some BatchNorm are those of several processes."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.autograd.backward import Backward
from fusedres.autograd.plan import Branch
from fusedres.autograd.synchronised import one_pass_gradients, synchronised_coefficients, through_synchronised_norm
from fusedres.values import BnBranch, BnGradient, Gradient, NormState, Raw, pixel_rows


class SynchronisedBackward(Backward):
    """Backward of a block in which some BatchNorm is synchronised."""

    def _coefficients_of(self, index: int, sums: Tensor) -> Tensor:
        branch, unit = self._bn_branch(index), self.plan.all_units[index]
        if unit.group is not None:
            return synchronised_coefficients(sums, pixel_rows(branch.x), branch.state, unit)
        _, coefficients, _ = self.launch.bn_backward_coefficients(
            sums.unsqueeze(0).contiguous(), pixel_rows(branch.x), NormState(branch.state, branch.batch_statistics)
        )
        result: Tensor = coefficients
        return result

    def _tail(self) -> tuple[Gradient | None, Gradient | Tensor | None]:
        """Return the same as Backward._tail; the last unit exchanges its sums first, then the projection."""
        one_pass, last = self.plan.one_pass, len(self.plan.units) - 1
        if not any(one_pass):
            return self._ordinary_tail()
        d, sum_d = self.launch.relu_backward(self.gated)
        grad_h: Tensor | None = None
        gradient: Gradient | None = None
        of_projection: Gradient | Tensor | None = None
        if one_pass[0]:
            grad_h = self._stored_one_pass(last, d, sum_d)
        else:
            gradient = self._through_norm(last, d.clone(memory_format=torch.channels_last), relu=False)
        if one_pass[1]:
            of_projection = self._stored_one_pass(last + 1, d, sum_d)
        elif self.plan.projection is not None:
            of_projection = self._through_norm(last + 1, d, relu=False)
        if grad_h is not None:
            gradient = self._through_norm(last - 1, grad_h)
        return gradient, of_projection

    def _ordinary_tail(self) -> tuple[Gradient, Gradient | None]:
        index = len(self.plan.units) - 1
        x, projected = self._bn_branch(index), None
        if self.plan.projection is not None:
            projected = self._bn_branch(index + 1)
        raw = None if projected is None else Raw(projected.x, projected.state)
        sums = self.launch.bn_backward_reduce(self.gated, Raw(x.x, x.state), raw).sum(0)
        self._set_norm_grads(index, sums[0], sums[1])
        coefficients, of_shortcut = self._coefficients_of(index, sums[:2]), None
        if projected is not None:
            self._set_norm_grads(index + 1, sums[0], sums[2], copy=True)
            of_shortcut = BnGradient(projected.x, self._coefficients_of(index + 1, sums[::2]))
        dy, dy_projection = self.launch.bn_backward_apply(Gradient(*self.gated, x.x, coefficients), of_shortcut)
        return Gradient(dy), None if projected is None else Gradient(dy_projection)

    def _through_norm(self, index: int, grad: Tensor, relu: bool = True) -> Gradient:
        unit, branch = self.plan.all_units[index], self._bn_branch(index)
        if unit.group is None:
            return super()._through_norm(index, grad, relu)
        constant = BnBranch(branch.x, branch.state, False)  # makes scale·d of grad
        sums = self.launch.bn_relu_backward_(grad, constant, relu, True)
        self._set_norm_grads(index, sums[0], sums[1])
        return Gradient(through_synchronised_norm(grad, sums[:2], branch.x, branch.state, unit, self.launch))

    def _one_pass_gradients(
        self, index: int, d: Tensor, sum_d: Tensor, h: Raw, branch: Branch, needs_input: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        unit, one = self.plan.all_units[index], branch.one_pass
        if unit.group is None:
            return super()._one_pass_gradients(index, d, sum_d, h, branch, needs_input)
        assert one is not None
        z = self.launch.bn_relu(h.y, h.state, one.pivot, unit.stride[0])
        return one_pass_gradients(d, sum_d, z, self._weight(index), branch.state, one, unit)
