"""A dense block as one autograd Function, on one buffer that its layers read a prefix of and write a slice of.

    x_l = conv2_l(relu(BN2_l(conv1_l(relu(BN1_l([x_0, …, x_{l−1}]))))))        out = [x_0, …, x_L]

No concatenation is copied. The statistics of a channel are computed once, for all layers that normalise it. Saved: the
output, which is the buffer, the result of each layer's first convolution, and each BatchNorm's state. What the
convolutions read is computed again in backward, which walks from the last layer to the first with one gradient of the
buffer: each layer adds to its prefix, and that of a slice is complete when its layer is reached (ops.dense_block).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.autograd.composite_tail import composite
from fusedres.autograd.convolution import convolution, convolution_backward
from fusedres.autograd.forward import unit_state
from fusedres.autograd.graph import materialized, needs_composite, used_gradients
from fusedres.autograd.layout import in_format, suggests_channels_last
from fusedres.autograd.memory import require_memory, statistics_kept_on_error, to_channels_last
from fusedres.autograd.norm_act_conv import activation_plan, activation_tensors
from fusedres.autograd.plan import UNIT_PARAMS, UNIT_TENSORS, ConvBN, Tensors, norm_of
from fusedres.autograd.residual_block import as_saved, count_path
from fusedres.autograd.saved import check_each
from fusedres.ops._sizes import empty_activation
from fusedres.ops.launch import Launches, launches
from fusedres.values import BnBranch, Raw, in_dtype, pixel_rows


class DensePlan(NamedTuple):
    """The constants of one call."""

    units: tuple[ConvBN, ...]  # two of each layer: a convolution, with the BatchNorm before it
    widths: tuple[int, ...]  # channels that each layer reads, then those of the output
    dtype: torch.dtype  # of the convolutions: the autocast dtype, else x's
    backend: str
    channels_last: bool  # the result's memory format, else contiguous NCHW

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.units) // 2

    @property
    def batch_statistics(self) -> bool:
        """Some first norm has the batch's statistics."""
        return any(unit.batch_statistics for unit in self.units[::2])


def run_dense_block(x: Tensor, plan: DensePlan, tensors: Tensors, recorded: bool) -> Tensor:
    """Run a dense block on an x that fits the plan; recorded: autograd records it, as gradients are wanted.

    Args:
        tensors: UNIT_TENSORS of each unit, as in plan.units.
    """
    out: Tensor = DenseBlockFunction.apply(x, plan, *tensors) if recorded else _forward(x, plan, tensors, None)[0]
    return out if plan.channels_last or out.is_contiguous() else out.contiguous()


class _Kept:
    """What a forward keeps for backward: each first convolution's result, and the states of both norms."""

    def __init__(self) -> None:
        self.ys: list[Tensor] = []
        self.states: list[Tensor] = []


def _forward(x: Tensor, plan: DensePlan, tensors: Tensors, kept: _Kept | None) -> tuple[Tensor, Tensor | None]:
    """Return the buffer with all slices written, and its moments if a norm needs them."""
    launch = launches(plan.backend)
    x = to_channels_last(x)
    require_memory(x, tensors)
    n, _, h, w = x.shape
    buffer = empty_activation((n, plan.widths[-1], h, w), x)
    if buffer.is_contiguous():  # one pixel or one channel
        buffer = in_format(buffer, plan.channels_last)
    moments = None
    if plan.batch_statistics:
        moments = torch.empty((buffer.shape[1], 2), dtype=torch.float64, device=x.device)
    with statistics_kept_on_error(tensors, plan.units):
        launch.dense_append_(buffer, x, 0, moments)
        for layer in range(plan.depth):
            y = _run_layer(layer, buffer, moments, plan, tensors, kept)
            if layer < plan.depth - 1:
                launch.dense_append_(buffer, in_dtype(y, buffer.dtype), plan.widths[layer], moments)
            else:  # no layer of the block reads it
                launch.dense_append_(buffer, in_dtype(y, buffer.dtype), plan.widths[layer], None)
    count_path("dense_block_forward")
    return buffer, moments


def _run_layer(
    layer: int, buffer: Tensor, moments: Tensor | None, plan: DensePlan, tensors: Tensors, kept: _Kept | None
) -> Tensor:
    """Return the new channels of a layer."""
    launch, (first, second) = launches(plan.backend), plan.units[2 * layer : 2 * layer + 2]
    state = _prefix_state(layer, buffer, moments, plan, tensors, launch)
    h = in_dtype(launch.dense_bn_relu(buffer, state), plan.dtype)
    y = convolution(h, _weight(tensors, 2 * layer), first, plan.backend)
    del h
    inner = unit_state(y, second, tensors, 2 * layer + 1, launch)
    if kept is None:
        h = y
        launch.bn_relu_(h, inner)
    else:
        kept.ys.append(y)
        kept.states += (state, inner)
        h = launch.bn_relu(y, inner, None, 1)
    return convolution(h, _weight(tensors, 2 * layer + 1), second, plan.backend)


