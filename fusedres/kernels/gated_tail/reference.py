"""The gated residual tail in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres.kernels.reference_core import affine, pack_bits, per_channel, unpack_bits
from fusedres.values import Activation, Gated, TailCoefficients, TailNeeds, TailTerm, arithmetic_dtype, tail_groups

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda d, z: d.masked_fill(z <= 0, 0),
    "silu": torch.ops.aten.silu_backward,
    "hardswish": torch.ops.aten.hardswish_backward,
    "gelu": torch.ops.aten.gelu_backward,
}


def _activate(z: Tensor, activation: Activation) -> Tensor:
    if activation.slope is not None:
        return torch.where(z > 0, z, z * per_channel(activation.slope))
    return z if activation.kind == "identity" else _FORWARD[activation.kind](z)


def _activate_backward(d: Tensor, z: Tensor, activation: Activation) -> Tensor:
    if activation.slope is not None:
        return torch.where(z > 0, d, d * per_channel(activation.slope))
    return d if activation.kind == "identity" else _BACKWARD[activation.kind](d, z)


def _value(term: TailTerm) -> Tensor:
    """Return the term without factor and gate, in the arithmetic type."""
    return term.x.to(arithmetic_dtype(term.x.dtype)) if term.state is None else affine(term.x, term.state)


def _gates(branch: TailTerm, shortcut: TailTerm | None, coupled: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return σ_s and σ_c; None where they are 1."""
    wide = arithmetic_dtype(branch.x.dtype)
    gate = None if branch.logits is None else branch.logits.to(wide).sigmoid()
    if coupled and branch.logits is not None:
        return gate, (-branch.logits.to(wide)).sigmoid()
    other = None if shortcut is None or shortcut.logits is None else shortcut.logits.to(wide).sigmoid()
    return gate, other


def _scaled(value: Tensor, factor: Tensor | None, gate: Tensor | None) -> Tensor:
    if factor is not None:
        value = value * factor[:, :, None, None]
    return value if gate is None else value * gate


def _stored(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype, copy=True).contiguous(memory_format=torch.channels_last)


def gated_tail(
    branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.gated_tail."""
    gate, other = _gates(branch, shortcut, coupled)
    value = _value(branch)
    if activation.before_add:
        value = _activate(value, activation)
    z = _scaled(value, branch.factor, gate)
    if shortcut is not None:
        z = z + _scaled(_value(shortcut), shortcut.factor, other)
    mask = branch.x.new_empty(0, dtype=torch.uint8)
    if with_mask:
        mask = pack_bits(z > 0 if activation.kind == "leaky_relu" else ~(z <= 0))
    return _stored(z if activation.before_add else _activate(z, activation), branch.x), mask


def gated_tail_(branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool) -> None:
    """See fusedres.ops.gated_tail."""
    branch.x.copy_(gated_tail(branch, shortcut, activation, coupled, False)[0])


class _Gradients(NamedTuple):
    """The values of fusedres.ops.gated_tail_reduce."""

    e: Tensor
    q: Tensor
    p: Tensor
    branch: Tensor  # A
    shortcut: Tensor | None  # S
    of_slope: Tensor
    gates: tuple[Tensor | None, Tensor | None]


def _gradients(
    gated: Gated, branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool
) -> _Gradients:
    gates = gate, other = _gates(branch, shortcut, coupled)
    normalised, added = _value(branch), None if shortcut is None else _value(shortcut)
    d = gated.grad.to(normalised.dtype)
    value = _activate(normalised, activation) if activation.before_add else normalised
    e, of_slope = d, d
    if gated.gate is not None:
        closed = d.new_zeros(()) if activation.slope is None else d * per_channel(activation.slope)
        e = torch.where(unpack_bits(gated.gate, d.shape[1]), d, closed)
    elif not activation.before_add:
        z = _scaled(value, branch.factor, gate)
        if shortcut is not None and added is not None:
            z = z + _scaled(added, shortcut.factor, other)
        e, of_slope = _activate_backward(d, z, activation), torch.where(z > 0, 0, z * d)
    q = p = e
    if gate is not None:
        q = q * gate
    if activation.before_add:
        of_slope = torch.where(normalised > 0, 0, normalised * q)
        q = _activate_backward(q, normalised, activation)
    if other is not None:
        p = p * other
    return _Gradients(e, q, p, value, added, of_slope, gates)


def _centred(term: TailTerm) -> Tensor:
    """Return x̂: the normalised x, without weight and bias; x itself without a state."""
    x = term.x.to(arithmetic_dtype(term.x.dtype))
    return x if term.state is None else (x - per_channel(term.state[0])) * per_channel(term.state[1])


def gated_tail_reduce(
    gated: Gated,
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool,
    with_slope: bool,
) -> Tensor:
    """See fusedres.ops.gated_tail."""
    found = _gradients(gated, branch, shortcut, activation, coupled)
    products: list[Tensor | None] = [found.q, found.q * _centred(branch), None, None, None, None]
    if shortcut is not None and (shortcut.state is not None or shortcut.factor is not None):
        products[2:4] = found.p * _centred(shortcut), found.p
    if activation.before_add and branch.factor is not None:
        products[4] = found.e * found.branch
    if with_slope:
        products[5] = found.of_slope
    nothing = torch.zeros_like(found.q[:, :, 0, 0])
    sums = torch.stack([nothing if product is None else product.sum((2, 3)) for product in products], 1)  # (N, 6, C)
    if tail_groups(branch, shortcut) == 1:
        sums = sums.sum(0, keepdim=True)
    return sums[:, None].contiguous()


def _through_norm(d: Tensor, term: TailTerm, coefficients: Tensor | None) -> Tensor:
    if term.factor is not None:
        d = d * term.factor[:, :, None, None]
    if coefficients is None:
        return _stored(d, term.x)
    a, c1, mean, k = (row[:, :, None, None] for row in coefficients.unbind(1))
    pull = ((term.x.to(d.dtype) - mean) * k).masked_fill(k == 0, 0)  # constant statistics: 0 even if x is NaN
    return _stored(a * (d - c1 - pull), term.x)


def gated_tail_apply(
    gated: Gated,
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool,
    tail_coefficients: TailCoefficients,
    tail_needs: TailNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gated_tail."""
    found = _gradients(gated, branch, shortcut, activation, coupled)
    gate, other = found.gates
    empty = branch.x.new_empty(0)
    grad_x, grad_logits, grad_shortcut, grad_shortcut_logits = empty, empty.clone(), empty.clone(), empty.clone()
    if tail_needs.needs_branch:
        grad_x = _through_norm(found.q, branch, tail_coefficients.branch_coefficients)
    if tail_needs.needs_shortcut and shortcut is not None:
        grad_shortcut = _through_norm(found.p, shortcut, tail_coefficients.shortcut_coefficients)
    if tail_needs.needs_logits and gate is not None:
        term = found.branch - found.shortcut if coupled and found.shortcut is not None else found.branch
        grad_logits = _stored(found.e * term * gate * (1 - gate), branch.x)
    if tail_needs.needs_logits and not coupled and other is not None and found.shortcut is not None:
        grad_shortcut_logits = _stored(found.e * found.shortcut * other * (1 - other), branch.x)
    return grad_x, grad_logits, grad_shortcut, grad_shortcut_logits
