"""BatchNorm of a 1x1 convolution from its input's Gram matrix: statistics before it runs, gradients without its output.

With z' = z − t the centred input (M×C), W the weight (K×C), s = Σz', G_z = z'ᵀz', Cov = G_z/M − (s/M)(s/M)ᵀ:

    mean' = W·s/M          var = diag(W·Cov·Wᵀ)

and with d the masked output gradient (M×K), G = dᵀz', a = scale, r = invstd, c1 = a·Σd/M, c2 = a·r·dγ/M:

    dγ = r·(rowsum(W⊙G) − mean'·Σd)
    dW = a⊙G − c1·sᵀ − c2⊙M·(W·Cov)
    dz = d·(a⊙W) − z'·Q + (s/M)ᵀQ − (Σd/M)ᵀ(a⊙W),  Q = Wᵀ·diag(c2)·W

BatchNorm with batch statistics does not change when z is shifted by t, so all of it holds for z' as for z; only
running_mean takes W·t back in. The convolution's own output is neither saved nor needed in backward.
"""

from __future__ import annotations

import torch
from fusedres.ops import _checks
from fusedres.ops._library import define
from torch import Tensor

# Up to this many multiplications W·Cov is taken in float64: it costs little there and var then cannot cancel.
_FLOAT64_PRODUCTS = 1 << 24


