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
from torch import Tensor

from fusedres.autograd.composite_tail import differentiable_tail
from fusedres.autograd.excitation import EXCITATION_TENSORS, excitation_gradients, excite, normalised
from fusedres.autograd.graph import materialized, needs_composite, used_gradients
from fusedres.autograd.layout import in_format, suggests_channels_last
from fusedres.autograd.memory import has_memory, kept_on_error, refuse, to_channels_last
from fusedres.autograd.residual_block import count_path
from fusedres.autograd.saved import check_each
from fusedres.autograd.tail_plan import TERM, States, TailPlan, TermNorm, TermTensors, as_image, split
from fusedres.ops.launch import Launches, launches
from fusedres.values import Activation, Gated, Norm, TailCoefficients, TailNeeds, TailTerm, in_dtype, pixel_rows


def run_tail(plan: TailPlan, tensors: Sequence[Tensor | None], recorded: bool, owned: bool = False) -> Tensor:
    """Run a tail; recorded: autograd records it, as gradients are wanted; owned: else the branch's x may be written."""
    if recorded:
        result: Tensor = GatedTailFunction.apply(plan, *tensors)
        return result
    return _like_input(_forward(plan, tensors, False, owned).out, *_layout(_x_of(tensors)))


def _x_of(tensors: Sequence[Tensor | None]) -> Tensor:
    x = tensors[0]
    assert x is not None
    return x


def _layout(x: Tensor) -> tuple[bool, bool]:
    """Return whether an input is (N, C), and whether it is channels_last."""
    return x.dim() == 2, x.dim() == 4 and suggests_channels_last(x)


def _like_input(tensor: Tensor, flat: bool, channels_last: bool) -> Tensor:
    """Return a dense channels_last tensor in the shape and the memory format of an input."""
    return tensor.flatten(1) if flat else in_format(to_channels_last(tensor), channels_last)


def _arguments(tensors: TermTensors, norm: TermNorm) -> Norm:
    running = (tensors.running_mean, tensors.running_var, tensors.num_batches_tracked)
    if norm.batch_statistics and not norm.update:
        running = (None, None, None)
    return Norm(tensors.weight, tensors.bias, *running, norm.momentum, norm.eps)


def _state(x: Tensor, tensors: TermTensors, norm: TermNorm | None, launch: Launches) -> Tensor | None:
    """Return the (4, C) state of a term's BatchNorm, from the batch or from the running statistics."""
    if norm is None:
        return None
    state: Tensor = (launch.bn_statistics if norm.batch_statistics else launch.bn_frozen)(x, _arguments(tensors, norm))
    return state


def _state_and_means(x: Tensor, tensors: TermTensors, norm: TermNorm, launch: Launches) -> tuple[Tensor, Tensor]:
    """Return the state, and the means of x over the pixels (N, C), which an excitation is made of."""
    if norm.batch_statistics:
        state, means = launch.bn_statistics_and_means(x, _arguments(tensors, norm))
        return state, means
    state = launch.bn_frozen(x, _arguments(tensors, norm))
    return state, x.mean((2, 3), dtype=state.dtype)


def _terms(
    plan: TailPlan, tensors: Sequence[Tensor | None], states: States, grad: Tensor | None = None
) -> tuple[TailTerm, TailTerm | None]:
    """Return both terms; a gradient stands for an x that was not saved, as it is not read then."""
    found: list[TailTerm | None] = []
    for term, state in zip(split(tensors)[:2], states, strict=True):
        x = grad if term.x is None else to_channels_last(as_image(term.x))
        logits = None if term.logits is None else to_channels_last(as_image(term.logits))
        found.append(None if x is None else TailTerm(x, state, term.factor, logits))
    branch, shortcut = found
    assert branch is not None
    return branch, shortcut if plan.has_shortcut else None


class _Result(NamedTuple):
    out: Tensor
    mask: Tensor | None
    states: States
    means: Tensor | None  # of the branch's x over the pixels, and the factor that an excitation makes of them
    factor: Tensor | None


