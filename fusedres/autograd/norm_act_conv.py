"""BatchNorm, activation and convolution, in the order of pre-activation networks, as one autograd Function.

    y_i = conv_i(act(BN(x)))        for one convolution, or several that read the same values

If x is also the shortcut, it is a result too (plan.carries): its gradient is then added to x's own in the same pass.
What the convolutions read may be averaged over windows of 2x2 pixels first: a 1x1 convolution commutes with that.

Saved: x, BatchNorm's (4, C) state and the weights. act(BN(x)) is computed again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.autograd.composite_tail import composite
from fusedres.autograd.convolution import convolution, convolution_backward
from fusedres.autograd.double_backward import refuse_synchronised
from fusedres.autograd.forward import unit_state
from fusedres.autograd.gated_tail import TailBackward
from fusedres.autograd.graph import materialized, needs_composite, used_gradients
from fusedres.autograd.layout import in_format, suggests_channels_last
from fusedres.autograd.memory import require_memory, statistics_kept_on_error, to_channels_last
from fusedres.autograd.plan import UNIT_PARAMS, UNIT_TENSORS, ConvBN, Tensors
from fusedres.autograd.residual_block import as_saved, count_path
from fusedres.autograd.saved import check_each
from fusedres.autograd.synchronised import through_synchronised_norm
from fusedres.autograd.tail_plan import TERM, TailPlan, TermNorm, TermTensors
from fusedres.ops.launch import launches
from fusedres.values import Activation, BnBranch, Raw, TailTerm, in_dtype


class NormActConvPlan(NamedTuple):
    """The constants of one call."""

    units: tuple[ConvBN, ...]  # of each convolution; their BatchNorm, which they share, stands before them
    kind: str | None  # of the activation; None: the convolutions read x itself
    dtype: torch.dtype  # of the convolutions: the autocast dtype, else x's
    backend: str
    channels_last: tuple[bool, ...]  # of each result, else contiguous NCHW
    carries: bool = False  # x is the last result
    pooled: bool = False  # the convolutions read the average of each 2x2 window


class NormActConvTensors(NamedTuple):
    """The tensors of one call besides x."""

    norm: Tensors  # weight, bias, running mean and variance, and counter of the BatchNorm
    weights: Sequence[Tensor]  # of the convolutions
    slope: Tensor | None  # (C,) of a leaky ReLU
    state: Tensor | None = None  # of the BatchNorm for this x, if it is known; its statistics are updated then


def run_norm_act_conv(
    x: Tensor, plan: NormActConvPlan, tensors: NormActConvTensors, recorded: bool
) -> tuple[Tensor, ...]:
    """Run the convolutions on an x that fits the plan; recorded: autograd records it, as gradients are wanted."""
    norm, weights, slope, state = tensors
    if recorded:
        found: tuple[Tensor, ...] = NormActConvFunction.apply(x, plan, slope, state, *norm, *weights)
        return found
    found = _forward(x, plan, tensors)[0]
    return (*found, x) if plan.carries else found


def _forward(x: Tensor, plan: NormActConvPlan, tensors: NormActConvTensors) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the results and the state."""
    norm, weights, slope, state = tensors
    launch, unit = launches(plan.backend), plan.units[0]
    source = to_channels_last(x)
    of_unit = (weights[0], *norm)
    require_memory(source, [t for weight in weights for t in (weight, *norm)])
    takes_statistics = plan.kind is not None and state is None
    with statistics_kept_on_error(of_unit, (unit,) if takes_statistics else ()):
        if takes_statistics:
            state = unit_state(source, unit, of_unit, 0, launch)
        h = _activated(source, state, plan, slope)
        found = [
            in_format(convolution(h, weight, each, plan.backend), channels_last)
            for weight, each, channels_last in zip(weights, plan.units, plan.channels_last, strict=True)
        ]
    count_path("norm_act_conv_forward")
    return tuple(found), state


def _activated(x: Tensor, state: Tensor | None, plan: NormActConvPlan, slope: Tensor | None) -> Tensor:
    """Return act(BN(x)) as the convolutions read it."""
    launch = launches(plan.backend)
    if plan.kind is None:
        h = x
    elif plan.kind == "relu":
        h = launch.bn_relu(x, state, None, 1)
    else:
        h = launch.gated_tail(TailTerm(x, state), None, Activation(plan.kind, slope, True), False, False)[0]
    h = in_dtype(h, plan.dtype)
    return F.avg_pool2d(h, 2) if plan.pooled else h


