"""BatchNorm whose statistics are those of all processes of a group (SyncBatchNorm), in forward and in backward.

Each process reduces its own rows. Forward gathers (count, mean_k, M2_k) of every process k and merges them (Chan, Golub
and LeVeque 1983), as if they were tiles of one batch. Backward adds up (Σd, Σd·x̂, count):

    dy = scale·(d − Σd/M − x̂·Σd·x̂/M),    sums and M over all processes

The gradients of parameters stay those of the process's own rows, as in torch: DistributedDataParallel averages them.
Processes may have batches of different sizes, also empty ones. The same exchanges happen in the same order whichever
way a process computes its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedres.autograd.plan import ConvBN, OnePass
from fusedres.ops.launch import Launches, launches
from fusedres.values import Gradient, Gram, Norm, arithmetic_dtype, in_dtype, pixel_rows

# --- forward


class _Moments(NamedTuple):
    """Number, mean and sum of squared deviations of the rows of one process, per channel."""

    rows: int
    mean: Tensor
    m2: Tensor


def synchronised_state(y: Tensor, unit: ConvBN, norm: Norm, launch: Launches) -> Tensor:
    """Return the (4, C) state of a BatchNorm over the rows of all processes, and update its running statistics."""
    dtype, channels, count = arithmetic_dtype(y.dtype), y.shape[1], pixel_rows(y)
    mean, m2 = (y.new_zeros(channels, dtype=dtype) for _ in range(2))
    if count == 1:
        mean.copy_(y.flatten())
    elif count > 1:  # with momentum 1 the running statistics are those of the batch
        launch.bn_statistics(y, _probe(mean, m2, norm.eps))
        m2 *= count - 1
    means, m2s, counts = _gathered(_Moments(count, mean, m2), unit)
    return _merged(torch.stack([means, m2s], 1).to(dtype), counts.to(dtype), norm, launch)


def one_pass_state(
    gram: Gram, count: int, unit: ConvBN, weight: Tensor, norm: Norm, launch: Launches
) -> tuple[Tensor, Tensor]:
    """Return the state of a one-pass unit's BatchNorm, relative to this process's pivot, and W·Cov of its own rows.

    The pivots differ between processes, so means are exchanged without them, in float64.
    """
    dtype, channels = gram.pivot.dtype, weight.shape[0]
    mean, variance = (gram.pivot.new_zeros(channels) for _ in range(2))
    own, projected = launch.one_pass_statistics(weight, gram, count, _probe(mean, variance, norm.eps))
    taken = weight.detach().double().flatten(1) @ gram.pivot.double()  # W·t
    moments = _Moments(count, own[0].double() + taken, variance.double() * (count - 1))
    means, m2s, counts = _gathered(moments, unit)
    centred = Norm(norm.weight, norm.bias, mean, variance, None, 1.0, norm.eps)
    state = _merged(torch.stack([means - taken, m2s], 1).to(dtype), counts.to(dtype), centred, launch)
    _update(norm, mean.double() + taken, variance)
    return state, projected


def _merged(partials: Tensor, rows: Tensor, norm: Norm, launch: Launches) -> Tensor:
    """Return the state from the mean and M2 of every process; the CPU needs no kernel for so few numbers."""
    state: Tensor = (launches("reference") if partials.is_cpu else launch).bn_finalize(partials, rows, norm)
    return state


def _probe(mean: Tensor, variance: Tensor, eps: float) -> Norm:
    """Return a BatchNorm that writes the mean and the unbiased variance of a batch to these tensors."""
    return Norm(None, None, mean, variance, None, 1.0, eps)


def _gathered(moments: _Moments, unit: ConvBN) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and M2 (world, C) and the count (world,) of every process of the group, in float64."""
    own = torch.cat([moments.mean.double(), moments.m2.double(), moments.mean.new_tensor([moments.rows]).double()])
    every = own.new_empty((dist.get_world_size(unit.group), own.numel()))
    dist.all_gather(list(every), own, group=unit.group)
    channels = moments.mean.numel()
    return every[:, :channels], every[:, channels:-1], every[:, -1]


