"""Gradient of a convolution's input, with the BatchNorm backward before it and what follows it fused."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Integer, Integers, activation, bits, convolution, wide
from fusedres.ops._library import op
from fusedres.ops._shapes import Shape
from fusedres.ops._sizes import empty_activation
from fusedres.values import Geometry, Gradient, Raw, ShortcutGradient, arithmetic_dtype


def _check_on_load(call: Call) -> None:
    shape = tuple(call["weight"].shape)
    if call["y"] is not None and shape[2:] != (1, 1):
        remedy = "store the gradient of the convolution's output first"
        call.fail(
            ShapeError, "y", "be None unless the weight is 1x1", f"a tensor with a weight of shape {shape}", remedy
        )


@op(
    "conv_dgrad",
    {
        "grad": activation("N K P Q"),
        "input_size": Integers(4, 0, Shape("N C H W")),
        "weight": activation("K C R S", remedy="grouped convolutions are not supported"),
        **convolution("H W", "R S"),
        "y": activation("N K P Q"),
        "gate": bits("N K P Q", only_with="y"),
        "coefficients": wide("4 K", given_with="y"),
        "input": activation("N C H W"),
        "input_state": wide("4 C", given_with="input"),
        "shortcut_stride": Integer(1),
        "shortcut": activation(
            "N D>=C H/shortcut_stride W/shortcut_stride", not_with="input", remedy="was the downsample branch skipped?"
        ),
        "shortcut_gate": bits("N D H/shortcut_stride W/shortcut_stride", only_with="shortcut"),
    },
    relations=_check_on_load,
)
def conv_dgrad(
    gradient: Gradient,
    weight: Tensor,
    input_size: Sequence[int],
    geometry: Geometry,
    input: Raw | None = None,
    shortcut: ShortcutGradient | None = None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of a convolution's input: dx = conv(·, weight)ᵀ dy, and what the layer before or the shortcut adds.

    dx[n, c, h, w] = Σ dy[n, k, p, q]·weight[k, c, r, s] over p·stride + r·dilation − padding = h, likewise q, s and w.
    dy can be formed on load for a 1x1 weight only.

    Args:
        gradient: dy, of shape (N, K, P, Q); packed bits are the only gate.
        weight: (K, C, R, S) in grad's dtype, dense and channels_last; groups are not supported.
        input_size: (N, C, H, W) of the result.
        input: the raw output of the layer before and its state: the result is dx where NOT (scale·y + shift <= 0), else
            0, which is the backward of the ReLU between the two layers. Not together with a shortcut.
        shortcut: its gradient is added at the pixels that its stride reaches; (N, C', ceil(H / s), ceil(W / s)) with
            C' >= C, of which the first C channels count.

    Returns:
        The result (N, C, H, W), an activation in grad's dtype; and with input the partial sums (T, 2, C) over T tiles
        of rows: Σd and Σd·x̂ with d the result as stored and x̂ = (y − mean)·invstd of input; float64 for float64,
        else float32. Without input they are empty. T depends on the backend and the sizes.
    """
    grad = gradient.grad
    grad_x = empty_activation(input_size, grad)
    dtype = arithmetic_dtype(grad.dtype)
    if input is None:
        return grad_x, grad.new_empty(0, dtype=dtype)
    tiles = 1
    if backend == "triton":
        from fusedres.kernels.conv_dgrad.configs import candidates, chosen, row_tiles

        stride, on_load = geometry.stride, gradient.y is not None
        options = candidates(grad, weight, stride, on_load)
        tiles = row_tiles(input_size, stride, chosen(options, grad, weight, input_size, stride, on_load))
    return grad_x, grad.new_empty((tiles, 2, input_size[1]), dtype=dtype)
