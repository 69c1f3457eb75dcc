"""Backward of BatchNorm under a ReLU, of one branch or of two that meet: sums per channel, then the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Row, activation, gate, wide
from fusedres.ops._library import Op

_BRANCHES: dict[str, Row] = {
    "grad": activation("N C H W"),
    "gate": gate("N C H W"),
    "x": activation("N C H W"),
    "state": wide("4 C"),
    "shortcut_x": activation("N C H W"),
    "shortcut_state": wide("4 C", given_with="shortcut_x"),
}


def _fake(
    grad: Tensor, gate: Tensor | None, x: Tensor, state: Tensor, _: bool, shortcut_x: Tensor | None, *__: object
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad_shortcut = torch.empty_like(grad_x) if shortcut_x is not None else x.new_empty(0)
    return grad_x, grad_shortcut, state.new_empty((3, x.shape[1]))


BN_ADD_RELU_BACKWARD = Op(
    "bn_add_relu_backward(Tensor grad, Tensor? gate, Tensor x, Tensor state, bool batch_statistics, "
    "Tensor? shortcut_x, Tensor? shortcut_state, bool shortcut_batch_statistics, bool with_sums, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    "bn_add_relu_backward",
    _BRANCHES,
    _fake,
)


def bn_add_relu_backward(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    backend: str,
    *,
    batch_statistics: bool,
    shortcut_x: Tensor | None = None,
    shortcut_state: Tensor | None = None,
    shortcut_batch_statistics: bool = False,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of out = relu(scale·x + shift + S) with respect to x, and to a normalised shortcut's raw input.

    With d the gradient where the gate is open, else 0, and x̂ = (x − mean)·invstd, per channel over M values: the sums
    Σd (the bias's gradient) and Σd·x̂ (the weight's), then grad_x = scale·(d − Σd/M − x̂·Σd·x̂/M) with batch
    statistics, scale·d with constant ones; the same for the shortcut's branch.

    Args:
        grad: (N, C, H, W), channels_last, the gradient of out; left as it is.
        gate: packed bits of bn_add_relu, the ReLU's output, or None where grad is masked already.
        x: like grad, the raw convolution output. state: (4, C), its bn_statistics or bn_frozen.
        backend: "reference", "cpu", "triton" or "cuda".
        batch_statistics: the statistics of state depend on x.
        shortcut_x, shortcut_state, shortcut_batch_statistics: the same for a projection's branch, or None.
        with_sums: False where no sum is needed; they are undefined then, unless batch statistics need them.

    Returns:
        grad_x; the shortcut's grad (empty without one); sums (3, C): Σd, Σd·x̂, and Σd·x̂ of the shortcut,
        undefined without one.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    grad_x, grad_shortcut, sums = BN_ADD_RELU_BACKWARD(
        grad,
        gate,
        x,
        state,
        batch_statistics,
        shortcut_x,
        shortcut_state,
        shortcut_batch_statistics,
        with_sums,
        backend,
    )
    return grad_x, grad_shortcut, sums


BN_ADD_RELU_BACKWARD_ = Op(
    "bn_add_relu_backward_(Tensor grad, Tensor? gate, Tensor(a!) x, Tensor state, bool batch_statistics, "
    "Tensor(b!)? shortcut_x, Tensor? shortcut_state, bool shortcut_batch_statistics, bool with_sums, str backend) "
    "-> Tensor",
    "bn_add_relu_backward",
    _BRANCHES,
    lambda grad, gate, x, state, *_: state.new_empty((3, x.shape[1])),
)


def bn_add_relu_backward_(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    backend: str,
    *,
    batch_statistics: bool,
    shortcut_x: Tensor | None = None,
    shortcut_state: Tensor | None = None,
    shortcut_batch_statistics: bool = False,
    with_sums: bool = True,
) -> Tensor:
    """bn_add_relu_backward with the gradients written over x and shortcut_x: for a last backward. Returns the sums."""
    sums: Tensor = BN_ADD_RELU_BACKWARD_(
        grad,
        gate,
        x,
        state,
        batch_statistics,
        shortcut_x,
        shortcut_state,
        shortcut_batch_statistics,
        with_sums,
        backend,
    )
    return sums


def _fake_in_place(grad: Tensor, x: Tensor, state: Tensor, *_: object) -> Tensor:
    return state.new_empty((3, x.shape[1]))


BN_RELU_BACKWARD_ = Op(
    "bn_relu_backward_(Tensor(a!) grad, Tensor x, Tensor state, bool gated, bool batch_statistics, bool with_sums, "
    "str backend) -> Tensor",
    "bn_add_relu_backward",
    {"grad": activation("N C H W"), "x": activation("N C H W"), "state": wide("4 C")},
    _fake_in_place,
)


def bn_relu_backward_(
    grad: Tensor,
    x: Tensor,
    state: Tensor,
    backend: str,
    *,
    gated: bool,
    batch_statistics: bool,
    with_sums: bool = True,
) -> Tensor:
    """Turns the gradient of z = relu(scale·x + shift) into x's, in place, the mask recomputed from x.

    Arguments and equations as in bn_add_relu_backward; gated: False where grad is masked already (no ReLU here).

    Returns:
        sums (3, C), the last row undefined.
    """
    sums: Tensor = BN_RELU_BACKWARD_(grad, x, state, gated, batch_statistics, with_sums, backend)
    return sums
