"""A residual block with ReLU after the addition: which passes run in which order, and what is saved.

Forward, for units F_1 … F_n of convolution + BatchNorm and a shortcut S (He et al. 2015):

    h_0 = x;  y_i = conv_i(h_{i-1});  h_i = relu(BN_i(y_i)) for i < n;  out = relu(BN_n(y_n) + S(x))

Saved: x, the raw y_i, each BatchNorm's (4, C) state, and one bit an element for the last ReLU. The h_i are recomputed in
backward. A one-pass unit (ops.one_pass) saves W·Cov and three vectors instead of its y.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from fusedres import ops
from fusedres.autograd.composite import composite_block
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, ConvBN, Unit, units_of
from torch import Tensor

# How often each path ran, for tests and for the curious: fused_forward, fused_backward, composite_backward, unfused.
path_counts: Counter[str] = Counter()


class OnePass(NamedTuple):
    """What a one-pass unit saves."""

    pivot: Tensor
    total: Tensor
    projected: Tensor


class Branch(NamedTuple):
    """The end of a branch: the convolution's raw output (None where one-pass), its state, its one-pass tensors."""

    y: Tensor | None
    state: Tensor
    one_pass: OnePass | None


def _convolution(h: Tensor, weight: Tensor, unit: ConvBN, subsampled: bool = False) -> Tensor:
    stride = (1, 1) if subsampled else unit.stride
    y = torch.convolution(h, weight.to(h.dtype), None, stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)
    return y.contiguous(memory_format=torch.channels_last)


