"""The state of a BatchNorm: from a batch, from partial statistics of a batch, or from the running statistics."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops._arguments import Call, activation, norm, strided, wide
from fusedres.ops._library import op
from fusedres.values import Norm, arithmetic_dtype

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def check_momentum(call: Call) -> None:
    """There is something to average the running statistics with."""
    if call["momentum"] is None and call["running_mean"] is not None and call["num_batches_tracked"] is None:
        expected = "be a number where num_batches_tracked is None"
        call.fail(ValueError, "momentum", expected, "None", "pass num_batches_tracked for the cumulative average")


def _check_values(call: Call) -> None:
    x = call["x"]
    if x.numel() // x.shape[1] <= 1:
        # torch's own words, so that callers which match them go on working
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    check_momentum(call)


@op("bn_statistics", {"x": activation("N C H W"), **norm("C")}, writes=RUNNING, relations=_check_values)
def bn_statistics(x: Tensor, norm: Norm, *, backend: str) -> Tensor:
    """Per-channel statistics of a batch, and the affine map that normalises it.

    mean μ and biased variance σ² over the N·H·W values of a channel; r = (σ² + eps)^-½; scale = weight·r;
    shift = bias − scale·μ, so that BatchNorm(x) = scale·x + shift (Ioffe and Szegedy 2015). The running statistics are
    updated in place, with the unbiased variance; after an error they are untouched.

    Returns:
        (4, C): mean, invstd, scale, shift; float64 for float64 x, else float32.
    """
    return x.new_empty((4, x.shape[1]), dtype=arithmetic_dtype(x.dtype))


@op("bn_statistics", {"x": activation("N C H W"), **norm("C")}, writes=RUNNING, relations=_check_values)
def bn_statistics_and_means(x: Tensor, norm: Norm, *, backend: str) -> tuple[Tensor, Tensor]:
    """bn_statistics, and the mean over the pixels of each sample and channel, from one pass over x.

    With p = scale·means + shift this is the pool of BatchNorm(x) that squeeze-and-excitation needs (Hu et al. 2018).

    Returns:
        the state (4, C), and the means (N, C); float64 for float64 x, else float32.
    """
    dtype = arithmetic_dtype(x.dtype)
    return x.new_empty((4, x.shape[1]), dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


@op(
    "bn_statistics",
    {"x": activation("N C H W"), "added": activation("N C H W"), **norm("C")},
    writes=("x", *RUNNING),
    relations=_check_values,
)
def bn_statistics_of_sum_(x: Tensor, added: Tensor, norm: Norm, *, backend: str) -> Tensor:
    """x += added, and bn_statistics of the sum: the add of one block and the statistics of the next in one pass.

    The statistics are those of the sum as it is rounded to x's dtype.
    """
    return x.new_empty((4, x.shape[1]), dtype=arithmetic_dtype(x.dtype))


@op(
    "bn_statistics",
    {"partials": wide("T 2 C"), "rows": wide("T"), **norm("C")},
    writes=RUNNING,
    relations=check_momentum,
)
def bn_finalize(partials: Tensor, rows: Tensor, norm: Norm, *, backend: str) -> Tensor:
    """bn_statistics of a batch whose rows were reduced tile by tile, as a convolution does on store.

    With n_t rows, mean μ_t and M2_t = Σ(x − μ_t)² of tile t: μ = Σ n_t·μ_t / Σ n_t and
    σ² = (Σ M2_t + Σ n_t·(μ_t − μ)²) / Σ n_t (Chan, Golub and LeVeque 1983); the rest as in bn_statistics.

    `partials` (T, 2, C) has mean and M2 of each tile, and `rows` (T,) its rows. Their sum must be more than 1; that is
    not checked, as it is on the device.
    """
    return partials.new_empty((4, partials.shape[2]))


@op("bn_statistics", {"x": strided(None, "x"), **norm("C", running=True)})
def bn_frozen(x: Tensor, norm: Norm, *, backend: str) -> Tensor:
    """The state of a BatchNorm in eval mode, a copy that later updates of the running statistics do not change.

    x is any tensor with the dtype and device of the activation that will be normalised.
    """
    assert norm.running_mean is not None  # checked by the op
    return x.new_empty((4, norm.running_mean.shape[0]), dtype=arithmetic_dtype(x.dtype))
