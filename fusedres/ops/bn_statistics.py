"""Batch statistics of a convolution's output, and everything BatchNorm derives from them per channel."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops._arguments import Call, activation, channels
from fusedres.ops._library import Op
from fusedres.ops._sizes import arithmetic_dtype


def _check_values(call: Call) -> None:
    x = call["x"]
    if x.numel() // x.shape[1] <= 1:
        # torch's own words, so that callers which match them go on working
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    check_momentum(call)


def check_momentum(call: Call) -> None:
    """There is something to average the running statistics with."""
    if call["momentum"] is None and call["running_mean"] is not None and call["num_batches_tracked"] is None:
        expected = "be a number where num_batches_tracked is None"
        call.fail(ValueError, "momentum", expected, "None", "pass num_batches_tracked for the cumulative average")


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((4, x.shape[1]), dtype=arithmetic_dtype(x))


BN_STATISTICS = Op(
    "bn_statistics(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum, float eps, str backend) -> Tensor",
    "bn_statistics",
    {"x": activation("N C H W"), **channels("C")},
    _fake,
    _check_values,
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
