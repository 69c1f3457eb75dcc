"""The weight gradient of a convolution between two BatchNorms, both of them applied on load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Integers, Items, Relations, activation, bits, convolution, strided, wide
from fusedres.ops._library import op
from fusedres.ops._shapes import Shape
from fusedres.values import Geometry, Gradient, Raw, arithmetic_dtype


def check_pixels(grad: str, input: str) -> Relations:
    """The kernels count the pixels of either argument in 32 bits."""

    def check(call: Call) -> None:
        for name in (grad, input):
            shape = tuple(call[name].shape)
            if shape[0] * shape[2] * shape[3] >= 2**31:
                call.fail(ShapeError, name, "have fewer than 2³¹ pixels", shape, "split the batch")

    return check


@op(
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
    relations=check_pixels("grad", "input"),
)
def conv_wgrad(gradient: Gradient, input: Raw, kernel: Sequence[int], geometry: Geometry, *, backend: str) -> Tensor:
    """Partial sums of dW[k, c, r, s] = Σ dy[n, k, p, q] · h[n, c, p·stride + r·dilation − padding, q·… + s·… − …].

    h = relu(scale·input + shift), or `input` itself without a state; zero outside of the image. dy and h are computed
    on load in the arithmetic type and rounded to the activations' dtype; neither is stored. Packed bits are the only
    gate. An empty batch, groups, and 2³¹ pixels or more are not supported.

    Returns:
        (S, K, R, S', C): one sum for each split of the N·P·Q rows, R·S' taps; float64 for float64 grad, else float32.
        The same bits each time. S depends on the sizes and the device; conv_wgrad_finalize adds over it.
    """
    splits = 1
    if backend == "triton":
        from fusedres.kernels.conv_wgrad.configs import plan

        splits = plan(gradient, input, kernel).splits
    elif backend == "cpu":
        from fusedres.kernels.conv_wgrad import cpu

        splits = cpu.splits(gradient.grad.shape, input.y.shape, kernel, geometry)
    shape = (splits, gradient.grad.shape[1], *kernel, input.y.shape[1])
    return gradient.grad.new_empty(shape, dtype=arithmetic_dtype(gradient.grad.dtype))


def _check_lengths(call: Call) -> None:
    lengths = len(call["partials"]), len(call["weights"])
    if lengths[0] != lengths[1]:
        call.fail(ShapeError, "partials", "be a list as long as weights", f"{lengths[0]} and {lengths[1]} tensors")


@op(
    "conv_wgrad",
    {
        "weights": Items(strided("K C R S", "floating"), most=4),  # neither read nor written: the results are like them
        "partials": Items(wide("T K R S C"), most=4),
    },
    relations=_check_lengths,
)
def conv_wgrad_finalize(partials: list[Tensor], weights: list[Tensor], *, backend: str) -> list[Tensor]:
    """Gradients of one to four convolution weights: conv_wgrad's partials, added over their splits in a fixed order.

    The weights are not read: each gradient has the shape, dtype and strides of its weight (torch.empty_like), and is
    rounded once. All gradients take one launch.
    """
    return [torch.empty_like(weight) for weight in weights]
