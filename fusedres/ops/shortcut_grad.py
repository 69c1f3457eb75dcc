"""The shortcut's share of the input gradient, added where the branch's lies."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops._arguments import Integer, activation, gate
from fusedres.ops._library import Op

SHORTCUT_GRAD_ = Op(
    "shortcut_grad_(Tensor(a!) grad_x, Tensor grad, Tensor? gate, int stride, str backend) -> ()",
    "shortcut_grad",
    {
        "stride": Integer(1),
        "grad_x": activation("N C H W"),
        "grad": activation("N D>=C H/stride W/stride", remedy="was the downsample branch skipped?"),
        "gate": gate("N D H/stride W/stride"),
    },
    lambda *_: None,
)


def shortcut_grad_(grad_x: Tensor, grad: Tensor, backend: str, *, gate: Tensor | None = None, stride: int = 1) -> None:
    """grad_x[n, c, p·stride, q·stride] += d[n, c, p, q], with d the gradient where the gate is open, else 0.

    The transpose of the identity, of strided subsampling and of zero-padded channels: dL/dx = S'(x)ᵀd + F'(x)ᵀd.

    Args:
        grad_x: (N, C', H, W), channels_last; updated in place.
        grad: (N, C, P, Q), C >= C', P = ceil(H / stride), Q = ceil(W / stride); dtype and layout of grad_x.
        backend: "reference", "cpu" or "triton".
        gate: packed bits or the ReLU's output for grad's channels, or None where grad is masked already.
        stride: at least 1.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    SHORTCUT_GRAD_(grad_x, grad, gate, stride, backend)
