"""The end of a ResNet's stem: BatchNorm's affine map, ReLU and 3x3 max-pool in one pass, and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops import _checks
from fusedres.ops._library import Op


def _pooled(x: Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, _checks.subsampled(h, 2), _checks.subsampled(w, 2)


def _check_bn_relu_maxpool(x: Tensor, state: Tensor, with_argmax: bool, backend: str) -> None:
    _checks.activation("bn_relu_maxpool", "x", x, backend)
    _checks.state("bn_relu_maxpool", "state", state, x)
    if 0 in x.shape[1:]:
        raise ValueError(f"bn_relu_maxpool: x must have channels and pixels, got {tuple(x.shape)}; use larger images")


def _fake(x: Tensor, state: Tensor, with_argmax: bool, backend: str) -> tuple[Tensor, Tensor]:
    out = torch.empty(_pooled(x), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, torch.empty_like(out, dtype=torch.uint8) if with_argmax else x.new_empty(0, dtype=torch.uint8)


BN_RELU_MAXPOOL = Op(
    "bn_relu_maxpool(Tensor x, Tensor state, bool with_argmax, str backend) -> (Tensor, Tensor)",
    "bn_relu_maxpool",
    _check_bn_relu_maxpool,
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


def _check_backward(
    grad: Tensor,
    argmax: Tensor,
    x: Tensor,
    state: Tensor,
    batch_statistics: bool,
    with_sums: bool,
    backend: str,
) -> None:
    op = "bn_relu_maxpool_backward"
    _checks.activation(op, "x", x, backend)
    _checks.same_kind(op, "grad", grad, "x", x)
    _checks.state(op, "state", state, x)
    if grad.shape != _pooled(x):
        raise ValueError(
            f"{op}: grad must have shape {_pooled(x)} for x {tuple(x.shape)}, got {tuple(grad.shape)}; "
            "pass the gradient of the pooled output"
        )
    if argmax.dtype is not torch.uint8:
        raise TypeError(f"{op}: argmax must be torch.uint8, got {argmax.dtype}; pass that of bn_relu_maxpool")
    if argmax.shape != grad.shape or not argmax.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{op}: argmax must have shape {tuple(grad.shape)} like grad and be channels_last, got "
            f"{tuple(argmax.shape)} with strides {argmax.stride()}; call bn_relu_maxpool with with_argmax=True"
        )
    if argmax.device != x.device:
        raise RuntimeError(f"{op}: argmax must be on {x.device} like x, got {argmax.device}; move one of them")


def _fake_backward(grad: Tensor, argmax: Tensor, x: Tensor, state: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), state.new_empty((2, x.shape[1]))


BN_RELU_MAXPOOL_BACKWARD = Op(
    "bn_relu_maxpool_backward(Tensor grad, Tensor argmax, Tensor x, Tensor state, bool batch_statistics, "
    "bool with_sums, str backend) -> (Tensor, Tensor)",
    "bn_relu_maxpool",
    _check_backward,
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
    _check_backward,
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
