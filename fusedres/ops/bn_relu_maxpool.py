"""The end of a ResNet's stem: BatchNorm's affine map, ReLU and 3x3 max-pool in one pass, and its backward.

That of x, stored; or, for a convolution whose input needs no gradient, its sums and then the weight's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Integers, Row, activation, convolution, wide
from fusedres.ops._library import Op
from fusedres.ops._shapes import Shape
from fusedres.ops._sizes import subsampled
from fusedres.ops.conv_wgrad import check_pixels


def _pooled(x: Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, subsampled(h, 2), subsampled(w, 2)


_POOLED = "pass the gradient of the pooled output"
_WITH_ARGMAX = "call bn_relu_maxpool with with_argmax=True"
_WINDOWS: dict[str, Row] = {
    "grad": activation("N C H/2 W/2", remedy=_POOLED),
    "argmax": activation("N C H/2 W/2", torch.uint8, remedy=_WITH_ARGMAX),
}


def _fake(x: Tensor, state: Tensor, with_argmax: bool, backend: str) -> tuple[Tensor, Tensor]:
    out = torch.empty(_pooled(x), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, torch.empty_like(out, dtype=torch.uint8) if with_argmax else x.new_empty(0, dtype=torch.uint8)


BN_RELU_MAXPOOL = Op(
    "bn_relu_maxpool(Tensor x, Tensor state, bool with_argmax, str backend) -> (Tensor, Tensor)",
    "bn_relu_maxpool",
    {"x": activation("N C H W"), "state": wide("4 C")},
    _fake,
)


def bn_relu_maxpool(x: Tensor, state: Tensor, backend: str, with_argmax: bool = False) -> tuple[Tensor, Tensor]:
    """maxpool(relu(scale·x + shift)) with windows of 3x3, stride 2, padding 1: the end of a ResNet's stem.

    Window (p, q) has its centre at pixel (2p, 2q). Padding never wins; of equal maxima the first in row-major order
    does, and the last of NaN, as in torch. Values are compared in the arithmetic type, before they are rounded.

    Args:
        x: (N, C, H, W), channels_last; float32, float64, bfloat16 or float16.
        state: (4, C) of bn_statistics or bn_frozen.
        backend: "reference", "cpu" or "triton".
        with_argmax: also return where each maximum was.

    Returns:
        out (N, C, ceil(H / 2), ceil(W / 2)), channels_last, x's dtype; argmax uint8 like out: the place in the window,
        3·row + column, or 9 where the ReLU is closed (out <= 0; NaN is open); an empty tensor without with_argmax.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    out, argmax = BN_RELU_MAXPOOL(x, state, with_argmax, backend)
    return out, argmax


def _fake_backward(grad: Tensor, argmax: Tensor, x: Tensor, state: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), state.new_empty((2, x.shape[1]))


BN_RELU_MAXPOOL_BACKWARD = Op(
    "bn_relu_maxpool_backward(Tensor grad, Tensor argmax, Tensor x, Tensor state, bool batch_statistics, "
    "bool with_sums, str backend) -> (Tensor, Tensor)",
    "bn_relu_maxpool",
    {"x": activation("N C H W"), **_WINDOWS, "state": wide("4 C")},
    _fake_backward,
)


