"""The one-pass tail: a block's last 1x1 convolution, BatchNorm, shortcut and ReLU in one GEMM, and its backward.

The statistics of the convolution's output are known before it runs (ops.gram_statistics, ops.one_pass_statistics), so
BatchNorm folds into its weight. With z' = z − t the centred input (M×C), rounded to its dtype, a = scale, s = Σz':

    W̃ = round(a⊙W)        b = β − W̃·s/M        out = relu(z'·W̃ᵀ + b + S)

A projection shortcut joins the same sum as x'·W̃ₓᵀ + bₓ. The raw output of the last convolution does not exist. With d
the gradient that passes the ReLU (M×K), G = dᵀz' (K×C) and c2 of ops.one_pass, backward is

    dz = d·W̃ − z'·Q̃ + (s/M)ᵀQ̃ − (Σd/M)ᵀW̃,  Q̃ = round(Wᵀ·diag(c2)·W)

The constants come from the rounded W̃ and Q̃, so that rounding cannot shift a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.one_pass_tail.reference import ROWS_A_PARTIAL
from fusedres.ops._arguments import (
    ActivationDtype,
    Call,
    Integer,
    Rows,
    activation,
    bits,
    dense,
    shortcut_input,
    strided,
    wide,
)  # fmt: skip
from fusedres.ops._library import op
from fusedres.ops._sizes import empty_activation
from fusedres.values import Centred, Folded, Gated, GramState, ShortcutInput, mask_shape, subsampled

_INPUT: Rows = {
    "z_stride": Integer(1),
    "z": activation("N C P*z_stride Q*z_stride"),
    "z_state": wide("4 C"),
    "z_pivot": wide("C"),
}


@op(
    "one_pass_tail",
    {
        "dtype": ActivationDtype(),
        "conv_weight": strided("K C 1 1", "floating"),
        "state": wide("4 K"),
        "total": dense("C", torch.float64),
        "count": Integer(1, 2**62),
    },
)
def one_pass_fold(
    conv_weight: Tensor, state: Tensor, total: Tensor, count: int, dtype: torch.dtype, *, backend: str
) -> tuple[Tensor, Tensor]:
    """BatchNorm folded into the 1x1 convolution before it: BN(z·Wᵀ) = z'·W̃ᵀ + b.

    Args:
        conv_weight: (K, C, 1, 1), floating point: the master weight, rounded once, here.
        state: of one_pass_statistics.
        total, count: s (C,) of gram_statistics, and the number of rows in it.
        dtype: of the activations.

    Returns:
        W̃ (K, C) in dtype, contiguous; b (K,) in the state's dtype.
    """
    channels, in_channels = conv_weight.shape[:2]
    return conv_weight.new_empty((channels, in_channels), dtype=dtype), state.new_empty(channels)


def _check_shortcut(call: Call) -> None:
    if call["shortcut"] is None and call["x"] is None:
        call.fail(ValueError, "shortcut", "be given where x is None", "None", "pass exactly one of the two")


@op(
    "one_pass_tail",
    {
        **_INPUT,
        "folded": dense("K C", "x"),
        "offset": wide("K"),
        **shortcut_input("K", not_with="x"),
        "x_stride": Integer(1),
        "x": activation("N D P*x_stride Q*x_stride"),
        "x_pivot": wide("D", given_with="x"),
        "x_folded": dense("K D", "x", given_with="x"),
        "x_folded_offset": wide("K", given_with="x"),
    },
    relations=_check_shortcut,
)
def one_pass_tail(
    z: Centred,
    z_state: Tensor | None,
    folded: Folded,
    shortcut: ShortcutInput | None,
    x: Centred | None,
    x_folded: Folded | None,
    with_mask: bool = False,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """relu(z'·W̃ᵀ + b + S): convolution, BatchNorm, shortcut and ReLU of a residual block's tail (He et al. 2015).

    z' is that of Centred, for relu(scale·z + shift) with a state, for z itself without one. S is the shortcut; or,
    where x is given instead, the projection x'·W̃ₓᵀ + bₓ, summed up in the same accumulator.

    Args:
        z: its pivot is of gram_statistics, (C,), float64 for float64 z, else float32.
        z_state: of the BatchNorm before z's ReLU; None: z is the convolution's input itself.
        folded, x_folded: of one_pass_fold.
        shortcut, x: exactly one of the two is given.
        with_mask: also return the ReLU's mask.

    Returns:
        out (N, K, P, Q), an activation in z's dtype; the packed bits (N, P, Q, ceil(K / 8)) uint8 of bn_add_relu, an
        empty tensor without with_mask.
    """
    n, _, h, w = z.z.shape
    out = empty_activation((n, folded.folded.shape[0], subsampled(h, z.stride), subsampled(w, z.stride)), z.z)
    return out, out.new_empty(mask_shape(out) if with_mask else (0,), dtype=torch.uint8)


_GRADIENT: Rows = {"grad": activation("N K P Q"), "gate": bits("N K P Q", required=True), **_INPUT}


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