def _prefix_state(
    layer: int, buffer: Tensor, moments: Tensor | None, plan: DensePlan, tensors: Tensors, launch: Launches
) -> Tensor:
    """Return the state of a layer's first BatchNorm."""
    unit = plan.units[2 * layer]
    norm = norm_of(tensors, 2 * layer, unit)
    if not unit.batch_statistics:
        frozen: Tensor = launch.bn_frozen(buffer, norm)
        return frozen
    assert moments is not None
    prefix = moments[: plan.widths[layer]]
    state: Tensor = launch.bn_from_moments(prefix, pixel_rows(buffer), norm, buffer.dtype)
    return state


def _weight(tensors: Sequence[Tensor | None], index: int, stride: int = UNIT_TENSORS) -> Tensor:
    weight = tensors[stride * index]
    assert weight is not None
    return weight


class DenseBlockFunction(torch.autograd.Function):
    """out = [x, …] with the layers of the plan; see the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: DensePlan, *tensors: Tensor | None) -> Tensor:
        """Run the block; what backward needs is kept by save_for_backward alone."""
        kept = _Kept()
        buffer, moments = _forward(x, plan, tensors, kept)
        params = [t for i in range(0, len(tensors), UNIT_TENSORS) for t in tensors[i : i + UNIT_PARAMS]]
        saved = (buffer, moments, *params, *kept.ys, *kept.states)
        ctx.plan, ctx.nchw = plan, not suggests_channels_last(x)
        ctx.kinds = [None if tensor is None else (tensor.dtype, tensor.shape) for tensor in saved]
        ctx.save_for_backward(*saved)
        return buffer

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Run the fused backward, or torch's own operators if needs_composite says so."""
        plan: DensePlan = ctx.plan
        used = used_gradients(ctx)
        needs = [used[0]]
        for first in range(2, len(used), UNIT_TENSORS):
            needs += used[first : first + UNIT_PARAMS]
        saved = ctx.saved_tensors
        if needs_composite(grad_out):
            count_path("dense_block_composite_backward")
            grads = _differentiable(plan, saved, grad_out, needs, ctx.needs_input_grad[0])
        else:
            count_path("dense_block_backward")
            grad_out = materialized(grad_out)
            kinds = [("a saved tensor", t, *kind) for t, kind in zip(saved, ctx.kinds, strict=True) if kind is not None]
            check_each("backward of a dense block", grad_out.device, kinds)
            # Everything has its dtype from forward.
            with nullcontext() if grad_out.is_meta else torch.autocast(grad_out.device.type, enabled=False):
                grads = _Backward(plan, saved, grad_out, needs).run()
            if grads[0] is not None and ctx.nchw:
                grads[0] = grads[0].contiguous()
        result: list[Tensor | None] = [grads[0], None]
        for slot in range(1, len(grads), UNIT_PARAMS):
            result += (*grads[slot : slot + UNIT_PARAMS], None, None, None)
        return tuple(result)