class NormActConvFunction(torch.autograd.Function):
    """y_i = conv_i(act(BN(x))); see the head of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: NormActConvPlan,
        slope: Tensor | None,
        state: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Run the convolutions; what backward needs is kept by save_for_backward alone."""
        norm = tensors[: UNIT_TENSORS - 1]
        weights = [weight for weight in tensors[UNIT_TENSORS - 1 :] if weight is not None]
        found, state = _forward(x, plan, NormActConvTensors(norm, weights, slope, state))
        ctx.plan, ctx.nchw = plan, not suggests_channels_last(x)
        ctx.set_materialize_grads(False)
        saved = (x, slope, *norm[: UNIT_PARAMS - 1], state, *weights)
        ctx.kinds = [None if tensor is None else (tensor.dtype, tensor.shape) for tensor in saved]
        ctx.save_for_backward(*saved)
        return (*found, x) if plan.carries else found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the fused backward, or torch's own operators if needs_composite says so."""
        plan: NormActConvPlan = ctx.plan
        used = used_gradients(ctx)
        saved = ctx.saved_tensors
        # x, slope, BatchNorm's weight and bias, then the convolutions' weights.
        needs = (used[0], used[2], *used[4:6], *used[3 + UNIT_TENSORS :])
        given = [grad for grad in grads if grad is not None]
        if not given:
            found: list[Tensor | None] = [None] * len(needs)
        elif any(map(needs_composite, given)):
            refuse_synchronised("a pre-activated convolution", plan.units)
            count_path("norm_act_conv_composite_backward")
            found = _differentiable(plan, saved, grads, needs)
        else:
            count_path("norm_act_conv_backward")
            kinds = [("a saved tensor", t, *kind) for t, kind in zip(saved, ctx.kinds, strict=True) if kind is not None]
            check_each("backward of a pre-activated convolution", given[0].device, kinds)
            found = _Backward(plan, saved, grads, needs).run()
            if found[0] is not None and ctx.nchw:
                found[0] = found[0].contiguous()
        return (found[0], None, found[1], None, *found[2:4], None, None, None, *found[4:])


