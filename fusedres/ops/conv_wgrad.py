"""The weight gradient of a convolution between two BatchNorms, both of them applied on load."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Integers, Items, Relations, activation, bits, convolution, strided, wide
from fusedres.ops._library import Op
from fusedres.ops._shapes import Shape
from fusedres.ops._sizes import arithmetic_dtype


def check_pixels(grad: str, input: str) -> Relations:
    """The kernels count the pixels of either argument in 32 bits."""

    def check(call: Call) -> None:
        for name in (grad, input):
            shape = tuple(call[name].shape)
            if shape[0] * shape[2] * shape[3] >= 2**31:
                call.fail(ShapeError, name, "have fewer than 2³¹ pixels", shape, "split the batch")

    return check


def _check_lengths(call: Call) -> None:
    lengths = len(call["partials"]), len(call["weights"])
    if lengths[0] != lengths[1]:
        call.fail(ShapeError, "partials", "be a list as long as weights", f"{lengths[0]} and {lengths[1]} tensors")


def _fake_conv_wgrad(
    grad: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    coefficients: Tensor | None,
    input: Tensor,
    input_state: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
) -> Tensor:
    splits = 1
    if backend == "triton":
        from fusedres.kernels.conv_wgrad.configs import plan

        splits = plan(grad, gate, y, input, input_state, kernel).splits
    shape = (splits, grad.shape[1], *kernel, input.shape[1])
    return grad.new_empty(shape, dtype=arithmetic_dtype(grad))


CONV_WGRAD = Op(
    "conv_wgrad(Tensor grad, Tensor? gate, Tensor? y, Tensor? coefficients, Tensor input, Tensor? input_state, "
    "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, str backend) -> Tensor",
    "conv_wgrad",
    {
        "grad": activation("N K P Q", empty=False),
        "input": activation("N C H W"),
        "y": activation("N K P Q"),
        "coefficients": wide("4 K", given_with="y"),
        "gate": bits("N K P Q", only_with="y"),
        "input_state": wide("4 C"),
        "kernel": Integers(2, 1, Shape("R S")),
        **convolution("H W", "R S"),
    },
    _fake_conv_wgrad,
    check_pixels("grad", "input"),
)


def conv_wgrad(
    grad: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    coefficients: Tensor | None,
    input: Tensor,
    input_state: Tensor | None,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    backend: str,
) -> Tensor:
    """Partial sums of dW[k, c, r, s] = Σ dy[n, k, p, q] · h[n, c, p·stride + r·dilation − padding, q·… + s·… − …].

    dy = a·(d − c1 − (y − mean)·k), the backward of the BatchNorm after the convolution, with d the gradient where the
    gate is open, else 0; or dy is `grad` itself. h = relu(scale·input + shift), or `input` itself; zero outside of the
    image. Both are computed on load in the arithmetic type and rounded to the activations' dtype; neither is stored.

    Args:
        grad: (N, K, P, Q), channels_last; float32, float64, bfloat16 or float16; not empty.
        gate: packed bits of grad's shape, uint8 (N, P, Q, ceil(K / 8)), or None where grad is masked already.
        y: what the convolution gave, like grad; None: grad is dy.
        coefficients: (4, K) rows a, c1, mean, k, float64 for float64 grad, else float32; given where y is.
        input: (N, C, H, W), channels_last; grad's dtype.
        input_state: (4, C) of bn_statistics or bn_frozen, or None.
        kernel, stride, padding, dilation: of the convolution, (vertical, horizontal). One group.
        backend: "reference" or "triton".

    Returns:
        (S, K, R, S', C): one sum a split of the N·P·Q rows, R·S' taps; float64 for float64 grad, else float32. The
        same bits each time. S depends on the sizes and the device; conv_wgrad_finalize adds over it.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.

    Not supported: groups; 2³¹ pixels or more.
    """
    partials: Tensor = CONV_WGRAD(
        grad, gate, y, coefficients, input, input_state, kernel, stride, padding, dilation, backend
    )
    return partials


CONV_WGRAD_FINALIZE = Op(
    "conv_wgrad_finalize(Tensor[] partials, Tensor[] weights, str backend) -> Tensor[]",
    "conv_wgrad",
    {
        "weights": Items(strided("K C R S", "floating"), most=4),  # neither read nor written: the results are like them
        "partials": Items(wide("T K R S C"), most=4),
    },
    lambda partials, weights, backend: [torch.empty_like(weight) for weight in weights],
    _check_lengths,
)


def conv_wgrad_finalize(partials: list[Tensor], weights: list[Tensor], backend: str) -> list[Tensor]:
    """Gradients of up to four convolution weights: partials added over their splits in a fixed order, in one launch.

    Args:
        partials: 1 to 4 results of conv_wgrad, (S, K, R, S', C), float32 or float64, one a weight.
        weights: (K, C, R, S') of any floating-point dtype and any layout; not read.
        backend: "reference" or "triton".

    Returns:
        One gradient a weight, of its shape, dtype and strides (torch.empty_like), the sum rounded once.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong number of tensors, shape, dtype, or device.
    """
    grads: list[Tensor] = CONV_WGRAD_FINALIZE(partials, weights, backend)
    return grads
