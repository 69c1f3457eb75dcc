"""The steps of BatchNorm's backward one by one: sums over tiles, their merge into coefficients, elementwise gradients.

bn_add_relu_backward runs all three; kernels that take the sums where they have d at hand call the last two.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Integer, Row, activation, gate, wide
from fusedres.ops._library import Op

_BRANCHES: dict[str, Row] = {
    "grad": activation("N C H W"),
    "gate": gate("N C H W"),
    "x": activation("N C H W"),
    "shortcut_x": activation("N C H W"),
}


def _tiles(x: Tensor, backend: str) -> int:
    """Partials that a backend's bn_backward_reduce returns."""
    if backend == "cuda":
        tiles: int = import_module("fusedres.kernels.bn_backward.cuda").row_tiles(x)[1]
        return tiles
    if backend != "triton":
        return 1
    rows = x.numel() // x.shape[1]
    tile: int = import_module("fusedres.kernels.bn_backward.configs").row_tile(rows, x.shape[1])
    return -(-rows // tile)


BN_BACKWARD_REDUCE = Op(
    "bn_backward_reduce(Tensor grad, Tensor? gate, Tensor x, Tensor state, Tensor? shortcut_x, "
    "Tensor? shortcut_state, str backend) -> Tensor",
    "bn_backward",
    {**_BRANCHES, "state": wide("4 C"), "shortcut_state": wide("4 C", given_with="shortcut_x")},
    lambda grad, gate, x, state, shortcut_x, shortcut_state, backend: state.new_empty(
        (_tiles(x, backend), 2 if shortcut_x is None else 3, x.shape[1])
    ),
)


def bn_backward_reduce(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    backend: str,
    *,
    shortcut_x: Tensor | None = None,
    shortcut_state: Tensor | None = None,
) -> Tensor:
    """Sums over row tiles that BatchNorm's backward needs: Σd, Σd·x̂ and, with a shortcut, its Σd·x̂.

    d = grad where the gate is open, else 0; x̂ = (x − mean)·invstd.

    Args:
        grad: (N, C, H, W), channels_last, the gradient behind the ReLU; left as it is.
        gate: packed bits of bn_add_relu, the ReLU's output (closed where it is <= 0, so NaN is open), or None.
        x: like grad, the raw convolution output. state: (4, C), its bn_statistics or bn_frozen.
        backend: "reference", "triton" or "cuda".
        shortcut_x, shortcut_state: the same for the projection of a shortcut, or None.

    Returns:
        (T, 2, C), or (T, 3, C) with a shortcut, float64 for float64, else float32: one row of sums for each of T tiles.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    partials: Tensor = BN_BACKWARD_REDUCE(grad, gate, x, state, shortcut_x, shortcut_state, backend)
    return partials


def _check_rows(call: Call) -> None:
    rows, kind = (2, "without") if call["shortcut_state"] is None else (3, "with")
    if call["partials"].shape[1] != rows:
        expected = f"have shape (T, {rows}, C) {kind} a shortcut"
        call.fail(ShapeError, "partials", expected, tuple(call["partials"].shape))


def _fake_coefficients(
    partials: Tensor, count: int, state: Tensor, batch_statistics: bool, shortcut_state: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    shortcut = state.new_empty(0) if shortcut_state is None else torch.empty_like(state)
    return partials.new_empty(partials.shape[1:]), torch.empty_like(state), shortcut


BN_BACKWARD_COEFFICIENTS = Op(
    "bn_backward_coefficients(Tensor partials, int count, Tensor state, bool batch_statistics, "
    "Tensor? shortcut_state, bool shortcut_batch_statistics, str backend) -> (Tensor, Tensor, Tensor)",
    "bn_backward",
    {
        "partials": wide("N B C"),  # of N tiles: none where a batch is empty
        "count": Integer(1, 2**62),
        "state": wide("4 C"),
        "shortcut_state": wide("4 C"),
    },
    _fake_coefficients,
    _check_rows,
)


def bn_backward_coefficients(
    partials: Tensor,
    count: int,
    state: Tensor,
    backend: str,
    *,
    batch_statistics: bool,
    shortcut_state: Tensor | None = None,
    shortcut_batch_statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the partials of bn_backward_reduce into what the elementwise gradient needs per channel.

    a = scale, c1 = Σd/count, μ = mean, k = invstd·(Σd·x̂)/count; c1 = k = 0 with constant statistics.

    Args:
        partials: (T, 2, C), or (T, 3, C) with a shortcut; float32 or float64; summed in fixed order.
        count: N·H·W. state: (4, C), bn_statistics or bn_frozen of the branch, of partials' dtype.
        backend: "reference", "triton" or "cuda".
        batch_statistics: the statistics of state depend on x.
        shortcut_state, shortcut_batch_statistics: the same for a shortcut's branch, or None.

    Returns:
        sums (2 or 3, C): Σd, Σd·x̂, and Σd·x̂ of the shortcut; coefficients (4, C): a, c1, μ, k; the shortcut's
        coefficients (empty without one).

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    sums, coefficients, shortcut_coefficients = BN_BACKWARD_COEFFICIENTS(
        partials, count, state, batch_statistics, shortcut_state, shortcut_batch_statistics, backend
    )
    return sums, coefficients, shortcut_coefficients


def _fake_apply(
    grad: Tensor, gate: Tensor | None, x: Tensor, coefficients: Tensor, shortcut_x: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    return grad_x, x.new_empty(0) if shortcut_x is None else torch.empty_like(grad_x)


BN_BACKWARD_APPLY = Op(
    "bn_backward_apply(Tensor grad, Tensor? gate, Tensor x, Tensor coefficients, Tensor? shortcut_x, "
    "Tensor? shortcut_coefficients, str backend) -> (Tensor, Tensor)",
    "bn_backward",
    {**_BRANCHES, "coefficients": wide("4 C"), "shortcut_coefficients": wide("4 C", given_with="shortcut_x")},
    _fake_apply,
)


def bn_backward_apply(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    backend: str,
    *,
    shortcut_x: Tensor | None = None,
    shortcut_coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient at a raw convolution output: a·(d − c1 − (x − μ)·k), for one branch or two that meet.

    Args:
        grad, gate, x, shortcut_x: as in bn_backward_reduce; left as they are.
        coefficients, shortcut_coefficients: (4, C) of bn_backward_coefficients. Where k = 0, as with constant
            statistics, the gradient does not depend on x, NaN or not.
        backend: "reference", "triton" or "cuda".

    Returns:
        x's gradient and the shortcut's (empty without one), like x.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    grad_x, grad_shortcut = BN_BACKWARD_APPLY(grad, gate, x, coefficients, shortcut_x, shortcut_coefficients, backend)
    return grad_x, grad_shortcut
