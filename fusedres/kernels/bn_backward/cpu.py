"""The steps of BatchNorm's backward one by one in C++, with the two passes of csrc/bn_add_relu_backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import branch_of, gate_of, matrix_of
from fusedres.kernels.bn_backward import reference
from fusedres.kernels.cpu_core import empty_like
from fusedres.values import BnBranch, BnGradient, Gated, Gradient, Raw

bn_backward_coefficients = reference.bn_backward_coefficients


def bn_backward_reduce(gated: Gated, x: Raw, shortcut: Raw | None = None) -> Tensor:
    """See fusedres.ops.bn_backward."""
    branches = [None if raw is None else _branch(raw) for raw in (x, shortcut)]
    assert x.state is not None  # checked by the op
    sums = x.state.new_zeros((1, 2 if shortcut is None else 3, x.y.shape[1]))
    gate, threads = gate_of(gated.gate), torch.get_num_threads()
    at = [branch_of(branch, None) for branch in branches]
    _C.bn_add_relu_backward(matrix_of(gated.grad), gate, *at, sums.data_ptr(), True, False, 0, threads)
    return sums


def _branch(raw: Raw) -> BnBranch:
    assert raw.state is not None  # checked by the op
    return BnBranch(raw.y, raw.state, True)


def bn_backward_apply(gradient: Gradient, shortcut: BnGradient | None = None) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    assert gradient.y is not None and gradient.coefficients is not None  # checked by the op
    gated, branch = Gated(gradient.grad, gradient.gate), BnGradient(gradient.y, gradient.coefficients)
    if shortcut is None:
        grad_y = _apply(gated, branch)[0]
        return grad_y, grad_y.new_empty(0)
    if torch.equal(branch.coefficients[1], shortcut.coefficients[1]):  # one pass has one Σd
        grad_y, grad_shortcut = _apply(gated, branch, shortcut)
        return grad_y, grad_shortcut
    return _apply(gated, branch)[0], _apply(gated, shortcut)[0]


def _apply(gated: Gated, *branches: BnGradient) -> list[Tensor]:
    """Return the gradients of one or two branches in one pass."""
    constant = [_constant_channels(each) for each in branches]
    if not all(channels.all() or not channels.any() for channels in constant):
        return [reference.bn_backward_apply(Gradient(*gated, *each))[0] for each in branches]
    rows = gated.grad.numel() // gated.grad.shape[1]
    results = [empty_like(each.y) for each in branches]
    states = [_state(each) for each in branches]
    at = [
        branch_of(BnBranch(each.y, state, not still.all()), result)
        for each, state, still, result in zip(branches, states, constant, results, strict=True)
    ]
    at += [branch_of(None, None)] * (2 - len(at))
    # The pass divides sums by the rows.
    sums = torch.stack([branches[0].coefficients[1], *(each.coefficients[3] for each in branches)]).mul_(rows)
    threads = torch.get_num_threads()
    _C.bn_add_relu_backward(matrix_of(gated.grad), gate_of(gated.gate), *at, sums.data_ptr(), False, True, 0, threads)
    return results


def _constant_channels(gradient: BnGradient) -> Tensor:
    """Return where the gradient is a·d alone, and must not depend on y."""
    return (gradient.coefficients[1] == 0) & (gradient.coefficients[3] == 0)


def _state(gradient: BnGradient) -> Tensor:
    """Return a state of which the pass makes these coefficients: mean, invstd 1, scale a."""
    a, _, mean, _ = gradient.coefficients
    return torch.stack([mean, torch.ones_like(mean), a, torch.zeros_like(mean)])
