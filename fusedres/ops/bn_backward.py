"""The steps of BatchNorm's backward one by one: sums over tiles, their merge into coefficients, elementwise gradients.

bn_add_relu_backward runs all three; kernels that take the sums where they have d at hand call the last two.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Integer, activation, gate, wide
from fusedres.ops._library import op
from fusedres.values import BnGradient, Gated, Gradient, NormState, Raw


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


@op(
    "bn_backward",
    {
        "grad": activation("N C H W"),
        "gate": gate("N C H W"),
        "x": activation("N C H W"),
        "shortcut": activation("N C H W"),
        "x_state": wide("4 C", required=True),
        "shortcut_state": wide("4 C", given_with="shortcut"),
    },
)
def bn_backward_reduce(gated: Gated, x: Raw, shortcut: Raw | None = None, *, backend: str) -> Tensor:
    """Sums over row tiles that BatchNorm's backward needs: Σd, Σd·x̂ and, with a shortcut, its Σd·x̂.

    d of Gated; x̂ = (x − mean)·invstd. x is the raw convolution output; the shortcut is that of a projection.

    Returns:
        (T, 2, C), or (T, 3, C) with a shortcut, float64 for float64, else float32: one row of sums for each of T tiles.
    """
    assert x.state is not None  # checked by the op
    return x.state.new_empty((_tiles(x.y, backend), 2 if shortcut is None else 3, x.y.shape[1]))


def _check_rows(call: Call) -> None:
    rows, kind = (2, "without") if call["shortcut_state"] is None else (3, "with")
    if call["partials"].shape[1] != rows:
        expected = f"have shape (T, {rows}, C) {kind} a shortcut"
        call.fail(ShapeError, "partials", expected, tuple(call["partials"].shape))


@op(
    "bn_backward",
    {
        "partials": wide("N B C"),  # of N tiles: none where a batch is empty
        "count": Integer(1, 2**62),
        "state": wide("4 C"),
        "shortcut_state": wide("4 C"),
    },
    relations=_check_rows,
)
def bn_backward_coefficients(
    partials: Tensor, count: int, norm_state: NormState, shortcut_state: NormState | None = None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the partials of bn_backward_reduce into what the elementwise gradient needs per channel.

    a = scale, c1 = Σd/count, μ = mean, k = invstd·(Σd·x̂)/count; c1 = k = 0 with constant statistics.

    Args:
        partials: (T, 2, C), or (T, 3, C) with a shortcut; float32 or float64; summed in fixed order.
        count: N·H·W.

    Returns:
        sums (2 or 3, C): Σd, Σd·x̂, and Σd·x̂ of the shortcut; coefficients (4, C): a, c1, μ, k; the shortcut's
        coefficients (empty without one).
    """
    state = norm_state.state
    shortcut = state.new_empty(0) if shortcut_state is None else torch.empty_like(state)
    return partials.new_empty(partials.shape[1:]), torch.empty_like(state), shortcut


@op(
    "bn_backward",
    {
        "grad": activation("N C H W"),
        "gate": gate("N C H W"),
        "y": activation("N C H W", required=True),
        "shortcut": activation("N C H W"),
        "coefficients": wide("4 C", required=True),
        "shortcut_coefficients": wide("4 C", given_with="shortcut"),
    },
)
def bn_backward_apply(gradient: Gradient, shortcut: BnGradient | None = None, *, backend: str) -> tuple[Tensor, Tensor]:
    """The gradient dy of a raw convolution output (see Gradient), written out; for one branch or two that meet.

    The shortcut is the branch of a projection, to which the same grad and gate come. Where k = 0, dy does not depend on
    y, NaN or not. Returns dy and the shortcut's gradient (empty without one), both like y.
    """
    grad_y = torch.empty_like(gradient.grad, memory_format=torch.channels_last)
    return grad_y, grad_y.new_empty(0) if shortcut is None else torch.empty_like(grad_y)
