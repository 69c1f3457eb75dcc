"""The end of a ResNet's stem: BatchNorm's affine map, ReLU and 3x3 max-pool in one pass, and its backward.

That of x, stored; or, for a convolution whose input needs no gradient, its sums and then the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.ops._arguments import Integers, Rows, activation, convolution, wide
from fusedres.ops._library import op
from fusedres.ops._shapes import Shape
from fusedres.ops._sizes import empty_activation
from fusedres.ops.conv_wgrad import check_pixels
from fusedres.values import BnBranch, BnGradient, Geometry, Pooled, subsampled

_POOLED = "pass the gradient of the pooled output"
_WITH_ARGMAX = "call bn_relu_maxpool with with_argmax=True"


def _windows(pooled: str) -> Rows:
    return {"grad": activation(pooled, remedy=_POOLED), "argmax": activation(pooled, torch.uint8, remedy=_WITH_ARGMAX)}


@op("bn_relu_maxpool", {"x": activation("N C H W"), "state": wide("4 C")})
def bn_relu_maxpool(x: Tensor, state: Tensor, with_argmax: bool = False, *, backend: str) -> tuple[Tensor, Tensor]:
    """maxpool(relu(scale·x + shift)) with windows of 3x3, stride 2, padding 1: the end of a ResNet's stem.

    Window (p, q) has its centre at pixel (2p, 2q). Padding never wins; of equal maxima the first in row-major order
    does, and the last of NaN, as in torch. Values are compared in the arithmetic type, before they are rounded.

    Returns:
        out (N, C, ceil(H / 2), ceil(W / 2)), an activation in x's dtype; argmax uint8 like out: the place in the
        window, 3·row + column, or 9 where the ReLU is closed (out <= 0; NaN is open); an empty tensor without
        with_argmax.
    """
    n, c, h, w = x.shape
    out = empty_activation((n, c, subsampled(h, 2), subsampled(w, 2)), x)
    return out, torch.empty_like(out, dtype=torch.uint8) if with_argmax else x.new_empty(0, dtype=torch.uint8)


_BACKWARD: Rows = {"x": activation("N C H W"), **_windows("N C H/2 W/2"), "x_state": wide("4 C")}


@op("bn_relu_maxpool", _BACKWARD)
def bn_relu_maxpool_backward(
    pooled: Pooled, x: BnBranch, with_sums: bool = True, *, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradient of out = maxpool(relu(scale·x + shift)) with respect to x, the raw convolution output.

    Each pixel takes the gradients of the windows that it won and whose ReLU is open; with d their sum and x̂ =
    (x − mean)·invstd, per channel over M pixels: the sums Σd (the bias's gradient) and Σd·x̂ (the weight's), then
    grad_x = scale·(d − Σd/M − x̂·Σd·x̂/M) with batch statistics, scale·d with constant ones.

    Args:
        pooled: (N, C, ceil(H / 2), ceil(W / 2)).
        with_sums: False where no sum is needed; they are undefined then, unless batch statistics need them.

    Returns:
        grad_x like x; sums (2, C): Σd, Σd·x̂.
    """
    return torch.empty_like(x.x, memory_format=torch.channels_last), x.state.new_empty((2, x.x.shape[1]))


@op("bn_relu_maxpool", _BACKWARD, writes=("x",))
def bn_relu_maxpool_backward_(pooled: Pooled, x: BnBranch, with_sums: bool = True, *, backend: str) -> Tensor:
    """bn_relu_maxpool_backward with the gradient written over x: for a last backward. Returns the sums."""
    return x.state.new_empty((2, x.x.shape[1]))


@op("bn_relu_maxpool", {"x": activation("N C H W", empty=False), **_windows("N C H/2 W/2"), "state": wide("4 C")})
def bn_relu_maxpool_reduce(pooled: Pooled, x: Tensor, state: Tensor, *, backend: str) -> Tensor:
    """The sums of bn_relu_maxpool_backward alone: (T, 2, C), Σd and Σd·x̂ of T tiles, for bn_backward_coefficients."""
    tiles = 1
    if backend == "triton":
        from fusedres.kernels.bn_relu_maxpool.configs import reduction_partials

        tiles = reduction_partials(x)
    return state.new_empty((tiles, 2, x.shape[1]))


@op(
    "bn_relu_maxpool",
    {
        "y": activation("N C P Q", empty=False),
        **_windows("N C P/2 Q/2"),
        "y_coefficients": wide("4 C"),
        "input": activation("N D H W"),
        "kernel": Integers(2, 1, Shape("R S")),
        **convolution("H W", "R S"),
    },
    relations=check_pixels("y", "input"),
)
def bn_relu_maxpool_wgrad(
    pooled: Pooled, y: BnGradient, input: Tensor, kernel: Sequence[int], geometry: Geometry, *, backend: str
) -> Tensor:
    """Partial sums of the weight gradient of the convolution before bn_relu_maxpool, its dy never stored.

    dW[k, c, r, s] = Σ dy[n, k, p, q] · input[n, c, p·stride + r·dilation − padding, q·… + s·… − …], with dy formed on
    load as in Gradient, where d is, at each pixel, the sum of grad over the windows that it won and whose ReLU is open.
    dy is computed in the arithmetic type and rounded to the activations' dtype. Where k = 0, it does not depend on y,
    NaN or not. An empty batch, groups, and 2³¹ pixels or more are not supported.

    Returns:
        (S, K, R, S', C): one sum for each split of the pixels, for conv_wgrad_finalize; float64 for float64 grad, else
        float32. The same bits each time. S depends on the sizes and the device.
    """
    splits = 1
    if backend == "triton":
        from fusedres.kernels.bn_relu_maxpool.configs import wgrad_plan

        splits = wgrad_plan(pooled.grad, input, kernel).splits
    return y.coefficients.new_empty((splits, y.y.shape[1], *kernel, input.shape[1]))