def _one_pass_statistics(
    conv_weight: Tensor,
    pivot: Tensor,
    total: Tensor,
    gram: Tensor,
    count: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    op = "one_pass_statistics"
    channels, in_channels = conv_weight.shape[:2]
    _checks.dense(op, "pivot", pivot, (in_channels,), pivot.dtype, conv_weight)
    _checks.dense(op, "total", total, (in_channels,), pivot.dtype, conv_weight)
    _checks.dense(op, "gram", gram, (in_channels, in_channels), pivot.dtype, conv_weight)
    for name, vector in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        _checks.channel_vector(op, name, vector, channels, conv_weight)
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got {count} rows")
    dtype = torch.float64 if channels * in_channels * in_channels <= _FLOAT64_PRODUCTS else pivot.dtype
    matrix = conv_weight.detach().reshape(channels, in_channels).to(dtype)
    centre = total.to(dtype) / count
    cov = torch.addr(gram.to(dtype) / count, centre, centre, alpha=-1)
    projected = matrix @ cov
    mean = matrix @ centre
    var = (projected * matrix).sum(1).clamp_(min=0)
    if num_batches_tracked is not None:
        num_batches_tracked += 1
    if running_mean is not None and running_var is not None:
        factor = momentum if momentum is not None else 1.0 / num_batches_tracked  # type: ignore[operator]
        running_mean.copy_((1 - factor) * running_mean + factor * (mean + matrix @ pivot.to(dtype)))
        running_var.copy_((1 - factor) * running_var + factor * var * (count / (count - 1)))
    invstd = torch.rsqrt(var + eps)
    scale = invstd if weight is None else weight.to(dtype) * invstd
    shift = -scale * mean if bias is None else bias.to(dtype) - scale * mean
    return torch.stack((mean, invstd, scale, shift)).to(pivot.dtype), projected.to(pivot.dtype)


def _fake_statistics(conv_weight: Tensor, pivot: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    channels, in_channels = conv_weight.shape[:2]
    return pivot.new_empty((4, channels)), pivot.new_empty((channels, in_channels))


_statistics_op = define(
    "one_pass_statistics(Tensor conv_weight, Tensor pivot, Tensor total, Tensor gram, int count, Tensor? weight, "
    "Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, float eps) -> (Tensor, Tensor)",
    _one_pass_statistics,
    _fake_statistics,
)


def one_pass_statistics(
    conv_weight: Tensor,
    pivot: Tensor,
    total: Tensor,
    gram: Tensor,
    count: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """State of the BatchNorm after a 1x1 convolution, from the Gram matrix of the convolution's input.

    Args:
        conv_weight: (K, C, 1, 1), floating point.
        pivot, total, gram: t (C,), s (C,), G_z (C, C) of ops.gram.
        count: M, the rows behind them; more than 1.
        weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps: as in bn_statistics; the running
            statistics are those of the convolution of z, not of z'.

    Returns:
        state (4, K) for the convolution of z': mean', invstd, scale, shift; and W·Cov (K, C) for the backward.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape, dtype or device; the running statistics are untouched then.
    """
    state, projected = _statistics_op(
        conv_weight,
        pivot,
        total,
        gram,
        count,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
    )
    return state, projected


def _one_pass_backward(
    d: Tensor, sum_d: Tensor, z: Tensor, conv_weight: Tensor, state: Tensor, projected: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    op = "one_pass_backward"
    _checks.same_kind(op, "z", z, "d", d)
    channels, in_channels = conv_weight.shape[:2]
    dtype = state.dtype
    _checks.dense(op, "state", state, (4, channels), dtype, d)
    _checks.dense(op, "projected", projected, (channels, in_channels), dtype, d)
    _checks.dense(op, "total", total, (in_channels,), dtype, d)
    _checks.dense(op, "sum_d", sum_d, (channels,), dtype, d)
    if d.shape[1] != channels or z.shape[1] != in_channels or d.shape[2:] != z.shape[2:]:
        raise ValueError(
            f"{op}: d and z must have shapes (N, {channels}, H, W) and (N, {in_channels}, H, W) for the weight "
            f"{tuple(conv_weight.shape)}, got {tuple(d.shape)} and {tuple(z.shape)}"
        )
    rows_d = d.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    rows_z = z.permute(0, 2, 3, 1).reshape(-1, in_channels).to(dtype)
    count = rows_z.shape[0]
    matrix = conv_weight.detach().reshape(channels, in_channels).to(dtype)
    mean, invstd, scale, _ = state
    cross = rows_d.T @ rows_z
    grad_weight = invstd * torch.addcmul((matrix * cross).sum(1), mean, sum_d, value=-1)
    c1 = scale * sum_d / count
    c2 = scale * invstd * grad_weight / count
    grad_conv = torch.addr(scale.unsqueeze(1) * cross, c1, total, alpha=-1)
    grad_conv.addcmul_(c2.unsqueeze(1), projected, value=-count)
    scaled = scale.unsqueeze(1) * matrix
    quadratic = (matrix * c2.unsqueeze(1)).T @ matrix
    constant = (total @ quadratic - sum_d @ scaled) / count
    grad_z = torch.addmm(constant, rows_d, scaled).addmm_(rows_z, quadratic, alpha=-1)
    n, _, h, w = z.shape
    grad_z = grad_z.to(z.dtype).view(n, h, w, in_channels).permute(0, 3, 1, 2)
    return grad_z, grad_conv.view(conv_weight.shape).to(conv_weight.dtype), grad_weight


def _fake_backward(
    d: Tensor, sum_d: Tensor, z: Tensor, conv_weight: Tensor, state: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    grad_conv = torch.empty_like(conv_weight, memory_format=torch.contiguous_format)
    return torch.empty_like(z, memory_format=torch.channels_last), grad_conv, torch.empty_like(sum_d)


_backward_op = define(
    "one_pass_backward(Tensor d, Tensor sum_d, Tensor z, Tensor conv_weight, Tensor state, Tensor projected, "
    "Tensor total) -> (Tensor, Tensor, Tensor)",
    _one_pass_backward,
    _fake_backward,
)


def one_pass_backward(
    d: Tensor, sum_d: Tensor, z: Tensor, conv_weight: Tensor, state: Tensor, projected: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of BatchNorm(conv1x1(z)) with batch statistics, without the convolution's output.

    Args:
        d: (N, K, H, W) channels_last, the masked gradient. sum_d: (K,), its column sums (ops.relu_backward).
        z: (N, C, H, W) channels_last, z' of ops.gram.
        conv_weight: (K, C, 1, 1).
        state, projected: of one_pass_statistics. total: (C,), s of ops.gram.

    Returns:
        grad_z like z; the gradient of conv_weight; dγ (K,). dβ is sum_d.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    grad_z, grad_conv, grad_weight = _backward_op(d, sum_d, z, conv_weight, state, projected, total)
    return grad_z, grad_conv, grad_weight