def bn_relu_maxpool_backward(
    grad: Tensor,
    argmax: Tensor,
    x: Tensor,
    state: Tensor,
    backend: str,
    *,
    batch_statistics: bool,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradient of out = maxpool(relu(scale·x + shift)) with respect to x, the raw convolution output.

    Each pixel takes the gradients of the windows that it won and whose ReLU is open; with d their sum and x̂ =
    (x − mean)·invstd, per channel over M pixels: the sums Σd (the bias's gradient) and Σd·x̂ (the weight's), then
    grad_x = scale·(d − Σd/M − x̂·Σd·x̂/M) with batch statistics, scale·d with constant ones.

    Args:
        grad: (N, C, ceil(H / 2), ceil(W / 2)), channels_last; left as it is.
        argmax: of bn_relu_maxpool.
        x: (N, C, H, W), channels_last. state: (4, C), its bn_statistics or bn_frozen.
        backend: "reference", "cpu" or "triton".
        batch_statistics: the statistics of state depend on x.
        with_sums: False where no sum is needed; they are undefined then, unless batch statistics need them.

    Returns:
        grad_x like x; sums (2, C): Σd, Σd·x̂.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    grad_x, sums = BN_RELU_MAXPOOL_BACKWARD(grad, argmax, x, state, batch_statistics, with_sums, backend)
    return grad_x, sums


BN_RELU_MAXPOOL_BACKWARD_ = Op(
    "bn_relu_maxpool_backward_(Tensor grad, Tensor argmax, Tensor(a!) x, Tensor state, "
    "bool batch_statistics, bool with_sums, str backend) -> Tensor",
    "bn_relu_maxpool",
    {"x": activation("N C H W"), **_WINDOWS, "state": wide("4 C")},
    lambda grad, argmax, x, state, *_: state.new_empty((2, x.shape[1])),
)


def bn_relu_maxpool_backward_(
    grad: Tensor,
    argmax: Tensor,
    x: Tensor,
    state: Tensor,
    backend: str,
    *,
    batch_statistics: bool,
    with_sums: bool = True,
) -> Tensor:
    """bn_relu_maxpool_backward with the gradient written over x: for a last backward. Returns the sums."""
    sums: Tensor = BN_RELU_MAXPOOL_BACKWARD_(grad, argmax, x, state, batch_statistics, with_sums, backend)
    return sums


def _fake_reduce(grad: Tensor, argmax: Tensor, x: Tensor, state: Tensor, backend: str) -> Tensor:
    tiles = 1
    if backend == "triton":
        from fusedres.kernels.bn_relu_maxpool.configs import reduction_partials

        tiles = reduction_partials(x)
    return state.new_empty((tiles, 2, x.shape[1]))


BN_RELU_MAXPOOL_REDUCE = Op(
    "bn_relu_maxpool_reduce(Tensor grad, Tensor argmax, Tensor x, Tensor state, str backend) -> Tensor",
    "bn_relu_maxpool",
    {"x": activation("N C H W", empty=False), **_WINDOWS, "state": wide("4 C")},
    _fake_reduce,
)


def bn_relu_maxpool_reduce(grad: Tensor, argmax: Tensor, x: Tensor, state: Tensor, backend: str) -> Tensor:
    """The sums of bn_relu_maxpool_backward alone, Σd and Σd·x̂, over tiles of windows: for bn_backward_coefficients.

    Args:
        grad, argmax, x, state: as in bn_relu_maxpool_backward; not empty; left as they are.
        backend: "reference" or "triton".

    Returns:
        (T, 2, C), float64 for float64, else float32: one row of sums for each of T tiles.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    partials: Tensor = BN_RELU_MAXPOOL_REDUCE(grad, argmax, x, state, backend)
    return partials


def _fake_wgrad(
    grad: Tensor,
    argmax: Tensor,
    y: Tensor,
    coefficients: Tensor,
    input: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
) -> Tensor:
    splits = 1
    if backend == "triton":
        from fusedres.kernels.bn_relu_maxpool.configs import wgrad_plan

        splits = wgrad_plan(grad, input, kernel).splits
    return coefficients.new_empty((splits, y.shape[1], *kernel, input.shape[1]))


BN_RELU_MAXPOOL_WGRAD = Op(
    "bn_relu_maxpool_wgrad(Tensor grad, Tensor argmax, Tensor y, Tensor coefficients, Tensor input, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation, str backend) -> Tensor",
    "bn_relu_maxpool",
    {
        "y": activation("N C P Q", empty=False),
        "grad": activation("N C P/2 Q/2", remedy=_POOLED),
        "argmax": activation("N C P/2 Q/2", torch.uint8, remedy=_WITH_ARGMAX),
        "coefficients": wide("4 C"),
        "input": activation("N D H W"),
        "kernel": Integers(2, 1, Shape("R S")),
        **convolution("H W", "R S"),
    },
    _fake_wgrad,
    check_pixels("y", "input"),
)


def bn_relu_maxpool_wgrad(
    grad: Tensor,
    argmax: Tensor,
    y: Tensor,
    coefficients: Tensor,
    input: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    backend: str,
) -> Tensor:
    """Partial sums of the weight gradient of the convolution before bn_relu_maxpool, its dy never stored.

    dW[k, c, r, s] = Σ dy[n, k, p, q] · input[n, c, p·stride + r·dilation − padding, q·… + s·… − …], with dy =
    a·(d − c1 − (y − mean)·k) and d, at each pixel, the sum of grad over the windows that it won and whose ReLU is open.
    dy is computed on load in the arithmetic type and rounded to the activations' dtype.

    Args:
        grad: (N, K, ceil(P / 2), ceil(Q / 2)), channels_last, of the pooled output; any floating-point dtype.
        argmax: of bn_relu_maxpool.
        y: (N, K, P, Q), channels_last, the convolution's output; grad's dtype.
        coefficients: (4, K) rows a, c1, mean, k of bn_backward_coefficients; where k = 0, as with constant statistics,
            y is ignored.
        input: (N, C, H, W), channels_last, what was convolved; grad's dtype.
        kernel, stride, padding, dilation: of the convolution, (vertical, horizontal). One group.
        backend: "reference" or "triton".

    Returns:
        (S, K, R, S', C): one sum a split of the pixels, for conv_wgrad_finalize; float64 for float64 grad, else
        float32. The same bits each time. S depends on the sizes and the device.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.

    Not supported: groups; 2³¹ pixels or more; an empty batch.
    """
    partials: Tensor = BN_RELU_MAXPOOL_WGRAD(
        grad, argmax, y, coefficients, input, kernel, stride, padding, dilation, backend
    )
    return partials
