"""The shortcut's share of the input gradient, added where the branch's lies."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops import _checks
from fusedres.ops._library import Op


def _check_shortcut_grad_(grad_x: Tensor, grad: Tensor, gate: Tensor | None, stride: int, backend: str) -> None:
    _checks.activation("shortcut_grad_", "grad_x", grad_x, backend)
    _checks.same_kind("shortcut_grad_", "grad", grad, "grad_x", grad_x)
    _checks.gate("shortcut_grad_", "gate", gate, grad)
    _checks.positive_stride("shortcut_grad_", stride)
    n, c, h, w = grad_x.shape
    reached = (n, _checks.subsampled(h, stride), _checks.subsampled(w, stride))
    if reached != (grad.shape[0], grad.shape[2], grad.shape[3]) or c > grad.shape[1]:
        raise ValueError(
            f"shortcut_grad_: grad must have the shape that grad_x {tuple(grad_x.shape)} reaches with stride {stride} "
            f"and channels appended, got {tuple(grad.shape)}; was the downsample branch skipped?"
        )


SHORTCUT_GRAD_ = Op(
    "shortcut_grad_(Tensor(a!) grad_x, Tensor grad, Tensor? gate, int stride, str backend) -> ()",
    "shortcut_grad",
    _check_shortcut_grad_,
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
