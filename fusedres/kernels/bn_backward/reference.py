"""The three steps of BatchNorm's backward in plain PyTorch. All rows are one tile."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import masked, per_channel
from fusedres.values import BnGradient, Gated, Gradient, NormState, Raw


def _product(d: Tensor, x: Raw) -> Tensor:
    """Return Σ d·x̂ per channel."""
    assert x.state is not None  # checked by the op
    normalised = (x.y.to(d.dtype) - per_channel(x.state[0])) * per_channel(x.state[1])
    return (d * normalised).sum((0, 2, 3))


def bn_backward_reduce(gated: Gated, x: Raw, shortcut: Raw | None = None) -> Tensor:
    """See fusedres.ops.bn_backward."""
    assert x.state is not None  # checked by the op
    d = masked(*gated).to(x.state.dtype)
    sums = [d.sum((0, 2, 3)), *(_product(d, raw) for raw in (x, shortcut) if raw is not None)]
    return torch.stack(sums)[None]


def _coefficients(total: Tensor, product: Tensor, count: int, norm_state: NormState) -> Tensor:
    mean, invstd, scale, _ = norm_state.state
    if not norm_state.batch_statistics:
        total, product, invstd = (torch.zeros_like(mean) for _ in range(3))
    return torch.stack((scale, total / count, mean, invstd * (product / count)))


def bn_backward_coefficients(
    partials: Tensor, count: int, norm_state: NormState, shortcut_state: NormState | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    sums = partials.sum(0)
    coefficients = _coefficients(sums[0], sums[1], count, norm_state)
    if shortcut_state is None:
        return sums, coefficients, coefficients.new_empty(0)
    return sums, coefficients, _coefficients(sums[0], sums[2], count, shortcut_state)


def _branch(d: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
    a, c1, mean, k = (per_channel(row) for row in coefficients)
    pull = ((x.to(d.dtype) - mean) * k).masked_fill(k == 0, 0)  # constant statistics: 0 even if x is NaN
    return (a * (d - c1 - pull)).to(x.dtype).contiguous(memory_format=torch.channels_last)


def bn_backward_apply(gradient: Gradient, shortcut: BnGradient | None = None) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    grad, gate, y, coefficients = gradient
    assert y is not None and coefficients is not None  # checked by the op
    d = masked(grad, gate).to(coefficients.dtype)
    grad_y = _branch(d, y, coefficients)
    return grad_y, grad_y.new_empty(0) if shortcut is None else _branch(d, *shortcut)
