"""Gradient of a convolution's input, with the BatchNorm backward before it and what follows it fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.ops import _checks
from fusedres.ops._library import Op

_OP = "conv_dgrad"


def _check_conv_dgrad(
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
) -> None:
    _checks.activation(_OP, "grad", grad, backend)
    _checks.same_kind(_OP, "weight", weight, "grad", grad)
    _check_sizes(grad, weight, input_size, stride, padding, dilation)
    _check_on_load(grad, gate, y, coefficients, weight)
    if input is not None:
        if shortcut_grad is not None:
            raise ValueError(f"{_OP}: shortcut_grad must be None with input, got both; pass one of the two")
        _checks.same_kind(_OP, "input", input, "grad", grad)
        if list(input.shape) != list(input_size):
            raise ValueError(f"{_OP}: input must have shape {tuple(input_size)}, got {tuple(input.shape)}")
        if input_state is None:
            raise ValueError(f"{_OP}: input_state must be given with input, got None; pass the state of its BatchNorm")
        _checks.state(_OP, "input_state", input_state, input)
    elif input_state is not None:
        raise ValueError(f"{_OP}: input must be given with input_state, got None; pass the raw output of that layer")
    _check_shortcut(grad, input_size, shortcut_grad, shortcut_gate, shortcut_stride)


def _check_sizes(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    for name, sizes, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(sizes) != 2 or min(sizes) < least:
            raise ValueError(f"{_OP}: {name} must be two numbers of at least {least}, got {tuple(sizes)}")
    if len(input_size) != 4:
        raise ValueError(f"{_OP}: input_size must be (N, C, H, W), got {tuple(input_size)}")
    out_size = [
        (size + 2 * pad - step * (taps - 1) - 1) // s + 1
        for size, taps, s, pad, step in zip(input_size[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    expected = [input_size[0], weight.shape[0], *out_size]
    if input_size[1] != weight.shape[1]:
        raise ValueError(
            f"{_OP}: weight must have shape (K, {input_size[1]}, R, S) for input_size {tuple(input_size)}, "
            f"got {tuple(weight.shape)}; grouped convolutions are not supported"
        )
    if list(grad.shape) != expected:
        raise ValueError(
            f"{_OP}: grad must have shape {tuple(expected)}, the output of a convolution of {tuple(input_size)} with "
            f"weight {tuple(weight.shape)}, got {tuple(grad.shape)}; were stride, padding and dilation the forward's?"
        )


def _check_on_load(
    grad: Tensor, gate: Tensor | None, y: Tensor | None, coefficients: Tensor | None, weight: Tensor
) -> None:
    if y is None:
        for name, tensor in (("coefficients", coefficients), ("gate", gate)):
            if tensor is not None:
                raise ValueError(f"{_OP}: {name} must be None without y, got a tensor; pass y or mask grad first")
        return
    if weight.shape[2:].numel() != 1:
        raise ValueError(
            f"{_OP}: y must be None unless the weight is 1x1, got a weight of shape {tuple(weight.shape)}; "
            "store the gradient of the convolution's output first"
        )
    _checks.same(_OP, "y", y, "grad", grad)
    if coefficients is None:
        raise ValueError(f"{_OP}: coefficients must be given with y, got None; pass rows a, c1, mean, k")
    _checks.dense(_OP, "coefficients", coefficients, (4, grad.shape[1]), _checks.arithmetic_dtype(grad), grad)
    if gate is not None:
        _checks.dense(_OP, "gate", gate, _checks.mask_shape(grad), torch.uint8, grad)


def _check_shortcut(
    grad: Tensor,
    input_size: Sequence[int],
    shortcut_grad: Tensor | None,
    shortcut_gate: Tensor | None,
    stride: int,
) -> None:
    if shortcut_grad is None:
        if shortcut_gate is not None:
            raise ValueError(f"{_OP}: shortcut_gate must be None without shortcut_grad, got a tensor; pass both")
        return
    _checks.positive_stride(_OP, stride)
    _checks.same_kind(_OP, "shortcut_grad", shortcut_grad, "grad", grad)
    n, channels, h, w = input_size
    reached = (n, _checks.subsampled(h, stride), _checks.subsampled(w, stride))
    got = shortcut_grad.shape
    if reached != (got[0], got[2], got[3]) or channels > got[1]:
        raise ValueError(
            f"{_OP}: shortcut_grad must have the shape that {tuple(input_size)} reaches with stride {stride} and "
            f"channels appended, got {tuple(got)}; was the downsample branch skipped?"
        )
    if shortcut_gate is not None:
        _checks.dense(_OP, "shortcut_gate", shortcut_gate, _checks.mask_shape(shortcut_grad), torch.uint8, grad)


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
    dtype = _checks.arithmetic_dtype(grad)
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
    _check_conv_dgrad,
    _fake,
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