class _Backward:
    """One backward: the gradients of x, then those of each unit's parameters; what is not needed stays None."""

    def __init__(
        self, plan: DensePlan, saved: Sequence[Tensor | None], grad_out: Tensor, needs: Sequence[bool]
    ) -> None:
        self.plan, self.needs = plan, needs
        buffer, self.moments, *rest = map(as_saved, saved)
        units = len(plan.units)
        self.params = rest[: units * UNIT_PARAMS]
        self.ys = rest[units * UNIT_PARAMS :][: plan.depth]
        self.states = rest[units * UNIT_PARAMS + plan.depth :]
        self.buffer: Tensor = buffer
        self.launch = launches(plan.backend)
        self.grads: list[Tensor | None] = [None] * len(needs)
        grad = to_channels_last(grad_out)
        self.grad_buffer = grad.clone() if grad is grad_out else grad
        self.corrections = torch.zeros((buffer.shape[1], 2), dtype=torch.float64, device=buffer.device)

    def run(self) -> list[Tensor | None]:
        """Walk from the last layer to the first one that something needs."""
        last = self.plan.depth
        first = 0 if self.needs[0] else next(layer for layer in range(last) if self._layer_needs(layer))
        for layer in reversed(range(first, last)):
            self._layer(layer, through=layer > first or self.needs[0])
        if self.needs[0]:
            self.grads[0] = self._slice(0, self.plan.widths[0])
        return self.grads

    def _layer_needs(self, layer: int) -> bool:
        slot = 1 + 2 * UNIT_PARAMS * layer
        return any(self.needs[slot : slot + 2 * UNIT_PARAMS])

    def _slice(self, first: int, end: int) -> Tensor:
        """Return the gradient of some channels, which no other layer adds to any more."""
        # No layer reads the channels of the last one: they have no moments.
        corrected = self.moments is not None and end < self.plan.widths[-1]
        moments, corrections = (self.moments, self.corrections) if corrected else (None, None)
        found: Tensor = self.launch.dense_gradient(
            self.buffer, self.grad_buffer, moments, corrections, first, end - first
        )
        return found

    def _layer(self, layer: int, through: bool) -> None:
        """Set the gradients of a layer's parameters; through: add to that of the channels that it reads."""
        plan, outer, inner = self.plan, 2 * layer, 2 * layer + 1
        wants_prefix = through or self._needs_norm(outer)
        wants_y = wants_prefix or self.needs[1 + UNIT_PARAMS * outer]
        wants_inner = wants_y or self._needs_norm(inner)
        y, state = self.ys[layer], self.states[inner]
        grad = in_dtype(self._slice(*plan.widths[layer : layer + 2]), plan.dtype)
        grad_h = self._convolution(inner, grad, Raw(y, state), wants_inner)
        if grad_h is None:
            return
        branch = BnBranch(y, state, plan.units[inner].batch_statistics)
        sums = self.launch.bn_relu_backward_(grad_h, branch, True, self._needs_norm(inner))
        self._set_norm(inner, sums)
        if not wants_y:
            return
        state = self.states[outer]
        # Without the weight's gradient it is read for its shape alone.
        reads = self.needs[1 + UNIT_PARAMS * outer]
        h = self.launch.dense_bn_relu(self.buffer, state) if reads else self.buffer[:, : plan.widths[layer]]
        grad_h = self._convolution(outer, grad_h, Raw(in_dtype(h, plan.dtype), None), wants_prefix)
        if grad_h is None:
            return
        branch = BnBranch(self.buffer, state, plan.units[outer].batch_statistics)
        grad_h = in_dtype(grad_h, self.buffer.dtype)
        sums = self.launch.dense_bn_relu_backward_(grad_h, branch, self.grad_buffer, self.corrections)
        self._set_norm(outer, sums)

    def _convolution(self, index: int, grad: Tensor, h: Raw, with_input: bool) -> Tensor | None:
        """Set the gradient of a convolution's weight, and return that of its input if it is wanted."""
        slot = 1 + UNIT_PARAMS * index
        weight, unit = _weight(self.params, index, UNIT_PARAMS), self.plan.units[index]
        needs = (with_input, self.needs[slot])
        grad_h, self.grads[slot] = convolution_backward(grad, h, weight, unit, needs, self.plan.backend)
        return grad_h

    def _needs_norm(self, index: int) -> bool:
        slot = 1 + UNIT_PARAMS * index
        return any(self.needs[slot + 1 : slot + UNIT_PARAMS])

    def _set_norm(self, index: int, sums: Tensor) -> None:
        slot = 1 + UNIT_PARAMS * index
        for offset, grad in ((1, sums[1]), (2, sums[0])):
            parameter = self.params[UNIT_PARAMS * index + offset]
            if parameter is not None and self.needs[slot + offset]:
                self.grads[slot + offset] = in_dtype(grad, parameter.dtype)


def _differentiable(
    plan: DensePlan, saved: Sequence[Tensor | None], grad_out: Tensor, needs: Sequence[bool], wants_x: bool
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again; running statistics are neither read nor updated.

    x is the first channels of the output, which was saved as the result of this same Function. So what is
    differentiated again reaches x through the Function's own backward, which passes the gradient of these channels on.
    """
    again, count = torch.is_grad_enabled(), UNIT_PARAMS * len(plan.units)
    buffer, _, *rest = saved
    params, states = rest[:count], rest[count + plan.depth :]
    assert buffer is not None
    with torch.enable_grad():
        x = (buffer if wants_x else buffer.detach())[:, : plan.widths[0]]
        if wants_x and not x.requires_grad:
            x.requires_grad_()
        given = [None if tensor is None else torch.ops.aten.alias(tensor) for tensor in (x, *params)]
        features, *params = given
        assert features is not None
        for layer in range(plan.depth):
            h = features
            for index in (2 * layer, 2 * layer + 1):
                weight, *vectors = params[UNIT_PARAMS * index : UNIT_PARAMS * (index + 1)]
                assert weight is not None
                unit, state = plan.units[index], (states[index], None)
                tail = activation_plan(unit, "relu", plan.backend)
                h = composite(tail, activation_tensors(h, None, *vectors), state).to(plan.dtype)
                h = F.conv2d(h, weight.to(plan.dtype), None, *unit.geometry, unit.groups)
            features = torch.cat((features, h.to(buffer.dtype)), 1)
        inputs = [tensor for tensor, need in zip(given, needs, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(features, inputs, grad_out, create_graph=again))
    return [next(found) if need else None for need in needs]
