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
from fusedres.ops._arguments import (
    ActivationDtype,
    Call,
    Integer,
    Row,
    activation,
    bits,
    dense,
    strided,
    wide,
)
from fusedres.ops._library import Op

_GRADIENT: dict[str, Row] = {
    "stride": Integer(1),
    "grad": activation("N K P Q"),
    "gate": bits("N K P Q"),
    "z": activation("N C P*stride Q*stride"),
    "state": wide("4 C"),
    "pivot": wide("C"),
}


def _fake_reduce(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    stride: int,
    x: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = grad.shape[1]
    cross = pivot.new_empty((channels, z.shape[1]))
    return cross, pivot.new_empty((channels, 0 if x is None else x.shape[1])), pivot.new_empty(channels)


ONE_PASS_REDUCE = Op(
    "one_pass_reduce(Tensor grad, Tensor gate, Tensor z, Tensor? state, Tensor pivot, int stride, Tensor? x, "
    "Tensor? x_pivot, int x_stride, str backend) -> (Tensor, Tensor, Tensor)",
    "one_pass_tail",
    {
        **_GRADIENT,
        "x_stride": Integer(1),
        "x": activation("N D P*x_stride Q*x_stride"),
        "x_pivot": wide("D", given_with="x"),
    },
    _fake_reduce,
)


def one_pass_reduce(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    backend: str,
    stride: int = 1,
    x: Tensor | None = None,
    x_pivot: Tensor | None = None,
    x_stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reductions of the tail's backward: dᵀz', dᵀx' and Σd, with d = grad where the gate is open, else 0.

    Args:
        grad: (N, K, P, Q), channels_last; left as it is.
        gate: (N, P, Q, ceil(K / 8)) uint8, the mask of one_pass_tail.
        z, state, pivot, stride, x, x_pivot, x_stride: as in one_pass_tail.
        backend: "reference" or "triton".

    Returns:
        dᵀz' (K, C); dᵀx' (K, C'), (K, 0) without x; Σd (K,): float64 for float64, else float32, each the same bits at
        every call.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    cross, x_cross, sum_d = ONE_PASS_REDUCE(grad, gate, z, state, pivot, stride, x, x_pivot, x_stride, backend)
    return cross, x_cross, sum_d


def _fake_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    count: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = folded.shape[1]
    quadratic = folded.new_empty((channels, channels))
    return torch.empty_like(conv_weight), torch.empty_like(sum_d), quadratic, sum_d.new_empty(channels)


ONE_PASS_PRODUCTS = Op(
    "one_pass_products(Tensor cross, Tensor sum_d, Tensor conv_weight, Tensor folded, Tensor state, Tensor projected, "
    "Tensor total, int count, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
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
    _fake_products,
)


def one_pass_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    count: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What backward makes of the reductions: products no larger than C×C×K, whatever the batch.

    Args:
        cross, sum_d: dᵀz' (K, C) and Σd (K,) of one_pass_reduce.
        conv_weight, folded: (K, C, 1, 1), and its W̃ (K, C) of one_pass_fold.
        state, projected, total, count: of one_pass_statistics and gram_statistics; count rows.
        dtype: of the activations.
        backend: "reference" or "triton".

    Returns:
        The gradient of conv_weight, its shape, strides and dtype; dγ (K,); Q̃ (C, C) in dtype; dz's constant row (C,).
        dβ is sum_d.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape, dtype, or device.
    """
    grad_conv, grad_weight, quadratic, constant = ONE_PASS_PRODUCTS(
        cross, sum_d, conv_weight, folded, state, projected, total, count, dtype, backend
    )
    return grad_conv, grad_weight, quadratic, constant


def _check_masked(call: Call) -> None:
    if call["masked"] and call["state"] is None:
        call.fail(ValueError, "masked", "be False without a state", "True", "there is no ReLU before z then")


def _fake_dgrad(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    quadratic: Tensor,
    constant: Tensor,
    stride: int,
    masked: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n, _, p, q = grad.shape
    channels = z.shape[1]
    out = torch.empty((n, channels, p, q), dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    tiles = (n * p * q + ROWS_A_PARTIAL - 1) // ROWS_A_PARTIAL if masked else 0
    return out, pivot.new_empty((tiles, 2, channels))


ONE_PASS_DGRAD = Op(
    "one_pass_dgrad(Tensor grad, Tensor gate, Tensor z, Tensor? state, Tensor pivot, Tensor folded, Tensor quadratic, "
    "Tensor constant, int stride, bool masked, str backend) -> (Tensor, Tensor)",
    "one_pass_tail",
    {
        **_GRADIENT,
        "folded": dense("K C", "x"),
        "quadratic": dense("C C", "x"),
        "constant": wide("C"),
    },
    _fake_dgrad,
    _check_masked,
)


def one_pass_dgrad(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    quadratic: Tensor,
    constant: Tensor,
    backend: str,
    stride: int = 1,
    masked: bool = False,
) -> tuple[Tensor, Tensor]:
    """dz = d·W̃ − z'·Q̃ + constant, at every stride-th pixel of z; d, z' as in one_pass_reduce.

    Args:
        grad, gate, z, state, pivot, stride: as in one_pass_reduce.
        folded: W̃ (K, C). quadratic, constant: Q̃ (C, C) and the constant row (C,) of one_pass_products.
        backend: "reference" or "triton".
        masked: also pass back through the ReLU before z: dz where NOT (scale·z + shift <= 0), else 0.

    Returns:
        dz (N, C, P, Q), channels_last, z's dtype; with masked the partial sums (T, 2, C) of Σdz and Σdz·x̂, of dz as
        stored and x̂ = (z − mean)·invstd, over ROWS_A_PARTIAL rows each, float64 for float64, else float32; without
        it (0, 2, C).

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device; masked without a state.
    """
    grad_z, partials = ONE_PASS_DGRAD(grad, gate, z, state, pivot, folded, quadratic, constant, stride, masked, backend)
    return grad_z, partials
