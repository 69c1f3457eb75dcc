"""The affine map of a BatchNorm whose statistics are constants."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops._arguments import dense, strided
from fusedres.ops._library import Op
from fusedres.ops._sizes import arithmetic_dtype


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, *_: object) -> Tensor:
    return x.new_empty((4, running_mean.shape[0]), dtype=arithmetic_dtype(x))


BN_FROZEN = Op(
    "bn_frozen(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, "
    "str backend) -> Tensor",
    "bn_statistics",
    {
        "x": strided(None, "x"),  # its dtype and device alone
        "running_mean": dense("C", "floating"),
        "running_var": dense("C", "floating"),
        "weight": dense("C", "floating"),
        "bias": dense("C", "floating"),
    },
    _fake,
)


def bn_frozen(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    backend: str,
) -> Tensor:
    """The (4, C) state of a BatchNorm in eval mode: mean, invstd, scale, shift from its running statistics.

    Args:
        x: any tensor of the dtype and device of the activation that will be normalised.
        weight, bias: (C,) or None (1 and 0).
        running_mean, running_var: (C,), left as they are.
        eps: added to the variance.
        backend: "reference", "cpu", "triton" or "cuda".

    Returns:
        (4, C), float64 for float64 x, else float32; a copy, so later updates of the running statistics do not reach it.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape, dtype or device.
    """
    state: Tensor = BN_FROZEN(x, weight, bias, running_mean, running_var, eps, backend)
    return state