def _convolution_backward(
    grad: Tensor, h: Tensor, weight: Tensor, unit: ConvBN, needs: tuple[bool, bool], subsampled: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of h (channels_last) and weight, each None unless needed."""
    if not any(needs):
        return None, None
    stride = (1, 1) if subsampled else unit.stride
    grad_h, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        h,
        weight.to(h.dtype),
        None,
        stride,
        unit.padding,
        unit.dilation,
        False,
        (0, 0),
        unit.groups,
        (*needs, False),
    )
    if grad_h is not None:
        grad_h = grad_h.contiguous(memory_format=torch.channels_last)
    return grad_h, None if grad_weight is None else grad_weight.to(weight.dtype)


def _state(y: Tensor, unit: ConvBN, tensors: Unit, backend: str) -> Tensor:
    if unit.batch_statistics:
        running = (tensors.running_mean, tensors.running_var, tensors.num_batches_tracked)
        return ops.bn_statistics(
            y,
            tensors.weight,
            tensors.bias,
            *(running if unit.update else (None, None, None)),
            unit.momentum,
            unit.eps,
            backend,
        )
    assert tensors.running_mean is not None and tensors.running_var is not None
    return ops.bn_frozen(y, tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var, unit.eps, backend)


def _one_pass_unit(
    h: Tensor, state: Tensor | None, stride: int, unit: ConvBN, tensors: Unit, backend: str
) -> tuple[Tensor, Branch]:
    """The raw convolution of the centred input, and the branch's end. h is raw where a state is given."""
    z, pivot, total, matrix = ops.gram(h, state, backend, stride)
    running = (tensors.running_mean, tensors.running_var, tensors.num_batches_tracked)
    out_state, projected = ops.one_pass_statistics(
        tensors.conv_weight,
        pivot,
        total,
        matrix,
        z.numel() // z.shape[1],
        tensors.weight,
        tensors.bias,
        *(running if unit.update else (None, None, None)),
        unit.momentum,
        unit.eps,
    )
    y = _convolution(z, tensors.conv_weight, unit, subsampled=True)
    return y, Branch(None, out_state, OnePass(pivot, total, projected))


def _needs_subsampling(plan: BlockPlan, projection: Unit) -> bool:
    """A strided 1x1 projection reads every stride-th pixel: taken out first, forward and backward are dense."""
    unit = plan.projection
    return (
        unit is not None
        and unit.pointwise
        and unit.stride != (1, 1)
        and tuple(projection.conv_weight.shape[2:]) == (1, 1)
    )


class Saved(NamedTuple):
    """What backward needs besides x and the parameters."""

    ys: list[Tensor]  # of the units before the last
    states: list[Tensor]
    last: Branch
    projection: Branch | None
    mask: Tensor


def forward_passes(x: Tensor, plan: BlockPlan, units: list[Unit], with_mask: bool) -> tuple[Tensor, Saved]:
    """The block's forward on a channels_last x."""
    backend = plan.backend
    h = x.to(plan.dtype)
    entry = h
    ys: list[Tensor] = []
    states: list[Tensor] = []
    for unit, tensors in zip(plan.units[:-1], units, strict=False):
        if ys:
            h = ops.bn_relu(ys[-1], states[-1], backend)
        ys.append(_convolution(h, tensors.conv_weight, unit))
        states.append(_state(ys[-1], unit, tensors, backend))
    last_unit, last_tensors = plan.units[-1], units[len(plan.units) - 1]
    if plan.one_pass[0]:
        y, last = _one_pass_unit(ys[-1], states[-1], 1, last_unit, last_tensors, backend)
    else:
        h = ops.bn_relu(ys[-1], states[-1], backend)
        y = _convolution(h, last_tensors.conv_weight, last_unit)
        last = Branch(y, _state(y, last_unit, last_tensors, backend), None)
    del h

    projection: Branch | None = None
    if plan.projection is not None:
        tensors = units[-1]
        if plan.one_pass[1]:
            stride = plan.projection.stride[0]
            shortcut, projection = _one_pass_unit(entry, None, stride, plan.projection, tensors, backend)
        else:
            subsampled = _needs_subsampling(plan, tensors)
            source = ops.bn_relu(entry, None, backend, stride=plan.projection.stride[0]) if subsampled else entry
            shortcut = _convolution(source, tensors.conv_weight, plan.projection, subsampled)
            projection = Branch(shortcut, _state(shortcut, plan.projection, tensors, backend), None)
        shortcut_state, stride = projection.state, 1
    else:
        shortcut, shortcut_state, stride = x, None, plan.pad_stride
        y = y.to(torch.promote_types(y.dtype, x.dtype))
        shortcut = shortcut.to(y.dtype)

    # The result goes into a raw convolution output that nobody saves, where there is one.
    if last.y is None:
        mask = ops.bn_add_relu_(y, last.state, shortcut, backend, shortcut_state, stride, with_mask)
        out = y
    elif projection is not None and projection.y is None:
        mask = ops.bn_add_relu_(shortcut, projection.state, y, backend, last.state, 1, with_mask)
        out = shortcut
    else:
        out, mask = ops.bn_add_relu(y, last.state, shortcut, backend, shortcut_state, stride, with_mask)
    return out, Saved(ys, states, last, projection, mask)


def infer(x: Tensor, plan: BlockPlan, units: list[Unit]) -> Tensor:
    """The block's forward where no gradient is wanted and all statistics are constants: nothing is kept."""
    backend = plan.backend
    entry = h = x.to(plan.dtype)
    for unit, tensors in zip(plan.units[:-1], units, strict=False):
        h = _convolution(h, tensors.conv_weight, unit)
        ops.bn_relu_(h, _state(h, unit, tensors, backend), backend)
    last = units[len(plan.units) - 1]
    y = _convolution(h, last.conv_weight, plan.units[-1])
    state = _state(y, plan.units[-1], last, backend)
    if plan.projection is not None:
        shortcut = _convolution(entry, units[-1].conv_weight, plan.projection)
        shortcut_state = _state(shortcut, plan.projection, units[-1], backend)
        ops.bn_add_relu_(y, state, shortcut, backend, shortcut_state)
        return y
    y = y.to(torch.promote_types(y.dtype, x.dtype))
    ops.bn_add_relu_(y, state, x.to(y.dtype), backend, stride=plan.pad_stride)
    return y


def _layout_of(x: Tensor) -> torch.memory_format:
    """The memory format that the block's result takes: that of its input."""
    channels_last = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def run_block(x: Tensor, plan: BlockPlan, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """Runs a residual block, recording its backward where gradients are wanted."""
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )
    if wants_grad:
        result: Tensor = ResidualBlockFunction.apply(x, plan, *tensors)  # type: ignore[no-untyped-call]
        return result
    _count("fused_forward")
    layout = _layout_of(x)
    x = x.contiguous(memory_format=torch.channels_last)
    units = units_of(tensors)
    all_units = plan.units if plan.projection is None else (*plan.units, plan.projection)
    if any(unit.batch_statistics for unit in all_units):
        out, _ = forward_passes(x, plan, units, with_mask=False)
    else:
        out = infer(x, plan, units)
    return out.contiguous(memory_format=layout)


def _count(path: str) -> None:
    if not torch.compiler.is_compiling():
        path_counts[path] += 1


class ResidualBlockFunction(torch.autograd.Function):
    """out = relu(F(x) + S(x)) with F and S as the plan says; see the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: BlockPlan, *tensors: Tensor | None) -> Tensor:
        _count("fused_forward")
        layout = _layout_of(x)
        out, saved = forward_passes(
            x.contiguous(memory_format=torch.channels_last), plan, units_of(tensors), with_mask=True
        )
        ctx.plan = plan
        ctx.layout = layout
        params = [tensor for i, tensor in enumerate(tensors) if i % UNIT_TENSORS < 3]
        branches: list[Tensor | None] = []
        for branch in (saved.last, saved.projection):
            if branch is None:
                branches += [None] * 5
            else:
                branches += [branch.y, branch.state, *(branch.one_pass or (None, None, None))]
        ctx.save_for_backward(x, saved.mask, *params, *branches, *saved.ys, *saved.states)
        return out.contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: BlockPlan = ctx.plan
        depth = len(plan.units)
        count = depth + (plan.projection is not None)
        x, mask, *rest = ctx.saved_tensors
        params, rest = rest[: 3 * count], rest[3 * count :]
        ends = [_unpack_branch(rest[:5]), _unpack_branch(rest[5:10])]
        ys, states = rest[10 : 9 + depth], rest[9 + depth :]
        needs = [ctx.needs_input_grad[0]] + [
            ctx.needs_input_grad[2 + UNIT_TENSORS * unit + i] for unit in range(count) for i in range(3)
        ]
        if torch.is_grad_enabled():
            _count("composite_backward")
            grads = _double_backward(grad_out, x, plan, params, states, ends, needs)
        else:
            _count("fused_backward")
            grads = _Backward(grad_out, x, mask, plan, params, ys, states, ends, needs).run()
            if grads[0] is not None:
                grads[0] = grads[0].to(x.dtype).contiguous(memory_format=ctx.layout)
        flat: list[Tensor | None] = [grads[0], None]
        for unit in range(count):
            flat += [*grads[1 + 3 * unit : 4 + 3 * unit], None, None, None]
        return tuple(flat)


def _unpack_branch(tensors: list[Tensor | None]) -> Branch | None:
    y, state, pivot, total, projected = tensors
    if state is None:
        return None
    if pivot is None or total is None or projected is None:
        return Branch(y, state, None)
    return Branch(None, state, OnePass(pivot, total, projected))


def _double_backward(
    grad_out: Tensor,
    x: Tensor,
    plan: BlockPlan,
    params: list[Tensor | None],
    states: list[Tensor],
    ends: list[Branch | None],
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: through the composite, recomputed."""
    all_units = plan.units if plan.projection is None else (*plan.units, plan.projection)
    all_states = [*states, *(end.state for end in ends if end is not None)]
    constants = [None if u.batch_statistics else s for u, s in zip(all_units, all_states, strict=True)]
    out = composite_block(x, plan, params, constants)
    inputs = [tensor for tensor, need in zip([x, *params], needs, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(out, inputs, grad_out.to(out.dtype), create_graph=True))
    return [next(found) if need else None for need in needs]


class _Backward:
    """One backward of a block: grads of x and of conv weight, BN weight, BN bias of every unit, in `grads`."""

    def __init__(
        self,
        grad_out: Tensor,
        x: Tensor,
        mask: Tensor,
        plan: BlockPlan,
        params: list[Tensor | None],
        ys: list[Tensor],
        states: list[Tensor],
        ends: list[Branch | None],
        needs: list[bool],
    ) -> None:
        self.plan, self.mask, self.params, self.needs = plan, mask, params, needs
        self.ys, self.states, self.last, self.projection = ys, states, ends[0], ends[1]
        self.backend = plan.backend
        self.grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.entry = self.x.to(plan.dtype)
        self.grads: list[Tensor | None] = [None] * len(needs)

    def run(self) -> list[Tensor | None]:
        depth = len(self.plan.units)
        grad, grad_shortcut = self._tail()
        grad_x = self._shortcut_convolution(grad_shortcut)
        del grad_shortcut
        # grad is that of h_{n-1} where the last unit was one-pass, else of y_n.
        for index in reversed(range(depth)):
            if index < depth - 1:
                self._inner_batch_norm(index, grad)
            elif self.last is not None and self.last.one_pass is not None:
                continue
            first = index == 0
            h = self.entry if first else ops.bn_relu(self.ys[index - 1], self.states[index - 1], self.backend)
            need_h = self.needs[0] if first else any(self.needs[: 1 + 3 * index])
            weight = self._param(index)
            needs = (need_h, self.needs[1 + 3 * index])
            previous, self.grads[1 + 3 * index] = _convolution_backward(grad, h, weight, self.plan.units[index], needs)
            del h
            if previous is None:
                return self.grads
            grad = previous
        self.grads[0] = self._add_shortcut(grad, grad_x)
        return self.grads

    def _param(self, unit: int) -> Tensor:
        weight = self.params[3 * unit]
        assert weight is not None
        return weight

    def _set_affine_grads(self, unit: int, grad_weight: Tensor, grad_bias: Tensor) -> None:
        for i, grad in ((1, grad_weight), (2, grad_bias)):
            param = self.params[3 * unit + i]
            if param is not None and self.needs[1 + 3 * unit + i]:
                self.grads[1 + 3 * unit + i] = grad.to(param.dtype)

    def _needs_sums(self, unit: int) -> bool:
        return self.needs[2 + 3 * unit] or self.needs[3 + 3 * unit]

    def _tail(self) -> tuple[Tensor, Tensor | None]:
        """Gradients of the last unit's y (of its z where one-pass) and of the projection's, both in the conv dtype."""
        plan, last, projection = self.plan, self.last, self.projection
        assert last is not None
        depth = len(plan.units)
        dtype = plan.dtype
        if last.one_pass is None and (projection is None or projection.one_pass is None):
            y, shortcut_y, shortcut_state = last.y, None, None
            assert y is not None
            shortcut_statistics = False
            if projection is not None and plan.projection is not None:
                shortcut_y, shortcut_state = projection.y, projection.state
                shortcut_statistics = plan.projection.batch_statistics
            grad, grad_shortcut, sums = ops.bn_add_relu_backward(
                self.grad_out,
                self.mask,
                y.to(self.grad_out.dtype),
                last.state,
                self.backend,
                batch_statistics=plan.units[-1].batch_statistics,
                shortcut_x=shortcut_y,
                shortcut_state=shortcut_state,
                shortcut_batch_statistics=shortcut_statistics,
                with_sums=self._needs_sums(depth - 1) or (projection is not None and self._needs_sums(depth)),
            )
            self._set_affine_grads(depth - 1, sums[1], sums[0])
            if projection is None:
                return grad.to(dtype), None
            self._set_affine_grads(depth, sums[2], sums[0])
            return grad.to(dtype), grad_shortcut

        d, sum_d = ops.relu_backward(self.grad_out, self.mask, self.backend)
        grad_shortcut = None
        in_place = []  # ordinary branches turn d into their own gradient last, when nobody else reads it
        grads: list[Tensor | None] = [None, None]
        for i, (branch, unit) in enumerate(((last, plan.units[-1]), (projection, plan.projection))):
            if branch is None or unit is None:
                continue
            if branch.one_pass is None:
                in_place.append((i, branch, unit))
                continue
            source, state, stride = (self.ys[-1], self.states[-1], 1) if i == 0 else (self.entry, None, unit.stride[0])
            z = ops.bn_relu(source, state, self.backend, branch.one_pass.pivot, stride)
            grad_z, grad_conv, grad_weight = ops.one_pass_backward(
                d.to(dtype),
                sum_d,
                z,
                self._param(depth - 1 + i),
                branch.state,
                branch.one_pass.projected,
                branch.one_pass.total,
            )
            grads[i] = grad_z
            self._set_affine_grads(depth - 1 + i, grad_weight, sum_d)
            if self.needs[1 + 3 * (depth - 1 + i)]:
                self.grads[1 + 3 * (depth - 1 + i)] = grad_conv
        for i, branch, unit in in_place:
            assert branch.y is not None
            sums = ops.bn_relu_backward_(
                d,
                branch.y.to(d.dtype),
                branch.state,
                self.backend,
                gated=False,
                batch_statistics=unit.batch_statistics,
                with_sums=self._needs_sums(depth - 1 + i),
            )
            grads[i] = d.to(dtype)
            self._set_affine_grads(depth - 1 + i, sums[1], sums[0])
        grad_last = grads[0]
        assert grad_last is not None
        return grad_last, grads[1]

    def _shortcut_convolution(self, grad: Tensor | None) -> tuple[Tensor, int] | None:
        """The projection's gradient of its (subsampled) input, with the stride that takes it to x; sets its weight's."""
        unit, branch = self.plan.projection, self.projection
        if grad is None or unit is None or branch is None:
            return None
        if branch.one_pass is not None:
            return grad, unit.stride[0]
        index = len(self.plan.units)
        weight = self._param(index)
        subsampled = _needs_subsampling(self.plan, Unit(weight, None, None, None, None, None))
        stride = unit.stride[0] if subsampled else 1
        source = ops.bn_relu(self.entry, None, self.backend, stride=stride) if subsampled else self.entry
        needs = (self.needs[0], self.needs[1 + 3 * index])
        grad_x, self.grads[1 + 3 * index] = _convolution_backward(grad, source, weight, unit, needs, subsampled)
        return None if grad_x is None else (grad_x, stride)

    def _inner_batch_norm(self, index: int, grad: Tensor) -> None:
        """Turns the gradient of h_index into that of y_index, in place."""
        sums = ops.bn_relu_backward_(
            grad,
            self.ys[index],
            self.states[index],
            self.backend,
            gated=True,
            batch_statistics=self.plan.units[index].batch_statistics,
            with_sums=self._needs_sums(index),
        )
        self._set_affine_grads(index, sums[1], sums[0])

    def _add_shortcut(self, grad: Tensor, grad_x: tuple[Tensor, int] | None) -> Tensor:
        """dL/dx = F'(x)ᵀd + S'(x)ᵀd, into the branch's own gradient."""
        if self.plan.projection is not None:
            if grad_x is not None:
                ops.shortcut_grad_(grad, grad_x[0], self.backend, stride=grad_x[1])
            return grad
        grad = grad.to(self.grad_out.dtype)
        ops.shortcut_grad_(grad, self.grad_out, self.backend, gate=self.mask, stride=self.plan.pad_stride)
        return grad
