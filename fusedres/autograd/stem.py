"""The stem of a ResNet as one autograd Function: convolution, BatchNorm, ReLU, 3x3 max-pool with stride 2, padding 1.

    y = conv(x);  out = maxpool(relu(BN(y)))

A convolution of this package's own takes BatchNorm's statistics where it stores y. If the images need no gradient, dy
is formed where the product for the weight's gradient loads it. Otherwise, and with the library's convolution, dy is
written once.

Saved: x, y, BatchNorm's (4, C) state, and for each element of out one byte that says where its maximum was. Neither
BN(y) nor its ReLU is ever in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.autograd.convolution import convolution, convolution_backward
from fusedres.autograd.double_backward import differentiable_stem, refuse_synchronised
from fusedres.autograd.folded_convolution import uses_panels
from fusedres.autograd.forward import unit_state
from fusedres.autograd.frozen_network import fold_stem
from fusedres.autograd.graph import donate_saved, materialized, needs_composite, used_gradients
from fusedres.autograd.layout import in_format, suggests_channels_last
from fusedres.autograd.memory import require_memory, statistics_kept_on_error, to_channels_last
from fusedres.autograd.plan import UNIT_PARAMS, StemPlan, Tensors, norm_of
from fusedres.autograd.residual_block import as_saved, count_path
from fusedres.autograd.saved import check_saved_stem
from fusedres.autograd.synchronised import through_synchronised_norm
from fusedres.kernels.cpu_convolution import Purpose
from fusedres.ops.launch import direct, launches
from fusedres.values import BnBranch, BnGradient, NormState, Pooled, Raw, in_dtype, pixel_rows


def run_stem(x: Tensor, plan: StemPlan, tensors: Tensors, recorded: bool) -> Tensor:
    """Run a stem on an x that fits the plan; recorded: autograd records it, as gradients are wanted.

    tensors: the UNIT_TENSORS of its unit.
    """
    if recorded:
        result: Tensor = StemFunction.apply(x, plan, *tensors)
        return result
    count_path("stem_forward")
    if not plan.unit.batch_statistics and direct() and _uses_panels(x, plan, tensors):
        require_memory(x, tensors)
        return in_format(fold_stem(x, plan, tensors).run(x), plan.channels_last)
    return in_format(_forward(to_channels_last(x), plan, tensors, False)[0], plan.channels_last)


def _uses_panels(x: Tensor, plan: StemPlan, tensors: Tensors) -> bool:
    weight = tensors[0]
    assert weight is not None
    return uses_panels(x.shape, weight, plan.unit, plan.dtype, plan.backend, Purpose.FORWARD)


def _forward(source: Tensor, plan: StemPlan, tensors: Tensors, with_argmax: bool) -> tuple[Tensor, ...]:
    """Return out, argmax, y and the state."""
    launch, unit = launches(plan.backend), plan.unit
    require_memory(source, tensors)
    with statistics_kept_on_error(tensors, (unit,)):
        y, state = _own_conv_bn(source, plan, tensors) if unit.own.fprop else _library_conv_bn(source, plan, tensors)
        return (*launch.bn_relu_maxpool(y, state, with_argmax), y, state)


def _library_conv_bn(source: Tensor, plan: StemPlan, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return the raw convolution and its BatchNorm's state."""
    weight = tensors[0]
    assert weight is not None
    y = convolution(in_dtype(source, plan.dtype), weight, plan.unit, plan.backend)
    return y, unit_state(y, plan.unit, tensors, 0, launches(plan.backend))