def _forward(plan: TailPlan, tensors: Sequence[Tensor | None], with_mask: bool, in_place: bool = False) -> _Result:
    launch = launches(plan.backend)
    _require_memory(tensors)
    branch, shortcut, slope = split(tensors)
    first, second = _terms(plan, tensors, (None, None))
    updated = [
        tensor
        for term, norm in zip((branch, shortcut), plan.norms, strict=True)
        if norm is not None and norm.update
        for tensor in term[3:6]
    ]
    with kept_on_error(updated):
        means = None
        if plan.excitation is None:
            first = first._replace(state=_state(first.x, branch, plan.norms[0], launch))
        else:
            assert plan.norms[0] is not None
            state, means = _state_and_means(first.x, branch, plan.norms[0], launch)
            factor = excite(normalised(means, state), tensors[2 * TERM + 1 :], plan.excitation)
            first = first._replace(state=state, factor=factor)
        if second is not None:
            second = second._replace(state=_state(second.x, shortcut, plan.norms[1], launch))
        activation = Activation(plan.kind, slope, plan.before_add)
        mask = None
        if in_place:
            out = first.x
            launch.gated_tail_(first, second, activation, plan.coupled)
        else:
            out, mask = launch.gated_tail(first, second, activation, plan.coupled, with_mask)
    count_path("tail_forward")
    return _Result(out, mask, (first.state, None if second is None else second.state), means, first.factor)


def _require_memory(tensors: Sequence[Tensor | None]) -> None:
    if torch.compiler.is_compiling():
        return
    for index, tensor in enumerate(tensors):
        if tensor is not None and not has_memory(tensor):
            names = [f"{term}'s {field}" for term in ("branch", "shortcut") for field in TermTensors._fields]
            names += ["slope", *(f"excitation tensor {number}" for number in range(EXCITATION_TENSORS))]
            refuse(names[index], tensor, "residual tail")


def _reads(plan: TailPlan, needs: Sequence[bool], with_mask: bool) -> tuple[bool, bool]:
    """Return whether backward reads the branch's x, and the shortcut's, for these gradients."""
    branch, shortcut = (TermTensors(*needs[:TERM]), TermTensors(*needs[TERM : 2 * TERM]))  # type: ignore[arg-type]
    again = not plan.is_plain_sum and not with_mask
    own = []
    for needed, norm in zip((branch, shortcut), plan.norms, strict=True):
        through = norm is not None and norm.batch_statistics and needed.x
        own.append(bool(through or needed.weight or needed.bias or needed.factor or needed.logits))
    own[0] = own[0] or plan.excitation is not None
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
        with_mask = plan.kind in ("relu", "leaky_relu") and not plan.before_add and not needs[2 * TERM]
        found = _forward(plan, tensors, with_mask)
        reads = _reads(plan, needs, with_mask)
        kept = list(tensors)
        for index, read in zip((0, TERM), reads, strict=True):
            if not read:
                kept[index] = None
        for first in (0, TERM):
            kept[first + 3 : first + 6] = [None] * 3  # running statistics: the state holds what backward needs
        kept[TERM - 2] = found.factor
        saved = (*kept, *found.states, found.mask if with_mask else None, found.means)
        ctx.plan, ctx.layouts = plan, [None if tensor is None else _layout(tensor) for tensor in tensors]
        ctx.saved = [None if tensor is None else (tensor.dtype, tensor.shape) for tensor in saved]
        ctx.save_for_backward(*saved)
        return _like_input(found.out, *_layout(_x_of(tensors)))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Run the fused backward, or torch's own operators if needs_composite says so."""
        plan: TailPlan = ctx.plan
        needs = used_gradients(ctx)[1:]
        saved = ctx.saved_tensors
        if needs_composite(grad_out):
            count_path("tail_composite_backward")
            *tensors, branch_state, shortcut_state, mask, _ = saved
            return (None, *differentiable_tail(plan, tensors, (branch_state, shortcut_state), mask, grad_out, needs))
        count_path("tail_backward")
        *tensors, branch_state, shortcut_state, mask, means = _checked(saved, ctx.saved, grad_out.device)
        grad_out = materialized(grad_out)
        grads = TailBackward(plan, tensors, (branch_state, shortcut_state), mask, grad_out, needs, means).run()
        for index in (0, TERM - 1, TERM, 2 * TERM - 1):
            grad = grads[index]
            # The gradient of out that is passed on stays the same tensor, so that autograd knows that it is shared.
            if grad is not None and grad is not grad_out:
                grads[index] = _like_input(grad, *ctx.layouts[index])
        return (None, *grads)


