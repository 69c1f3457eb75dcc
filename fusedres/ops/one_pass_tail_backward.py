"""Backward of the one-pass tail (ops.one_pass_tail), which has the raw output of the last convolution nowhere.

With z' = z − t the centred input (M×C), s = Σz', d the gradient that passes the ReLU (M×K), G = dᵀz' (K×C) and c2 of
ops.one_pass, everything follows:

    dz = d·W̃ − z'·Q̃ + (s/M)ᵀQ̃ − (Σd/M)ᵀW̃,  Q̃ = round(Wᵀ·diag(c2)·W)

The constants come from the rounded W̃ and Q̃, so that rounding cannot shift a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.one_pass_tail.reference import ROWS_A_PARTIAL
from fusedres.ops._arguments import ActivationDtype, Call, Integer, Row, activation, bits, dense, strided, wide
from fusedres.ops._library import op
from fusedres.ops._sizes import empty_activation
from fusedres.values import Centred, Gated, GramState

_GRADIENT: dict[str, Row] = {
    "z_stride": Integer(1),
    "grad": activation("N K P Q"),
    "gate": bits("N K P Q", required=True),
    "z": activation("N C P*z_stride Q*z_stride"),
    "z_state": wide("4 C"),
    "z_pivot": wide("C"),
}


@op(
    "one_pass_tail",
    {
        **_GRADIENT,
        "x_stride": Integer(1),
        "x": activation("N D P*x_stride Q*x_stride"),
        "x_pivot": wide("D", given_with="x"),
    },
)
def one_pass_reduce(
    gated: Gated, z: Centred, z_state: Tensor | None, x: Centred | None = None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """G = dᵀz' and Σd; with x also dᵀx', from the same read of d.

    Args:
        gated: (N, K, P, Q), with the mask of one_pass_tail as its gate.
        z, z_state, x: as in one_pass_tail.

    Returns:
        dᵀz' (K, C); dᵀx' (K, C'), (K, 0) without x; Σd (K,): float64 for float64, else float32, each the same bits at
        every call.
    """
    channels = gated.grad.shape[1]
    cross = z.pivot.new_empty((channels, z.z.shape[1]))
    return cross, cross.new_empty((channels, 0 if x is None else x.z.shape[1])), cross.new_empty(channels)


@op(
    "one_pass_tail",
    {
        "dtype": ActivationDtype(),
        "conv_weight": strided("K C 1 1", "floating"),
        "cross": wide("K C"),
        "sum_d": wide("K"),
        "folded": dense("K C", "x"),
        "state": wide("4 K"),
        "projected": wide("K C"),
        "total": dense("C", torch.float64),
        "count": Integer(1, 2**62),
    },
)
def one_pass_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    gram_state: GramState,
    count: int,
    dtype: torch.dtype,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What backward makes of the reductions: products no larger than C×C×K, whatever the batch.

    Args:
        cross, sum_d: dᵀz' (K, C) and Σd (K,) of one_pass_reduce.
        conv_weight, folded: (K, C, 1, 1), and its W̃ (K, C) of one_pass_fold.
        gram_state, count: of one_pass_statistics, and the number of rows.
        dtype: of the activations.

    Returns:
        The gradient of conv_weight, its shape, strides and dtype; dγ (K,); Q̃ (C, C) in dtype; dz's constant row (C,).
        dβ is sum_d.
    """
    channels = folded.shape[1]
    quadratic = folded.new_empty((channels, channels))
    return torch.empty_like(conv_weight), torch.empty_like(sum_d), quadratic, sum_d.new_empty(channels)


def _check_masked(call: Call) -> None:
    if call["masked"] and call["z_state"] is None:
        call.fail(ValueError, "masked", "be False without a state", "True", "there is no ReLU before z then")


@op(
    "one_pass_tail",
    {**_GRADIENT, "folded": dense("K C", "x"), "quadratic": dense("C C", "x"), "constant": wide("C")},
    relations=_check_masked,
)
def one_pass_dgrad(
    gated: Gated,
    z: Centred,
    z_state: Tensor | None,
    folded: Tensor,
    quadratic: Tensor,
    constant: Tensor,
    masked: bool = False,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dz = d·W̃ − z'·Q̃ + constant, at every stride-th pixel of z; d and z' as in one_pass_reduce.

    Args:
        gated, z, z_state: as in one_pass_reduce.
        folded: W̃ (K, C). quadratic, constant: Q̃ (C, C) and the constant row (C,) of one_pass_products.
        masked: also pass back through the ReLU before z: dz where NOT (scale·z + shift <= 0), else 0.

    Returns:
        dz (N, C, P, Q), an activation in z's dtype; with masked the partial sums (T, 2, C) of Σdz and Σdz·x̂, of dz as
        stored and x̂ = (z − mean)·invstd, over ROWS_A_PARTIAL rows each, float64 for float64, else float32; without
        it (0, 2, C).
    """
    n, _, p, q = gated.grad.shape
    channels = z.z.shape[1]
    tiles = (n * p * q + ROWS_A_PARTIAL - 1) // ROWS_A_PARTIAL if masked else 0
    return empty_activation((n, channels, p, q), z.z), z.pivot.new_empty((tiles, 2, channels))