def _own_conv_bn(source: Tensor, plan: StemPlan, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return the same; the convolution takes the statistics of the batch where it stores y."""
    launch, unit = launches(plan.backend), plan.unit
    weight = tensors[0]
    assert weight is not None
    if weight.dtype is not plan.dtype or not weight.is_contiguous(memory_format=torch.channels_last):
        weight = launch.conv_weights([weight], plan.dtype)[0]
    entry = Raw(in_dtype(source, plan.dtype), None)
    y, partials, rows = launch.conv_fprop(entry, weight, unit.geometry, unit.batch_statistics)
    if not unit.batch_statistics:
        return y, unit_state(y, unit, tensors, 0, launch)
    return y, launch.bn_finalize(partials, rows, norm_of(tensors, 0, unit))


class StemFunction(torch.autograd.Function):
    """out = maxpool(relu(BN(conv(x)))); see the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: StemPlan, *tensors: Tensor | None) -> Tensor:
        """Run the stem; what backward needs is kept by save_for_backward alone."""
        count_path("stem_forward")
        out, argmax, y, state = _forward(to_channels_last(x), plan, tensors, True)
        ctx.plan, ctx.nchw = plan, not suggests_channels_last(x)
        ctx.save_for_backward(x, *tensors[:UNIT_PARAMS], y, state, argmax)
        return in_format(out, plan.channels_last)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Run the fused backward, or torch's own operators if needs_composite says so."""
        plan: StemPlan = ctx.plan
        used = used_gradients(ctx)
        needs = (used[0], *used[2 : 2 + UNIT_PARAMS])
        tensors: list[Any] = [t if t is None else materialized(t) for t in ctx.saved_tensors]
        x, *params, y, state, argmax = tensors
        if needs_composite(grad_out):
            refuse_synchronised("a fused stem", (plan.unit,))
            count_path("stem_composite_backward")
            grads = differentiable_stem(grad_out, x, plan, tuple(params), state, needs)
        else:
            count_path("stem_backward")
            grad_out, donated = materialized(grad_out), donate_saved(ctx)
            saved = (as_saved(argmax), as_saved(y), as_saved(state))
            grads = _backward(grad_out, x, plan, params, saved, needs, donated)
            if grads[0] is not None and ctx.nchw:
                grads[0] = grads[0].contiguous()
        return (grads[0], None, *grads[1:], None, None, None)


def _backward(
    grad_out: Tensor,
    x: Tensor,
    plan: StemPlan,
    params: list[Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, ...],
    donated: bool,
) -> list[Tensor | None]:
    """Return the gradients of x, conv weight, BN weight and BN bias; what is not needed stays None."""
    conv_weight, weight, bias = params
    assert conv_weight is not None
    check_saved_stem(saved, grad_out, x, params, plan.unit)
    grad_out = to_channels_last(grad_out)
    entry = in_dtype(to_channels_last(x), plan.dtype)
    if plan.unit.own.wgrad and not needs[0]:
        grad_x, grad_weight, sums = _formed_on_load(grad_out, entry, conv_weight, plan, saved, needs)
    else:
        grad_x, grad_weight, sums = _stored(grad_out, entry, conv_weight, plan, saved, needs, donated)
    grads: list[Tensor | None] = [grad_x, grad_weight, None, None]
    if grad_x is not None:
        grads[0] = in_dtype(grad_x, x.dtype)
    if needs[2] and weight is not None:
        grads[2] = in_dtype(sums[1], weight.dtype)
    if needs[3] and bias is not None:
        grads[3] = in_dtype(sums[0], bias.dtype)
    return grads


_Gradients = tuple[Tensor | None, Tensor | None, Tensor]  # of x, of the convolution's weight; Σd and Σd·x̂


def _stored(
    grad_out: Tensor,
    entry: Tensor,
    weight: Tensor,
    plan: StemPlan,
    saved: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, ...],
    donated: bool,
) -> _Gradients:
    """Write dy once, and run the library's products."""
    launch, unit = launches(plan.backend), plan.unit
    argmax, y, state = saved
    arguments = (Pooled(grad_out, argmax), BnBranch(y, state, unit.batch_statistics), needs[2] or needs[3])
    if unit.group is not None:
        scaled, sums = launch.bn_relu_maxpool_backward(Pooled(grad_out, argmax), BnBranch(y, state, False), True)
        dy = through_synchronised_norm(scaled, sums, y, state, unit, launch)
    elif donated:  # y may be overwritten with its gradient
        dy, sums = y, launch.bn_relu_maxpool_backward_(*arguments)
    else:
        dy, sums = launch.bn_relu_maxpool_backward(*arguments)
    return (*convolution_backward(dy, Raw(entry, None), weight, unit, (needs[0], needs[1]), plan.backend), sums)


def _formed_on_load(
    grad_out: Tensor,
    entry: Tensor,
    weight: Tensor,
    plan: StemPlan,
    saved: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, ...],
) -> _Gradients:
    """Return the weight's gradient without that of x; dy is never in memory."""
    launch, unit = launches(plan.backend), plan.unit
    argmax, y, state = saved
    pooled = Pooled(grad_out, argmax)
    if unit.batch_statistics or needs[2] or needs[3]:
        partials = launch.bn_relu_maxpool_reduce(pooled, y, state)
    else:
        partials = state.new_zeros((1, 2, y.shape[1]))
    sums, coefficients, _ = launch.bn_backward_coefficients(
        partials, pixel_rows(y), NormState(state, unit.batch_statistics)
    )
    grad_weight = None
    if needs[1]:
        kernel = list(weight.shape[2:])
        partials = launch.bn_relu_maxpool_wgrad(pooled, BnGradient(y, coefficients), entry, kernel, unit.geometry)
        (grad_weight,) = launch.conv_wgrad_finalize([partials], [weight])
    return None, grad_weight, sums
