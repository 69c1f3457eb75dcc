"""A gated residual tail by torch's own operators, and its gradients that can be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.autograd.excitation import excite
from fusedres.autograd.tail_plan import TERM, States, TailPlan, TermNorm, TermTensors, as_image, split
from fusedres.kernels.reference_core import unpack_bits


def composite(plan: TailPlan, tensors: Sequence[Tensor | None], states: States) -> Tensor:
    """Return the tail; running statistics are neither read nor updated, as the states say what they were."""
    branch, shortcut, slope = split(tensors)
    value = _composite_term(branch, plan.norms[0], states[0])
    if plan.excitation is not None:
        factor = excite(value.mean((2, 3)), tensors[2 * TERM + 1 :], plan.excitation)
        branch = branch._replace(factor=factor)
    if plan.before_add:
        value = _activated(value, plan.kind, slope)
    gate = None if branch.logits is None else branch.logits.sigmoid()
    total = _scaled(value, branch.factor, gate)
    if plan.has_shortcut:
        other = None if shortcut.logits is None else shortcut.logits.sigmoid()
        if plan.coupled and gate is not None:
            other = 1 - gate
        added = _composite_term(shortcut, plan.norms[1], states[1])
        total = total + _scaled(added, shortcut.factor, other)
    return total if plan.before_add else _activated(total, plan.kind, slope)


def _composite_term(tensors: TermTensors, norm: TermNorm | None, state: Tensor | None) -> Tensor:
    x, weight, bias = tensors[:3]
    assert x is not None
    if norm is None or state is None:
        return x
    if norm.batch_statistics:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
    normalised = (x.to(state.dtype) - state[0].view(1, -1, 1, 1)) * state[1].view(1, -1, 1, 1)
    for parameter, apply in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            normalised = apply(normalised, parameter.to(state.dtype).view(1, -1, 1, 1))
    return normalised.to(x.dtype)


def _scaled(value: Tensor, factor: Tensor | None, gate: Tensor | None) -> Tensor:
    if factor is not None:
        value = value * factor.to(value.dtype)[:, :, None, None]
    return value if gate is None else value * gate


def _activated(z: Tensor, kind: str, slope: Tensor | None) -> Tensor:
    if slope is not None:
        return F.prelu(z, slope.to(z.dtype))
    return z if kind == "identity" else getattr(F, kind)(z)


def differentiable_tail(
    plan: TailPlan,
    tensors: Sequence[Tensor | None],
    states: States,
    mask: Tensor | None,
    grad_out: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again, of what was saved.

    An x that was not saved is not in any gradient: zeros take its place.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Not view_as: it changes the strides of a batch of one image, which torch's BatchNorm differentiates wrongly.
        given = [None if tensor is None else torch.ops.aten.alias(tensor) for tensor in tensors]
        for index, present in ((0, True), (TERM, plan.has_shortcut)):
            if present and given[index] is None:
                # Not zeros_like: a batch of gradients would make it a batch, too.
                shape, dtype, device = grad_out.shape, grad_out.dtype, grad_out.device
                given[index] = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
        inputs = [tensor for tensor, need in zip(given, needs, strict=True) if need and tensor is not None]
        for index in (0, TERM - 1, TERM, 2 * TERM - 1):
            tensor = given[index]
            given[index] = None if tensor is None else as_image(tensor)
        grad_out = as_image(grad_out)
        if mask is None:
            out = composite(plan, given, states)
        else:
            slope, given[2 * TERM] = given[2 * TERM], None
            z = composite(plan._replace(kind="identity"), given, states)
            closed = torch.zeros_like(z) if slope is None else z * slope.to(z.dtype).view(1, -1, 1, 1)
            out = torch.where(unpack_bits(mask, z.shape[1]), z, closed)
        found = iter(torch.autograd.grad(out, inputs, grad_out.to(out.dtype), create_graph=again))
    return [next(found) if need else None for need in needs]
