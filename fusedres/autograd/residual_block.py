"""A residual block with ReLU after the addition, as one autograd Function.

For units F_1 … F_n of convolution + BatchNorm and a shortcut S (He et al. 2015):

    h_0 = x;  y_i = conv_i(h_{i-1});  h_i = relu(BN_i(y_i)) for i < n;  out = relu(BN_n(y_n) + S(x))

Saved: x, the raw y_i, each BatchNorm's (4, C) state, and one bit per element for the last ReLU. The h_i are recomputed
in backward. A one-pass unit (ops.one_pass) saves W·Cov and two vectors instead of its y; others may run their
convolution again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.autograd import cpu_passes
from fusedres.autograd.backward import Backward
from fusedres.autograd.double_backward import differentiable_block, refuse_synchronised
from fusedres.autograd.forward import Forward
from fusedres.autograd.graph import are_plain, donate_saved, materialized, needs_composite, used_gradients
from fusedres.autograd.inference import infer
from fusedres.autograd.layout import in_format, suggests_channels_last
from fusedres.autograd.memory import dense, require_memory, statistics_kept_on_error
from fusedres.autograd.plan import UNIT_PARAMS, UNIT_TENSORS, BlockPlan, Inputs, Saved, Tensors
from fusedres.autograd.recompute import with_outputs
from fusedres.autograd.saved import check_saved
from fusedres.autograd.synchronised_backward import SynchronisedBackward

# How often each path ran. Blocks: fused_forward, frozen_forward, fused_backward, composite_backward, unfused. Stems
# (stem.py): stem_forward, stem_backward, stem_composite_backward, stem_unfused.
path_counts: Counter[str] = Counter()


class UncheckedError(Exception):
    """The C++ passes cannot run an unchecked plan: read the block, and call again with the plan that this gives."""


def count_path(path: str) -> None:
    """Count a path, outside compiled code."""
    if not torch.compiler.is_compiling():
        path_counts[path] += 1


def run_block(inputs: Inputs, plan: BlockPlan, tensors: Tensors, recorded: bool) -> Tensor:
    """Run a residual block on inputs that fit the plan; recorded: autograd records it, as gradients are wanted."""
    if recorded:
        result: Tensor = ResidualBlockFunction.apply(*inputs, plan, *tensors)
        return result
    inputs = dense(inputs)
    if any(unit.batch_statistics for unit in plan.all_units):
        out = _forward(inputs, plan, tensors, with_mask=False)[0]
    else:
        out = _infer(inputs, plan, tensors)
    count_path("fused_forward")
    return in_format(out, plan.channels_last)


def _forward(inputs: Inputs, plan: BlockPlan, tensors: Tensors, with_mask: bool) -> tuple[Tensor, Saved]:
    _require_checked(plan)
    require_memory(inputs.x, tensors)
    with statistics_kept_on_error(tensors, plan.all_units):
        return Forward(inputs, plan, tensors).run(with_mask)


def _require_checked(plan: BlockPlan) -> None:
    if not plan.checked:
        raise UncheckedError


def _infer(inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> Tensor:
    found = cpu_passes.infer(inputs.x, plan, tensors)
    if found is not None:
        return found
    _require_checked(plan)
    require_memory(inputs.x, tensors)
    return infer(inputs, plan, tensors)


def as_saved(tensor: Any) -> Any:
    """Return activations and weights in channels_last, vectors and matrices contiguous; no copy if they are already."""
    if tensor is None:
        return None
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor if tensor.is_contiguous(memory_format=layout) else tensor.contiguous(memory_format=layout)


class ResidualBlockFunction(torch.autograd.Function):
    """out = relu(F(x) + S(x)) with the F and S of the plan; see the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, plan: BlockPlan, *tensors: Tensor | None) -> Tensor:
        """Run the block; what backward needs is kept by save_for_backward alone."""
        inputs = dense(Inputs(x, other))
        found: Sequence[Tensor | None] | None = cpu_passes.forward(inputs.x, plan, tensors)
        if found is None:
            out, saved = _forward(inputs, plan, tensors, with_mask=True)
            found = (out, *saved.flat())
        count_path("fused_forward")
        params = [t for i in range(0, len(tensors), UNIT_TENSORS) for t in tensors[i : i + UNIT_PARAMS]]
        ctx.plan, ctx.nchw = plan, not suggests_channels_last(x)
        ctx.other_nchw = other is not None and not suggests_channels_last(other)
        ctx.save_for_backward(x, *params, *found[1:], *(() if other is None else (other,)))
        result = found[0]
        assert result is not None
        return in_format(result, plan.channels_last)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Run the fused backward, or torch's own operators if needs_composite says so."""
        plan: BlockPlan = ctx.plan
        used = used_gradients(ctx)
        # What each slot of the result needs: x, then the parameters of every unit, then what else the shortcut reads.
        needs = [used[0]]
        for first in range(3, len(used), UNIT_TENSORS):
            needs += used[first : first + UNIT_PARAMS]
        tensors, other = ctx.saved_tensors, None
        if plan.reads == "other":
            *tensors, other = tensors
        params = tensors[1 : len(needs)]
        needs.append(used[1])
        if needs_composite(grad_out):
            refuse_synchronised("a fused block", plan.all_units)
            count_path("composite_backward")
            saved = Saved.of(tensors[1 + len(params) :], plan)
            grads = differentiable_block(grad_out, Inputs(tensors[0], other), plan, params, saved, needs)
        else:
            count_path("fused_backward")
            x, grad_out = tensors[0], materialized(grad_out)
            donated = donate_saved(ctx)
            found = cpu_passes.backward(grad_out, plan, tensors, needs[:-1], donated) if are_plain(*tensors) else None
            grads = _backward(grad_out, other, plan, tensors, needs, donated) if found is None else [*found, None]
            grads[0] = _like(grads[0], x, ctx.nchw)
            grads[-1] = None if other is None else _like(grads[-1], other, ctx.other_nchw)
            if ctx.nchw and not plan.channels_last:  # the strides of 1x1 weights
                for slot in range(1, len(grads) - 1, UNIT_PARAMS):
                    grad = grads[slot]
                    grads[slot] = None if grad is None else in_format(grad, False)
        result: list[Tensor | None] = [grads[0], grads[-1], None]
        for slot in range(1, len(grads) - 1, UNIT_PARAMS):
            result += grads[slot : slot + UNIT_PARAMS]
            result += (None, None, None)
        return tuple(result)


