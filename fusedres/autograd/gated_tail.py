"""The gated residual tail (ops.gated_tail) as one autograd Function, with the BatchNorms of both terms.

    out = act(s⊙F + c⊙S)        or        s⊙act(F) + c⊙S        F and S as they are, or BatchNorm of them

Which tensors a tail has, and its constants, are a TailPlan; every residual design is one. Saved is the least that the
gradients need: x and S only where some gradient is made of them, and one bit for each element of a ReLU after the add.
What the reduction over a batch gives is per group of rows with the same factors (G, C); the gradients of factors and of
BatchNorm's parameters follow from it here, as sums over groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.autograd.graph import materialized, needs_composite, used_gradients
from fusedres.autograd.layout import in_format, suggests_channels_last
from fusedres.autograd.memory import has_memory, kept_on_error, to_channels_last
from fusedres.autograd.residual_block import as_saved, count_path
from fusedres.kernels.reference_core import unpack_bits
from fusedres.ops.launch import Launches, launches
from fusedres.values import Activation, Gated, Norm, TailCoefficients, TailNeeds, TailTerm, in_dtype, pixel_rows


class TermTensors(NamedTuple):
    """The tensors of one term; all but x are optional. Factors are (1 or N, C) in the arithmetic type."""

    x: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    factor: Tensor | None = None
    logits: Tensor | None = None


class TermNorm(NamedTuple):
    """The settings of a term's BatchNorm."""

    batch_statistics: bool
    update: bool
    momentum: float | None
    eps: float


class TailPlan(NamedTuple):
    """The constants of one call of a tail."""

    norms: tuple[TermNorm | None, TermNorm | None]  # of the branch, of the shortcut
    has_shortcut: bool
    kind: str
    before_add: bool
    coupled: bool
    backend: str

    @property
    def is_plain_sum(self) -> bool:
        """Whether the gradient of the sum of both terms is that of out."""
        return self.before_add or self.kind == "identity"


_TERM = len(TermTensors._fields)
_States = tuple[Tensor | None, Tensor | None]


def split(tensors: Sequence[Tensor | None]) -> tuple[TermTensors, TermTensors, Tensor | None]:
    """Return the branch's tensors, the shortcut's, and the slope, from the flat order of the Function's inputs."""
    return TermTensors(*tensors[:_TERM]), TermTensors(*tensors[_TERM : 2 * _TERM]), tensors[2 * _TERM]


def run_tail(plan: TailPlan, tensors: Sequence[Tensor | None], recorded: bool) -> Tensor:
    """Run a tail; recorded: autograd records it, as gradients are wanted."""
    if recorded:
        result: Tensor = GatedTailFunction.apply(plan, *tensors)
        return result
    out, _, _ = _forward(plan, tensors, False)
    return in_format(out, suggests_channels_last(_x_of(tensors)))


def _x_of(tensors: Sequence[Tensor | None]) -> Tensor:
    x = tensors[0]
    assert x is not None
    return x


def _state(x: Tensor, tensors: TermTensors, norm: TermNorm | None, launch: Launches) -> Tensor | None:
    """Return the (4, C) state of a term's BatchNorm, from the batch or from the running statistics."""
    if norm is None:
        return None
    running = (tensors.running_mean, tensors.running_var, tensors.num_batches_tracked)
    if norm.batch_statistics and not norm.update:
        running = (None, None, None)
    arguments = Norm(tensors.weight, tensors.bias, *running, norm.momentum, norm.eps)
    state: Tensor = (launch.bn_statistics if norm.batch_statistics else launch.bn_frozen)(x, arguments)
    return state


def _terms(
    plan: TailPlan, tensors: Sequence[Tensor | None], states: _States, grad: Tensor | None = None
) -> tuple[TailTerm, TailTerm | None]:
    """Return both terms; a gradient stands for an x that was not saved, as it is not read then."""
    found: list[TailTerm | None] = []
    for term, state in zip(split(tensors)[:2], states, strict=True):
        x = grad if term.x is None else to_channels_last(term.x)
        logits = None if term.logits is None else to_channels_last(term.logits)
        found.append(None if x is None else TailTerm(x, state, term.factor, logits))
    branch, shortcut = found
    assert branch is not None
    return branch, shortcut if plan.has_shortcut else None