class _Backward:
    """One backward: the gradients of x, of the slope, of BatchNorm's parameters, and of the convolutions' weights."""

    def __init__(
        self,
        plan: NormActConvPlan,
        saved: Sequence[Tensor | None],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> None:
        x, self.slope, self.weight, self.bias, state, *weights = map(as_saved, saved)
        self.plan, self.needs, self.x, self.state, self.weights = plan, needs, x, state, weights
        given = [None if grad is None else to_channels_last(materialized(grad)) for grad in grads]
        self.carried = given.pop() if plan.carries else None
        self.grads_out = given
        self.launch = launches(plan.backend)
        self.grads: list[Tensor | None] = [None] * len(needs)

    def run(self) -> list[Tensor | None]:
        """Return the gradients; what is not needed is None."""
        grad_h = self._convolutions()
        if grad_h is not None:
            self.grads[0] = self._through_norm(in_dtype(grad_h, self.x.dtype))
        elif self.carried is not None:
            self.grads[0] = self.carried
        if not self.needs[0]:
            self.grads[0] = None
        return self.grads

    def _convolutions(self) -> Tensor | None:
        """Set the gradients of the weights; return that of act(BN(x)) if something needs it."""
        plan, total = self.plan, None
        wanted = any(self.needs[:4])
        on_load = plan.kind == "relu" and self.x.dtype is plan.dtype and len(plan.units) == 1 and not plan.pooled
        source = Raw(self.x, self.state)
        if not on_load:
            read = any(self.needs[4:]) or plan.pooled  # else it is asked for its shape alone
            h = _activated(self.x, self.state, plan, self.slope) if read else in_dtype(self.x, plan.dtype)
            source = Raw(h, None)
        for index, (grad, unit, weight) in enumerate(zip(self.grads_out, plan.units, self.weights, strict=True)):
            if grad is None:
                continue
            needs = (wanted, self.needs[4 + index])
            grad_h, self.grads[4 + index] = convolution_backward(grad, source, weight, unit, needs, plan.backend)
            total = grad_h if total is None or grad_h is None else total.add_(grad_h)
        if total is None or not plan.pooled:
            return total
        pool = torch.ops.aten.avg_pool2d_backward.default
        whole = pool(total, in_dtype(self.x, plan.dtype), [2, 2], [2, 2], [0, 0], False, True, None)
        return to_channels_last(whole)

    def _through_norm(self, grad: Tensor) -> Tensor:
        """Return the gradient of x from that of act(BN(x)), with that of x as a result of its own added.

        Set those of the slope and of BatchNorm's parameters.
        """
        if self.plan.kind == "relu":
            return self._through_relu(grad)
        found = grad if self.plan.kind is None else self._through_activation(grad)
        return found if self.carried is None else found.add_(self.carried)

    def _through_relu(self, grad: Tensor) -> Tensor:
        """Do it in place where the activation is a ReLU."""
        unit, with_sums = self.plan.units[0], self.needs[2] or self.needs[3]
        if unit.group is not None:
            sums = self.launch.bn_relu_backward_(grad, BnBranch(self.x, self.state, False), True, True)
            grad = through_synchronised_norm(grad, sums[:2], self.x, self.state, unit, self.launch)
            grad = grad if self.carried is None else grad.add_(self.carried)
        else:
            branch = BnBranch(self.x, self.state, unit.batch_statistics)
            if self.carried is None:
                sums = self.launch.bn_relu_backward_(grad, branch, True, with_sums)
            else:
                sums = self.launch.bn_relu_backward_add_(grad, branch, self.carried, with_sums)
        if with_sums:
            self._set_norm(sums[0], sums[1])
        return grad

    def _through_activation(self, grad: Tensor) -> Tensor:
        """Do it for another activation."""
        needs = [False] * (2 * TERM + 1)
        needs[:3], needs[-1] = (True, *self.needs[2:4]), self.needs[1]
        tensors = activation_tensors(self.x, self.slope, self.weight, self.bias)
        found = TailBackward(self._activation(), tensors, (self.state, None), None, grad, needs).run()
        self.grads[1:4] = found[-1], found[1], found[2]
        assert found[0] is not None
        return found[0]

    def _activation(self) -> TailPlan:
        assert self.plan.kind is not None
        return activation_plan(self.plan.units[0], self.plan.kind, self.plan.backend)

    def _set_norm(self, total: Tensor, product: Tensor) -> None:
        for index, parameter, grad in ((2, self.weight, product), (3, self.bias, total)):
            if parameter is not None and self.needs[index]:
                self.grads[index] = in_dtype(grad, parameter.dtype)


def activation_plan(unit: ConvBN, kind: str, backend: str) -> TailPlan:
    """Return act(BN(x)) as a tail without a shortcut; the BatchNorm is that of the unit."""
    norm = TermNorm(unit.batch_statistics, unit.update, unit.momentum, unit.eps)
    return TailPlan((norm, None), False, kind, True, False, backend)


def activation_tensors(x: Tensor, slope: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensors:
    """Return the tensors of that tail."""
    return (*TermTensors(x, weight, bias), *TermTensors(None), slope)


def _differentiable(
    plan: NormActConvPlan, saved: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again; running statistics are neither read nor updated."""
    x, slope, weight, bias, state, *weights = saved
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [None if t is None else torch.ops.aten.alias(t) for t in (x, slope, weight, bias, *weights)]
        x, slope, weight, bias, *weights = given
        assert x is not None
        h = x
        if plan.kind is not None:
            tail = activation_plan(plan.units[0], plan.kind, plan.backend)
            h = composite(tail, activation_tensors(x, slope, weight, bias), (state, None))
        h = h.to(plan.dtype)
        h = F.avg_pool2d(h, 2) if plan.pooled else h
        outs, of_outs = [], []
        if plan.carries and grads[-1] is not None:
            outs.append(x)
            of_outs.append(grads[-1])
        for grad, unit, each in zip(grads, plan.units, weights, strict=False):
            if grad is not None and each is not None:
                outs.append(F.conv2d(h, each.to(plan.dtype), None, *unit.geometry, unit.groups))
                of_outs.append(grad)
        inputs = [tensor for tensor, need in zip(given, needs, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(outs, inputs, of_outs, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needs]
