"""Gradient of a convolution's input, with the BatchNorm backward before it and what follows it fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Integer, Integers, activation, bits, convolution, wide
from fusedres.ops._library import Op
from fusedres.ops._shapes import Shape
from fusedres.ops._sizes import arithmetic_dtype


def _check_on_load(call: Call) -> None:
    shape = tuple(call["weight"].shape)
    if call["y"] is not None and shape[2:] != (1, 1):
        remedy = "store the gradient of the convolution's output first"
        call.fail(
            ShapeError, "y", "be None unless the weight is 1x1", f"a tensor with a weight of shape {shape}", remedy
        )


def _fake(
    grad: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input: Tensor | None,
    input_state: Tensor | None,
    shortcut_grad: Tensor | None,
    shortcut_gate: Tensor | None,
    shortcut_stride: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(tuple(input_size), dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    dtype = arithmetic_dtype(grad)
    if input is None:
        return grad_x, grad.new_empty(0, dtype=dtype)
    tiles = 1
    if backend == "triton":
        from fusedres.kernels.conv_dgrad.configs import candidates, chosen, row_tiles

        on_load = y is not None
        options = candidates(grad, weight, stride, on_load)
        tiles = row_tiles(input_size, stride, chosen(options, grad, weight, input_size, stride, on_load))
    return grad_x, grad.new_empty((tiles, 2, input_size[1]), dtype=dtype)


CONV_DGRAD = Op(
    "conv_dgrad(Tensor grad, Tensor? gate, Tensor? y, Tensor? coefficients, Tensor weight, int[] input_size, "
    "int[2] stride, int[2] padding, int[2] dilation, Tensor? input, Tensor? input_state, Tensor? shortcut_grad, "
    "Tensor? shortcut_gate, int shortcut_stride, str backend) -> (Tensor, Tensor)",
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
        "shortcut_grad": activation(
            "N D>=C H/shortcut_stride W/shortcut_stride", not_with="input", remedy="was the downsample branch skipped?"
        ),
        "shortcut_gate": bits("N D H/shortcut_stride W/shortcut_stride", only_with="shortcut_grad"),
    },
    _fake,
    _check_on_load,
)


def conv_dgrad(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    backend: str,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    gate: Tensor | None = None,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    input: Tensor | None = None,
    input_state: Tensor | None = None,
    shortcut_grad: Tensor | None = None,
    shortcut_gate: Tensor | None = None,
    shortcut_stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """Gradient of a convolution's input: dx = conv(·, weight)ᵀ dy, and what the layer before or the shortcut adds.

    dx[n, c, h, w] = Σ dy[n, k, p, q]·weight[k, c, r, s] over p·stride + r·dilation − padding = h, likewise q, s and w.

    On load (1x1 only), with y: dy = a·(d − c1 − (y − mean)·k), rounded to grad's dtype; d = grad where the gate is
    open, else 0. This is BatchNorm's backward: a = scale, c1 = Σd/M, k = invstd·Σd·x̂/M.

    On store, one of, or neither:
        input: the result is dx where NOT (scale·input + shift <= 0), else 0: the backward of a ReLU between two layers.
        shortcut_grad: the result is dx, plus shortcut_grad where its gate is open at the pixels (p·s, q·s).

    Args:
        grad: (N, K, P, Q), channels_last; the gradient of the convolution's output, or of its BatchNorm's with y.
        weight: (K, C, R, S) in grad's dtype, dense and channels_last; groups 1.
        input_size: (N, C, H, W) of the result.
        backend: "reference" or "triton".
        stride, padding, dilation: two numbers each, of the convolution.
        gate: packed bits (N, P, Q, ceil(K / 8)) of bn_add_relu, or None.
        y: like grad, the convolution's raw output, or None. coefficients: (4, K) with it, rows a, c1, mean, k;
            float64 for float64 grad, else float32.
        input: (N, C, H, W) like the result, the raw output of the layer before, or None. input_state: (4, C), its
            bn_statistics or bn_frozen.
        shortcut_grad: (N, C', ceil(H / s), ceil(W / s)), C' >= C, channels_last, or None. shortcut_gate: its packed
            bits, or None. shortcut_stride: s, at least 1.

    Returns:
        The result (N, C, H, W), channels_last, in grad's dtype; and with input partial sums (T, 2, C) over T tiles of
        rows: Σd and Σd·x̂ with d the result as stored and x̂ = (input − mean)·invstd; float64 for float64, else
        float32. Without input they are empty. T depends on the backend and the sizes.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    grad_x, partials = CONV_DGRAD(
        grad,
        gate,
        y,
        coefficients,
        weight,
        input_size,
        stride,
        padding,
        dilation,
        input,
        input_state,
        shortcut_grad,
        shortcut_gate,
        shortcut_stride,
        backend,
    )
    return grad_x, partials