def _like(grad: Tensor | None, x: Tensor, nchw: bool) -> Tensor | None:
    """Return the gradient of an input in its dtype and format."""
    if grad is None:
        return None
    if grad.dtype is not x.dtype:
        grad = grad.to(x.dtype)
    return grad.contiguous() if nchw else grad


def _backward(
    grad_out: Tensor, other: Tensor | None, plan: BlockPlan, tensors: Tensors, needs: list[bool], donated: bool
) -> list[Tensor | None]:
    other = None if other is None else materialized(other)
    tensors = tuple(None if tensor is None else materialized(tensor) for tensor in tensors)
    x, params, flat = tensors[0], tensors[1 : len(needs) - 1], tensors[len(needs) - 1 :]
    assert x is not None
    inputs = Inputs(x, other)
    mask, *rest = flat
    mask = None if mask is None else mask.contiguous()
    saved = Saved.of([mask, *(as_saved(tensor) for tensor in rest)], plan)
    check_saved(saved, grad_out, inputs, params, plan)
    passes = SynchronisedBackward if plan.synchronised else Backward

    def run() -> list[Tensor | None]:
        whole = with_outputs(saved, inputs, plan, params)
        return passes(grad_out, inputs, plan, params, whole, needs, donated).run()

    kind = x.device.type
    if torch.compiler.is_compiling() or x.is_meta or not torch.is_autocast_enabled(kind):
        return run()
    with torch.autocast(kind, enabled=False):  # everything has its dtype from forward
        return run()
