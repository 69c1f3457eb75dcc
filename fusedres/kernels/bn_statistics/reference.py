"""Batch statistics in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.values import Norm, arithmetic_dtype


def bn_statistics(x: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    dtype = arithmetic_dtype(x.dtype)
    wide = x.to(dtype)
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)  # not var_mean: its mean of infinities is NaN
    update_running(mean, var, x.numel() // x.shape[1], norm)
    return normalisation(mean, var, norm.weight, norm.bias, norm.eps)


def bn_statistics_and_means(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_statistics."""
    return bn_statistics(x, norm), x.mean((2, 3), dtype=arithmetic_dtype(x.dtype))


def bn_statistics_of_sum_(x: Tensor, added: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    return bn_statistics(x.add_(added), norm)


def bn_finalize(partials: Tensor, rows: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    means, m2 = partials.unbind(1)
    pivot = torch.where(means[0].isfinite(), means[0], 0.0)  # small differences of large means stay exact
    shifted, weights, count = means - pivot, rows.unsqueeze(1), rows.sum()
    mean = (weights * shifted).sum(0) / count
    var = (m2 + weights * (shifted - mean).square()).sum(0) / count
    mean = mean + pivot
    update_running(mean, var, count, norm)
    return normalisation(mean, var, norm.weight, norm.bias, norm.eps)


def bn_from_moments(moments: Tensor, rows: int, norm: Norm, dtype: torch.dtype) -> Tensor:
    """See fusedres.ops.dense_block."""
    mean, var = moments[:, 0], moments[:, 1] / rows
    update_running(mean, var, rows, norm)
    return normalisation(mean, var, norm.weight, norm.bias, norm.eps).to(arithmetic_dtype(dtype))


def update_running(
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    norm: Norm,
) -> None:
    """Count the batch, and update the running statistics with the batch's mean and unbiased variance."""
    _, _, running_mean, running_var, num_batches_tracked, momentum, _ = norm
    if num_batches_tracked is not None:
        num_batches_tracked += 1
    if running_mean is None or running_var is None:
        return
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    else:
        assert num_batches_tracked is not None  # checked by the op
        factor = 1.0 / num_batches_tracked.to(mean.dtype)
    running_mean.copy_((1 - factor) * running_mean.to(mean.dtype) + factor * mean)
    running_var.copy_((1 - factor) * running_var.to(var.dtype) + factor * var * (count / (count - 1)))


def normalisation(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return (4, C): mean, invstd, scale, shift."""
    invstd = torch.rsqrt(var + eps)
    scale = invstd if weight is None else weight.to(mean.dtype) * invstd
    shift = -scale * mean if bias is None else bias.to(mean.dtype) - scale * mean
    return torch.stack((mean, invstd, scale, shift))


def bn_frozen(x: Tensor, norm: Norm) -> Tensor:
    """See fusedres.ops.bn_statistics."""
    weight, bias, running_mean, running_var, *_, eps = norm
    assert running_mean is not None and running_var is not None  # checked by the op
    dtype = arithmetic_dtype(x.dtype)
    return normalisation(running_mean.to(dtype), running_var.to(dtype), weight, bias, eps)
