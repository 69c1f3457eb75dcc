"""Statistics that were taken tile by tile, merged, and everything BatchNorm derives from them per channel."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops._arguments import channels, wide
from fusedres.ops._library import Op
from fusedres.ops.bn_statistics import check_momentum


def _fake(partials: Tensor, *_: object) -> Tensor:
    return partials.new_empty((4, partials.shape[2]))


BN_FINALIZE = Op(
    "bn_finalize(Tensor partials, Tensor rows, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str backend) -> Tensor",
    "bn_statistics",
    {"partials": wide("T 2 C"), "rows": wide("T"), **channels("C")},
    _fake,
    check_momentum,
)


def bn_finalize(
    partials: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    backend: str,
) -> Tensor:
    """bn_statistics of a batch whose rows were reduced tile by tile, as a convolution does on store.

    With n_t rows, mean μ_t and M2_t = Σ(x − μ_t)² of tile t: μ = Σ n_t·μ_t / Σ n_t and
    σ² = (Σ M2_t + Σ n_t·(μ_t − μ)²) / Σ n_t (Chan, Golub and LeVeque 1983); the rest as in bn_statistics.

    Args:
        partials: (T, 2, C): mean and M2 of each tile; float32 or float64.
        rows: (T,) like partials: the rows of each tile. Their sum is more than 1, which is not looked at: it is on
            the device.
        weight, bias: (C,) or None (1 and 0).
        running_mean, running_var: (C,) or None; updated in place with the averaging factor, the variance unbiased.
        num_batches_tracked: () int64 or None; incremented in place.
        momentum: averaging factor; None: 1 / num_batches_tracked, computed on the device.
        eps: added to the variance.
        backend: "reference", "triton" or "cuda".

    Returns:
        (4, C) like partials: mean, invstd, scale, shift.

    Raises:
        ValueError: a wrong shape. TypeError: a wrong dtype. RuntimeError: a device mix. The running statistics are
        untouched then.
    """
    state: Tensor = BN_FINALIZE(
        partials, rows, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, backend
    )
    return state
