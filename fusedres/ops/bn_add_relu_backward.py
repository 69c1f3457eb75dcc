"""Backward of BatchNorm under a ReLU, of one branch or of two that meet: sums per channel, then the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Rows, activation, gate, wide
from fusedres.ops._library import op
from fusedres.values import BnBranch, Gated

_BRANCHES: Rows = {
    "grad": activation("N C H W"),
    "gate": gate("N C H W"),
    "x": activation("N C H W"),
    "x_state": wide("4 C"),
    "shortcut": activation("N C H W"),
    "shortcut_state": wide("4 C", given_with="shortcut"),
}


@op("bn_add_relu_backward", _BRANCHES)
def bn_add_relu_backward(
    gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool = True, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of out = relu(scale·x + shift + S) with respect to x, and to a normalised shortcut's raw input.

    With d of Gated and x̂ = (x − mean)·invstd, per channel over M values: the sums Σd (the bias's gradient) and Σd·x̂
    (the weight's), then grad_x = scale·(d − Σd/M − x̂·Σd·x̂/M) with batch statistics, scale·d with constant ones; the
    same for the shortcut's branch.

    Args:
        shortcut: the branch of a projection.
        with_sums: False where no sum is needed; they are undefined then, unless batch statistics need them.

    Returns:
        grad_x; the shortcut's gradient (empty without one); sums (3, C): Σd, Σd·x̂, and Σd·x̂ of the shortcut,
        undefined without one.
    """
    grad_x = torch.empty_like(x.x, memory_format=torch.channels_last)
    grad_shortcut = torch.empty_like(grad_x) if shortcut is not None else grad_x.new_empty(0)
    return grad_x, grad_shortcut, x.state.new_empty((3, x.x.shape[1]))


@op("bn_add_relu_backward", _BRANCHES, writes=("x", "shortcut"))
def bn_add_relu_backward_(
    gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool = True, *, backend: str
) -> Tensor:
    """bn_add_relu_backward with the gradients written over x and shortcut: for a last backward. Returns the sums."""
    return x.state.new_empty((3, x.x.shape[1]))


@op(
    "bn_add_relu_backward",
    {"grad": activation("N C H W"), "x": activation("N C H W"), "x_state": wide("4 C")},
    writes=("grad",),
)
def bn_relu_backward_(grad: Tensor, x: BnBranch, relu: bool, with_sums: bool = True, *, backend: str) -> Tensor:
    """Turn the gradient of z = relu(scale·x + shift) into x's, in place, with the mask recomputed from x.

    Equations as in bn_add_relu_backward.

    Args:
        relu: False where grad is masked already, or there is no ReLU.

    Returns:
        sums (3, C), the last row undefined.
    """
    return x.state.new_empty((3, x.x.shape[1]))


@op(
    "bn_add_relu_backward",
    {"grad": activation("N C H W"), "x": activation("N C H W"), "x_state": wide("4 C"), "added": activation("N C H W")},
    writes=("grad",),
)
def bn_relu_backward_add_(grad: Tensor, x: BnBranch, added: Tensor, with_sums: bool = True, *, backend: str) -> Tensor:
    """bn_relu_backward_ with a ReLU, and `added` added to the gradient of x: what else depends on x.

    Returns:
        sums (3, C), the last row undefined.
    """
    return x.state.new_empty((3, x.x.shape[1]))