def _checked(saved: Sequence[Any], kinds: Sequence[Any], device: torch.device) -> list[Tensor | None]:
    """Return saved tensors as kernels read them; raise if one is not what was saved, as hooks may return others."""
    found = [("a saved tensor", t, *kind) for t, kind in zip(saved, kinds, strict=True) if kind is not None]
    check_each("backward of a residual tail", device, found)
    # Images are made dense where they are read; a mask has 4 dimensions, too, but is read as it is.
    return [
        tensor if tensor is None or (tensor.dim() == 4 and tensor.is_floating_point()) else tensor.contiguous()
        for tensor in saved
    ]


class TailBackward:
    """One backward of a tail: the gradients of its tensors, in the order of `split`."""

    def __init__(
        self,
        plan: TailPlan,
        tensors: Sequence[Tensor | None],
        states: States,
        mask: Tensor | None,
        grad_out: Tensor,
        needs: Sequence[bool],
        means: Tensor | None = None,
    ) -> None:
        self.plan, self.needs, self.states = plan, needs, states
        self.excitation, self.means = tensors[2 * TERM + 1 :], means
        self.grad_out = grad_out
        grad = to_channels_last(as_image(grad_out))
        self.branch, self.shortcut, slope = split(tensors)
        self.slope = slope
        terms = _terms(plan, tensors, states, grad)
        self.gated = Gated(grad, mask)
        self.activation = Activation(plan.kind, slope, plan.before_add)
        self.terms: tuple[TailTerm, TailTerm | None] = (terms[0], terms[1] if self._uses_shortcut(terms[1]) else None)
        self.grads: list[Tensor | None] = [None] * len(needs)
        self.launch = launches(plan.backend)

    def _uses_shortcut(self, shortcut: TailTerm | None) -> bool:
        """Return whether a kernel has to know the shortcut: not if its gradient is that of out, or not needed."""
        if shortcut is None:
            return False
        again = not self.plan.is_plain_sum and self.gated.gate is None
        needed = any(self.needs[TERM : 2 * TERM])
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
            self.needs[TERM] and shortcut is not None,
            self.needs[TERM - 1] or self.needs[2 * TERM - 1],
        )
        if self.plan.has_shortcut and self.needs[TERM] and shortcut is None:
            self.grads[TERM] = self.grad_out
        if any(needs) and not self._branch_passes_on(needs):
            applied = self.launch.gated_tail_apply(
                self.gated, branch, shortcut, self.activation, self.plan.coupled, coefficients, needs
            )
            for index, grad in zip((0, TERM - 1, TERM, 2 * TERM - 1), applied, strict=True):
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
        with_slope = self.needs[2 * TERM]
        sums = self.launch.gated_tail_reduce(self.gated, *self.terms, self.activation, self.plan.coupled, with_slope)
        sums = sums[:, 0] if sums.shape[1] == 1 else sums.sum(1)
        if with_slope and self.slope is not None:
            scaled = self.plan.before_add and self.branch.factor is not None
            of_slope = sums[:, 5] * self.branch.factor if scaled else sums[:, 5]
            self.grads[2 * TERM] = of_slope.sum(0).to(self.slope.dtype)
        of_factor = sums[:, 4] if self.plan.before_add else None
        first = self._of_term(0, sums[:, 0], sums[:, 1], of_factor)
        second = self._of_term(1, sums[:, 3], sums[:, 2], None) if self.terms[1] is not None else None
        if second is None and self.states[1] is not None:
            second = _constant(self.states[1])
        return TailCoefficients(first, second)

    def _needs_sums(self) -> bool:
        if self.needs[2 * TERM]:
            return True
        for index, norm in enumerate(self.plan.norms):
            needed = self.needs[index * TERM : (index + 1) * TERM]
            if index == 0 and self.plan.excitation is not None:
                return True
            if any(needed[1:3]) or needed[6] or (norm is not None and norm.batch_statistics and needed[0]):
                return True
        return False

    def _of_term(self, index: int, total: Tensor, product: Tensor, of_factor: Tensor | None) -> Tensor | None:
        """Set the gradients of a term's factor and BatchNorm; return its coefficients.

        total and product: Σ and Σ·x̂ (G, C) of the gradient of the normalised x, without the factor.
        """
        tensors, norm, state = (self.branch, self.shortcut)[index], self.plan.norms[index], self.states[index]
        first = index * TERM
        excites = index == 0 and self.plan.excitation is not None
        of_pixel: Tensor | None = None  # what the gradient of each pixel of BN(x) gets through the excitation
        if tensors.factor is not None and (self.needs[first + 6] or excites):
            if of_factor is None:
                of_factor = product
                if tensors.weight is not None:
                    of_factor = of_factor * tensors.weight.to(product.dtype)
                if tensors.bias is not None:
                    of_factor = of_factor + tensors.bias.to(product.dtype) * total
            if excites and state is not None:
                of_pixel = self._through_excitation(of_factor, state)
            else:
                self.grads[first + 6] = of_factor if tensors.factor.shape[0] > 1 else of_factor.sum(0, keepdim=True)
        if tensors.factor is not None:
            total, product = total * tensors.factor, product * tensors.factor
        if of_pixel is not None and state is not None and self.means is not None:
            of_all = of_pixel * (pixel_rows(self.gated.grad) // len(of_pixel))
            total, product = total + of_all, product + of_all * (self.means - state[0]) * state[1]
        total, product = (sums[0] if sums.shape[0] == 1 else sums.sum(0) for sums in (total, product))
        for offset, parameter, grad in ((1, tensors.weight, product), (2, tensors.bias, total)):
            if parameter is not None and self.needs[first + offset]:
                self.grads[first + offset] = in_dtype(grad, parameter.dtype)
        if norm is None or state is None:
            return None
        coefficients = _constant(state)
        if norm.batch_statistics:
            count = pixel_rows(self.gated.grad)
            mean, invstd, scale, _ = state.unbind()
            coefficients = torch.stack([scale, total / count, mean, invstd * product / count])[None]
        if of_pixel is not None:
            coefficients = coefficients.repeat(len(of_pixel), 1, 1)
            coefficients[:, 1] -= of_pixel
        return coefficients

    def _through_excitation(self, grad: Tensor, state: Tensor) -> Tensor:
        """Set the gradients of the excitation's tensors; return what each pixel's gradient of BN(x) gets through it."""
        dtype, first = self.plan.excitation, 2 * TERM + 1
        assert dtype is not None and self.means is not None
        pooled = normalised(self.means, state)
        of_pooled, self.grads[first:] = excitation_gradients(pooled, self.excitation, dtype, grad, self.needs[first:])
        return of_pooled / (pixel_rows(self.gated.grad) // len(of_pooled))


def _constant(state: Tensor) -> Tensor:
    """Return the coefficients of a BatchNorm with constant statistics."""
    nothing = torch.zeros_like(state[0])
    return torch.stack([state[2], nothing, state[0], nothing])[None]