def _forward(plan: TailPlan, tensors: Sequence[Tensor | None], with_mask: bool) -> tuple[Tensor, Tensor, _States]:
    launch = launches(plan.backend)
    _require_memory(tensors)
    branch, shortcut, slope = split(tensors)
    x = to_channels_last(_x_of(tensors))
    s = None if shortcut.x is None else to_channels_last(shortcut.x)
    updated = [
        tensor
        for term, norm in zip((branch, shortcut), plan.norms, strict=True)
        if norm is not None and norm.update
        for tensor in term[3:6]
    ]
    with kept_on_error(updated):
        states = (
            _state(x, branch, plan.norms[0], launch),
            None if s is None else _state(s, shortcut, plan.norms[1], launch),
        )
        terms = _terms(plan, tensors, states)
        activation = Activation(plan.kind, slope, plan.before_add)
        out, mask = launch.gated_tail(*terms, activation, plan.coupled, with_mask)
    count_path("tail_forward")
    return out, mask, states


def _require_memory(tensors: Sequence[Tensor | None]) -> None:
    if torch.compiler.is_compiling():
        return
    names = [f"{term}'s {field}" for term in ("branch", "shortcut") for field in TermTensors._fields]
    for name, tensor in zip([*names, "slope"], tensors, strict=True):
        if tensor is not None and not has_memory(tensor):
            raise RuntimeError(
                f"residual tail: {name} must have memory for its shape {tuple(tensor.shape)}, got a storage of "
                f"{tensor.untyped_storage().nbytes()} bytes; allocate it before the call (it was freed or resized)"
            )


def _reads(plan: TailPlan, needs: Sequence[bool], with_mask: bool) -> tuple[bool, bool]:
    """Return whether backward reads the branch's x, and the shortcut's, for these gradients."""
    branch, shortcut = (TermTensors(*needs[:_TERM]), TermTensors(*needs[_TERM : 2 * _TERM]))  # type: ignore[arg-type]
    again = not plan.is_plain_sum and not with_mask
    own = []
    for needed, norm in zip((branch, shortcut), plan.norms, strict=True):
        through = norm is not None and norm.batch_statistics and needed.x
        own.append(bool(through or needed.weight or needed.bias or needed.factor or needed.logits))
    crossed = plan.coupled and bool(branch.logits)
    first = own[0] or again or (plan.before_add and plan.kind != "identity")
    return first, plan.has_shortcut and (own[1] or again or crossed)


class GatedTailFunction(torch.autograd.Function):
    """See the head of this file; the inputs are a TailPlan and the tensors in the order of `split`."""

    @staticmethod
    def forward(ctx: Any, plan: TailPlan, *tensors: Tensor | None) -> Tensor:
        """Run the tail; what backward needs is kept by save_for_backward alone."""
        needs = [tensor is not None and tensor.requires_grad for tensor in tensors]
        # The slope's gradient is a sum of z itself, so z is computed again.
        with_mask = plan.kind in ("relu", "leaky_relu") and not plan.before_add and not needs[2 * _TERM]
        out, mask, states = _forward(plan, tensors, with_mask)
        reads = _reads(plan, needs, with_mask)
        x = _x_of(tensors)
        ctx.plan, ctx.formats = (
            plan,
            [tensor is not None and tensor.dim() == 4 and suggests_channels_last(tensor) for tensor in tensors],
        )
        kept = list(tensors)
        for index, read in zip((0, _TERM), reads, strict=True):
            if not read:
                kept[index] = None
        for first in (0, _TERM):
            kept[first + 3 : first + 6] = [None] * 3  # running statistics: the state holds what backward needs
        ctx.save_for_backward(*kept, *states, mask if with_mask else None)
        return in_format(out, suggests_channels_last(x))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Run the fused backward, or torch's own operators if needs_composite says so."""
        plan: TailPlan = ctx.plan
        needs = used_gradients(ctx)[1:]
        *tensors, branch_state, shortcut_state, mask = ctx.saved_tensors
        states = (branch_state, shortcut_state)
        if needs_composite(grad_out):
            count_path("tail_composite_backward")
            grads = _differentiable(plan, tensors, states, mask, grad_out, needs)
        else:
            count_path("tail_backward")
            grads = _Backward(plan, tensors, states, mask, materialized(grad_out), needs).run()
            for index, (grad, channels_last) in enumerate(zip(grads, ctx.formats, strict=True)):
                if grad is not None and grad.dim() == 4:
                    grads[index] = in_format(to_channels_last(grad), channels_last)
        return (None, *grads)


