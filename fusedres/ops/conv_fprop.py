"""Convolutions with BatchNorm fused around them: on load and as statistics in training, on store in inference."""

from __future__ import annotations

from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Rows, activation, convolution, shortcut_input, wide
from fusedres.ops._library import op
from fusedres.ops._sizes import empty_activation
from fusedres.values import Geometry, Raw, ShortcutInput, arithmetic_dtype

_CONVOLUTION: Rows = {
    "x": activation("N C H W"),
    "weight": activation("K C R S", remedy="grouped convolutions are not supported"),
    **convolution("H W", "R S"),
}


def _check_pixels(call: Call) -> None:
    n, p, q = (call.scope.sizes[name] for name in "NPQ")
    if n * p * q > 2**31 - 2**10:
        call.fail(ShapeError, "x", "give an output of fewer than 2³¹ pixels", f"{n}x{p}x{q}", "split the batch")


@op("conv_fprop", {**_CONVOLUTION, "x_state": wide("4 C")}, relations=_check_pixels)
def conv_fprop(
    x: Raw, weight: Tensor, geometry: Geometry, with_statistics: bool, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution whose input is normalised on load and whose output's statistics are taken on store.

    y = conv(h, weight), h = relu(scale·x + shift) in x's dtype, or h = x without a state. The padding is of h: zeros
    stay zeros after the affine map. The statistics are of y as it is stored, tile by tile of its N·P·Q rows, to be
    merged as Chan, Golub and LeVeque (1983) do. Groups and a bias are not supported.

    Returns:
        y: (N, K, P, Q), an activation in x's dtype.
        partials: (T, 2, K), each tile's mean and sum of squared deviations from it; float64 for float64, else float32.
        rows: (T,), the rows of each tile, in the dtype of partials.
        Without statistics partials and rows are empty.
    """
    y = empty_activation(geometry.output_shape(x.y.shape, weight.shape), x.y)
    dtype = arithmetic_dtype(x.y.dtype)
    if not with_statistics:
        return y, y.new_empty((0,), dtype=dtype), y.new_empty((0,), dtype=dtype)
    tiles = 1
    if backend == "triton":
        from fusedres.kernels.conv_fprop.configs import row_tiles

        tiles = row_tiles(x.y, weight, y, geometry.stride, geometry.padding, x.state is not None)
    return y, y.new_empty((tiles, 2, weight.shape[0]), dtype=dtype), y.new_empty((tiles,), dtype=dtype)


@op("conv_fprop", {**_CONVOLUTION, "state": wide("4 K"), **shortcut_input("K")}, relations=_check_pixels)
def conv_bn_add_relu(
    x: Tensor, weight: Tensor, geometry: Geometry, state: Tensor, shortcut: ShortcutInput | None = None, *, backend: str
) -> Tensor:
    """relu(scale·conv(x, weight) + shift + S): a convolution with its BatchNorm, shortcut and ReLU, for inference.

    Without a shortcut S is 0. Groups and a bias are not supported.

    Returns:
        (N, K, P, Q), an activation in x's dtype; NaN passes the ReLU as in torch. Nothing is saved for backward.
    """
    return empty_activation(geometry.output_shape(x.shape, weight.shape), x)
