"""BatchNorm's affine map and ReLU, one read and one write."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Integer, activation, wide
from fusedres.ops._library import Op
from fusedres.ops._sizes import subsampled


def _fake(x: Tensor, state: Tensor | None, pivot: Tensor | None, stride: int, backend: str) -> Tensor:
    n, c, h, w = x.shape
    shape = (n, c, subsampled(h, stride), subsampled(w, stride))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


BN_RELU = Op(
    "bn_relu(Tensor x, Tensor? state, Tensor? pivot, int stride, str backend) -> Tensor",
    "bn_relu",
    {"x": activation("N C H W"), "state": wide("4 C"), "pivot": wide("C"), "stride": Integer(1)},
    _fake,
)


def bn_relu(x: Tensor, state: Tensor | None, backend: str, pivot: Tensor | None = None, stride: int = 1) -> Tensor:
    """relu(scale·x + shift) − pivot, of every stride-th pixel in height and width.

    Args:
        x: (N, C, H, W), channels_last; float32, float64, bfloat16 or float16.
        state: (4, C) of bn_statistics or bn_frozen; None: x as it is, no affine map and no ReLU.
        backend: "reference", "cpu" or "triton".
        pivot: (C,) in the state's dtype, subtracted last; None: 0.
        stride: at least 1.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)), channels_last, x's dtype. NaN passes the ReLU as in torch.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    out: Tensor = BN_RELU(x, state, pivot, stride, backend)
    return out


BN_RELU_ = Op(
    "bn_relu_(Tensor(a!) x, Tensor state, str backend) -> ()",
    "bn_relu",
    {"x": activation("N C H W"), "state": wide("4 C")},
    lambda *_: None,
)


def bn_relu_(x: Tensor, state: Tensor, backend: str) -> None:
    """x = relu(scale·x + shift) in place; arguments and errors as in bn_relu."""
    BN_RELU_(x, state, backend)