class _Backward:
    """One backward of a tail: the gradients of its tensors, in the order of `split`."""

    def __init__(
        self,
        plan: TailPlan,
        tensors: Sequence[Tensor | None],
        states: _States,
        mask: Tensor | None,
        grad_out: Tensor,
        needs: Sequence[bool],
    ) -> None:
        self.plan, self.needs, self.states = plan, needs, states
        self.grad_out = grad_out
        grad = to_channels_last(grad_out)
        tensors = [None if tensor is None else materialized(tensor) for tensor in tensors]
        self.branch, self.shortcut, slope = split(tensors)
        self.slope = slope
        terms = _terms(plan, tensors, (as_saved(states[0]), as_saved(states[1])), grad)
        self.gated = Gated(grad, None if mask is None else mask.contiguous())
        self.activation = Activation(plan.kind, slope, plan.before_add)
        self.terms: tuple[TailTerm, TailTerm | None] = (terms[0], terms[1] if self._uses_shortcut(terms[1]) else None)
        self.grads: list[Tensor | None] = [None] * len(needs)
        self.launch = launches(plan.backend)

    def _uses_shortcut(self, shortcut: TailTerm | None) -> bool:
        """Return whether a kernel has to know the shortcut: not if its gradient is that of out, or not needed."""
        if shortcut is None:
            return False
        again = not self.plan.is_plain_sum and self.gated.gate is None
        needed = any(self.needs[_TERM : 2 * _TERM])
        return again or self.plan.coupled or (needed and not self._passes_on(shortcut))

    def _passes_on(self, shortcut: TailTerm) -> bool:
        """Return whether the shortcut's gradient is that of out."""
        plain = shortcut.state is None and shortcut.factor is None and shortcut.logits is None
        return self.plan.is_plain_sum and plain and not self.plan.coupled

    def run(self) -> list[Tensor | None]:
        """Return the gradients; what is not needed stays None."""
        coefficients = self._small_gradients()
        branch, shortcut = self.terms
        needs = TailNeeds(
            self.needs[0],
            self.needs[_TERM] and shortcut is not None,
            self.needs[_TERM - 1] or self.needs[2 * _TERM - 1],
        )
        if self.plan.has_shortcut and self.needs[_TERM] and shortcut is None:
            self.grads[_TERM] = self.grad_out
        if any(needs) and not self._branch_passes_on(needs):
            applied = self.launch.gated_tail_apply(
                self.gated, branch, shortcut, self.activation, self.plan.coupled, coefficients, needs
            )
            for index, grad in zip((0, _TERM - 1, _TERM, 2 * _TERM - 1), applied, strict=True):
                if self.needs[index] and grad.numel() == self.grad_out.numel():
                    self.grads[index] = grad
        return self.grads

    def _branch_passes_on(self, needs: TailNeeds) -> bool:
        """Take the gradient of out for the branch's where it is that, and nothing else is to be written."""
        branch = self.terms[0]
        scaled = branch.state is not None or branch.factor is not None or branch.logits is not None
        if scaled or self.plan.kind != "identity" or needs.needs_shortcut or needs.needs_logits:
            return False
        self.grads[0] = self.grad_out
        return True

    def _small_gradients(self) -> TailCoefficients:
        """Set the gradients of vectors; return the coefficients for those of the terms."""
        if not self._needs_sums():
            return TailCoefficients(*(None if state is None else _constant(state) for state in self.states))
        with_slope = self.needs[2 * _TERM]
        sums = self.launch.gated_tail_reduce(
            self.gated, *self.terms, self.activation, self.plan.coupled, with_slope
        ).sum(1)
        if with_slope and self.slope is not None:
            scaled = self.plan.before_add and self.branch.factor is not None
            of_slope = sums[:, 5] * self.branch.factor if scaled else sums[:, 5]
            self.grads[2 * _TERM] = of_slope.sum(0).to(self.slope.dtype)
        of_factor = sums[:, 4] if self.plan.before_add else None
        first = self._of_term(0, sums[:, 0], sums[:, 1], of_factor)
        second = self._of_term(1, sums[:, 3], sums[:, 2], None) if self.terms[1] is not None else None
        if second is None and self.states[1] is not None:
            second = _constant(self.states[1])
        return TailCoefficients(first, second)

    def _needs_sums(self) -> bool:
        if self.needs[2 * _TERM]:
            return True
        for index, norm in enumerate(self.plan.norms):
            needed = self.needs[index * _TERM : (index + 1) * _TERM]
            if any(needed[1:3]) or needed[6] or (norm is not None and norm.batch_statistics and needed[0]):
                return True
        return False

    def _of_term(self, index: int, total: Tensor, product: Tensor, of_factor: Tensor | None) -> Tensor | None:
        """Set the gradients of a term's factor and BatchNorm; return its coefficients.

        total and product: Σ and Σ·x̂ (G, C) of the gradient of the normalised x, without the factor.
        """
        tensors, norm, state = (self.branch, self.shortcut)[index], self.plan.norms[index], self.states[index]
        first = index * _TERM
        if tensors.factor is not None and self.needs[first + 6]:
            if of_factor is None:
                of_factor = product
                if tensors.weight is not None:
                    of_factor = of_factor * tensors.weight.to(product.dtype)
                if tensors.bias is not None:
                    of_factor = of_factor + tensors.bias.to(product.dtype) * total
            self.grads[first + 6] = of_factor if tensors.factor.shape[0] > 1 else of_factor.sum(0, keepdim=True)
        if tensors.factor is not None:
            total, product = total * tensors.factor, product * tensors.factor
        total, product = total.sum(0), product.sum(0)
        for offset, parameter, grad in ((1, tensors.weight, product), (2, tensors.bias, total)):
            if parameter is not None and self.needs[first + offset]:
                self.grads[first + offset] = in_dtype(grad, parameter.dtype)
        if norm is None or state is None:
            return None
        if not norm.batch_statistics:
            return _constant(state)
        count = pixel_rows(self.gated.grad)
        return torch.stack([state[2], total / count, state[0], state[1] * product / count])


