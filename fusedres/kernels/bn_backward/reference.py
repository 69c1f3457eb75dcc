"""The three steps of BatchNorm's backward in plain PyTorch; the partials are one tile."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import gated, per_channel


def _product(d: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """Σ d·x̂ per channel."""
    normalised = (x.to(d.dtype) - per_channel(state[0])) * per_channel(state[1])
    return (d * normalised).sum((0, 2, 3))


def bn_backward_reduce(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
) -> Tensor:
    """See fusedres.ops.bn_backward."""
    d = gated(grad, gate).to(state.dtype)
    sums = [d.sum((0, 2, 3)), _product(d, x, state)]
    if shortcut_x is not None and shortcut_state is not None:
        sums.append(_product(d, shortcut_x, shortcut_state))
    return torch.stack(sums)[None]


def _coefficients(total: Tensor, product: Tensor, count: int, state: Tensor, batch_statistics: bool) -> Tensor:
    mean, invstd, scale, _ = state
    if not batch_statistics:
        total, product, invstd = (torch.zeros_like(mean) for _ in range(3))
    return torch.stack((scale, total / count, mean, invstd * (product / count)))


def bn_backward_coefficients(
    partials: Tensor,
    count: int,
    state: Tensor,
    batch_statistics: bool,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    sums = partials.sum(0)
    coefficients = _coefficients(sums[0], sums[1], count, state, batch_statistics)
    if shortcut_state is None:
        return sums, coefficients, state.new_empty(0)
    return sums, coefficients, _coefficients(sums[0], sums[2], count, shortcut_state, shortcut_batch_statistics)


def _branch(d: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
    a, c1, mean, k = (per_channel(row) for row in coefficients)
    pull = ((x.to(d.dtype) - mean) * k).masked_fill(k == 0, 0)  # constant statistics: whatever x is
    return (a * (d - c1 - pull)).to(x.dtype).contiguous(memory_format=torch.channels_last)


def bn_backward_apply(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    shortcut_x: Tensor | None,
    shortcut_coefficients: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    d = gated(grad, gate).to(coefficients.dtype)
    grad_x = _branch(d, x, coefficients)
    if shortcut_x is None or shortcut_coefficients is None:
        return grad_x, x.new_empty(0)
    return grad_x, _branch(d, shortcut_x, shortcut_coefficients)
