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
from torch import Tensor

from fusedres.ops._arguments import Call, Integer, activation, channels, dense, strided, wide
from fusedres.ops._library import Op
from fusedres.ops.bn_statistics import check_momentum


def _check_count(call: Call) -> None:
    if call["count"] <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got {call['count']} rows")
    check_momentum(call)


def _fake_statistics(conv_weight: Tensor, pivot: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    channels, in_channels = conv_weight.shape[:2]
    return pivot.new_empty((4, channels)), pivot.new_empty((channels, in_channels))


ONE_PASS_STATISTICS = Op(
    "one_pass_statistics(Tensor conv_weight, Tensor pivot, Tensor total, Tensor gram, int count, Tensor? weight, "
    "Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, float eps, str backend) -> (Tensor, Tensor)",
    "one_pass",
    {
        "conv_weight": strided("K C 1 1", "floating"),
        "pivot": wide("C"),
        "total": dense("C", torch.float64),
        "gram": dense("C C", torch.float64),
        "count": Integer(0, 2**62),
        **channels("K"),
    },
    _fake_statistics,
    _check_count,
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
    backend: str,
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
    state, projected = ONE_PASS_STATISTICS(
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
        backend,
    )
    return state, projected


def _fake_backward(
    d: Tensor,
    sum_d: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    with_input: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_z = torch.empty_like(z, memory_format=torch.channels_last) if with_input else z.new_empty(0)
    return grad_z, torch.empty_like(conv_weight, memory_format=torch.contiguous_format), torch.empty_like(sum_d)


ONE_PASS_BACKWARD = Op(
    "one_pass_backward(Tensor d, Tensor sum_d, Tensor z, Tensor conv_weight, Tensor state, Tensor projected, "
    "Tensor total, bool with_input, str backend) -> (Tensor, Tensor, Tensor)",
    "one_pass",
    {
        "d": activation("N K H W", empty=False),
        "sum_d": wide("K"),
        "conv_weight": strided("K C 1 1", "floating"),
        "z": activation("N C H W"),
        "state": wide("4 K"),
        "projected": wide("K C"),
        "total": dense("C", torch.float64),
    },
    _fake_backward,
)


def one_pass_backward(
    d: Tensor,
    sum_d: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    backend: str,
    with_input: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of BatchNorm(conv1x1(z)) with batch statistics, without the convolution's output.

    Args:
        d: (N, K, H, W) channels_last, the masked gradient. sum_d: (K,), its column sums (ops.relu_backward).
        z: (N, C, H, W) channels_last, z' of ops.gram.
        conv_weight: (K, C, 1, 1).
        state, projected: of one_pass_statistics. total: (C,), s of ops.gram.
        with_input: also make grad_z, which takes two of the three large products.

    Returns:
        grad_z like z, an empty tensor without with_input; the gradient of conv_weight; dγ (K,). dβ is sum_d.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    grad_z, grad_conv, grad_weight = ONE_PASS_BACKWARD(
        d, sum_d, z, conv_weight, state, projected, total, with_input, backend
    )
    return grad_z, grad_conv, grad_weight