@torch.no_grad()
def _update(norm: Norm, mean: Tensor, variance: Tensor) -> None:
    """Update running statistics with the mean and the unbiased variance of a batch."""
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum: Tensor | float | None = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / norm.num_batches_tracked.double() if momentum is None else momentum
    assert momentum is not None
    for running, new in ((norm.running_mean, mean), (norm.running_var, variance)):
        running.copy_(running.double() * (1 - momentum) + new.double() * momentum)


# --- backward


def synchronised_coefficients(sums: Tensor, count: int, state: Tensor, unit: ConvBN) -> Tensor:
    """Return the coefficients (4, C) of Gradient from the sums (2, C) Σd and Σd·x̂ of this process's rows."""
    own = torch.cat([sums.double().flatten(), sums.new_tensor([count]).double()])
    dist.all_reduce(own, group=unit.group)
    sum_d, sum_product = (own[:-1] / own[-1]).to(state.dtype).view(2, -1)
    return torch.stack([state[2], sum_d, state[0], state[1] * sum_product])


def through_synchronised_norm(
    scaled: Tensor, sums: Tensor, y: Tensor, state: Tensor, unit: ConvBN, launch: Launches
) -> Tensor:
    """Return dy from scale·d, with d the masked gradient after the BatchNorm, and from its sums."""
    _, c1, mean, k = synchronised_coefficients(sums, pixel_rows(y), state, unit)
    coefficients = torch.stack([torch.ones_like(c1), state[2] * c1, mean, state[2] * k])
    dy: Tensor = launch.bn_backward_apply(Gradient(scaled, None, y, coefficients))[0]
    return dy


def one_pass_gradients(
    d: Tensor, sum_d: Tensor, z: Tensor, weight: Tensor, state: Tensor, saved: OnePass, unit: ConvBN
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of z', of the convolution's weight and of BatchNorm's weight; equations in ops.one_pass.

    With sums over all processes in c1 and c2, and s, Cov and G = dᵀz' over this process's M rows:

        Σdy = a⊙Σd − M·c1 − c2⊙(W·s − M·mean')
        dW = a⊙G − c1·sᵀ − c2⊙M·(W·Cov + (W·s/M − mean')·sᵀ/M) + Σdy·tᵀ
        dz = d·(a⊙W) − z'·Q + 1·(c2⊙mean' − c1)ᵀW

    Over all processes the Σdy add up to 0, but their pivots t differ.
    """
    wide = state.dtype
    count, in_channels = pixel_rows(z), z.shape[1]
    matrix = weight.detach().to(wide).flatten(1)
    d_rows, z_rows = (t.permute(0, 2, 3, 1).reshape(count, -1).to(wide) for t in (d, z))
    mean, invstd, scale, _ = state
    total = saved.total.to(wide)
    cross = d_rows.t() @ z_rows
    grad_norm = invstd * ((matrix * cross).sum(1) - mean * sum_d)
    _, c1, _, k = synchronised_coefficients(torch.stack([sum_d, grad_norm]), count, state, unit)
    c1, c2 = scale * c1, scale * k
    beyond = matrix @ total - count * mean
    moment = count * saved.projected + torch.outer(beyond / count, total)
    sum_dy = scale * sum_d - count * c1 - c2 * beyond
    grad_weight = scale[:, None] * cross - torch.outer(c1, total) - c2[:, None] * moment
    grad_weight += torch.outer(sum_dy, saved.pivot.to(wide))
    quadratic = matrix.t() @ (c2[:, None] * matrix)
    grad_rows = d_rows @ (scale[:, None] * matrix) - z_rows @ quadratic + (c2 * mean - c1) @ matrix
    grad_z = in_dtype(grad_rows, z.dtype).view(z.shape[0], *z.shape[2:], in_channels).permute(0, 3, 1, 2)
    return grad_z, in_dtype(grad_weight, weight.dtype).view(weight.shape), grad_norm
