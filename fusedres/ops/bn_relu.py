"""BatchNorm's affine map and ReLU, one read and one write."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops._arguments import Integer, activation, wide
from fusedres.ops._library import op
from fusedres.ops._sizes import empty_activation
from fusedres.values import subsampled


@op("bn_relu", {"x": activation("N C H W"), "state": wide("4 C"), "pivot": wide("C"), "stride": Integer(1)})
def bn_relu(x: Tensor, state: Tensor | None, pivot: Tensor | None = None, stride: int = 1, *, backend: str) -> Tensor:
    """relu(scale·x + shift) − pivot, of every stride-th pixel in height and width.

    Args:
        state: None: x as it is, no affine map and no ReLU.
        pivot: (C,) in the state's dtype, subtracted last; None: 0.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)), an activation in x's dtype. NaN passes the ReLU as in torch.
    """
    n, c, h, w = x.shape
    return empty_activation((n, c, subsampled(h, stride), subsampled(w, stride)), x)


@op("bn_relu", {"x": activation("N C H W"), "state": wide("4 C")}, writes=("x",))
def bn_relu_(x: Tensor, state: Tensor, *, backend: str) -> None:
    """x = relu(scale·x + shift) in place; arguments as in bn_relu."""