def _constant(state: Tensor) -> Tensor:
    """Return the coefficients of a BatchNorm with constant statistics."""
    nothing = torch.zeros_like(state[0])
    return torch.stack([state[2], nothing, state[0], nothing])


# --- torch's own operators


def composite(plan: TailPlan, tensors: Sequence[Tensor | None], states: _States | None = None) -> Tensor:
    """Return the tail by torch's own operators.

    With states, running statistics are neither read nor updated: a constant state says what they were.
    """
    branch, shortcut, slope = split(tensors)
    value = _composite_term(branch, plan.norms[0], None if states is None else states[0])
    if plan.before_add:
        value = _activated(value, plan.kind, slope)
    gate = None if branch.logits is None else branch.logits.sigmoid()
    total = _scaled(value, branch.factor, gate)
    if plan.has_shortcut:
        other = None if shortcut.logits is None else shortcut.logits.sigmoid()
        if plan.coupled and gate is not None:
            other = 1 - gate
        added = _composite_term(shortcut, plan.norms[1], None if states is None else states[1])
        total = total + _scaled(added, shortcut.factor, other)
    return total if plan.before_add else _activated(total, plan.kind, slope)


def _composite_term(tensors: TermTensors, norm: TermNorm | None, state: Tensor | None) -> Tensor:
    x, weight, bias = tensors[:3]
    assert x is not None
    if norm is None:
        return x
    if state is not None and not norm.batch_statistics:
        normalised = (x.to(state.dtype) - state[0].view(1, -1, 1, 1)) * state[1].view(1, -1, 1, 1)
        for parameter, apply in ((weight, torch.mul), (bias, torch.add)):
            if parameter is not None:
                normalised = apply(normalised, parameter.to(state.dtype).view(1, -1, 1, 1))
        return normalised.to(x.dtype)
    mean, var = (tensors.running_mean, tensors.running_var) if state is None else (None, None)
    momentum = norm.momentum or 0.0
    if state is None and norm.update and tensors.num_batches_tracked is not None:
        tensors.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(tensors.num_batches_tracked)
    if norm.batch_statistics and not norm.update:
        mean = var = None
    return F.batch_norm(x, mean, var, weight, bias, norm.batch_statistics, momentum, norm.eps)


def _scaled(value: Tensor, factor: Tensor | None, gate: Tensor | None) -> Tensor:
    if factor is not None:
        value = value * factor.to(value.dtype)[:, :, None, None]
    return value if gate is None else value * gate


def _activated(z: Tensor, kind: str, slope: Tensor | None) -> Tensor:
    if slope is not None:
        return F.prelu(z, slope.to(z.dtype))
    return z if kind == "identity" else getattr(F, kind)(z)


def _differentiable(
    plan: TailPlan,
    tensors: Sequence[Tensor | None],
    states: _States,
    mask: Tensor | None,
    grad_out: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again, of what was saved.

    An x that was not saved is not in any gradient: zeros take its place.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        for index, present in ((0, True), (_TERM, plan.has_shortcut)):
            if present and given[index] is None:
                given[index] = torch.zeros_like(grad_out).requires_grad_()
        if mask is None:
            out = composite(plan, given, states)
        else:
            z = composite(plan._replace(kind="identity"), [*given[:-1], None], states)
            slope = given[-1]
            closed = torch.zeros_like(z) if slope is None else z * slope.to(z.dtype).view(1, -1, 1, 1)
            out = torch.where(unpack_bits(mask, z.shape[1]), z, closed)
        inputs = [tensor for tensor, need in zip(given, needs, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(out, inputs, grad_out.to(out.dtype), create_graph=again))
    return [next(found) if need else None for need in needs]
