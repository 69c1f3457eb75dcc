"""Batch statistics of a convolution's output, and everything BatchNorm derives from them per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops import _checks
from fusedres.ops._library import Op


def _check_bn_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    backend: str,
) -> None:
    _checks.activation("bn_statistics", "x", x, backend)
    channels = x.shape[1]
    count = x.numel() // max(channels, 1)
    if count <= 1:
        # torch's own words, so that callers which match them go on working
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    check_channel_arguments(
        "bn_statistics", weight, bias, running_mean, running_var, num_batches_tracked, momentum, channels, x
    )


def check_channel_arguments(
    op: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    channels: int,
    like: Tensor,
) -> None:
    """What BatchNorm keeps per channel, and how it averages."""
    _checks.channel_vector(op, "weight", weight, channels, like)
    _checks.channel_vector(op, "bias", bias, channels, like)
    _checks.channel_vector(op, "running_mean", running_mean, channels, like)
    _checks.channel_vector(op, "running_var", running_var, channels, like)
    if num_batches_tracked is not None:
        _checks.dense(op, "num_batches_tracked", num_batches_tracked, (), torch.int64, like)
    elif momentum is None and running_mean is not None:
        raise ValueError(
            f"{op}: momentum must be a number where num_batches_tracked is None, got None; "
            "pass num_batches_tracked for the cumulative average"
        )


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((4, x.shape[1]), dtype=_checks.arithmetic_dtype(x))


BN_STATISTICS = Op(
    "bn_statistics(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum, float eps, str backend) -> Tensor",
    "bn_statistics",
    _check_bn_statistics,
    _fake,
)


def bn_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    backend: str,
) -> Tensor:
    """Per-channel statistics of a batch, and the affine map that normalises it.

    mean μ and biased variance σ² over the N·H·W values of a channel; r = (σ² + eps)^-½; scale = weight·r;
    shift = bias − scale·μ, so that BatchNorm(x) = scale·x + shift (Ioffe and Szegedy 2015).

    Args:
        x: (N, C, H, W), channels_last; float32, float64, bfloat16 or float16.
        weight, bias: (C,) or None (1 and 0).
        running_mean, running_var: (C,) or None; updated in place with the averaging factor, the variance unbiased.
        num_batches_tracked: () int64 or None; incremented in place.
        momentum: averaging factor; None: 1 / num_batches_tracked, computed on the device.
        eps: added to the variance.
        backend: "reference", "cpu" or "triton".

    Returns:
        (4, C): mean, invstd, scale, shift; float64 for float64 x, else float32.

    Raises:
        ValueError: one value a channel, or a wrong shape. TypeError: a wrong dtype. RuntimeError: a device mix. The
        running statistics are untouched then.
    """
    state: Tensor = BN_STATISTICS(
        x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, backend
    )
    return state
