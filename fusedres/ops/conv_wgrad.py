"""The weight gradient of a convolution between two BatchNorms, both of them applied on load."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops import _checks
from fusedres.ops._library import Op

_MOST_WEIGHTS = 4  # one launch of conv_wgrad_finalize takes


def check_geometry(
    op: str,
    name: str,
    grad: Tensor,
    input: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """The sizes of a convolution's output, or its gradient, called `name`, are those of its input and geometry."""
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"{op}: kernel, stride and dilation must be at least 1 and padding at least 0, got "
            f"{tuple(kernel)}, {tuple(stride)}, {tuple(dilation)} and {tuple(padding)}"
        )
    if input.numel() == 0 or grad.numel() == 0:
        raise ValueError(f"{op}: input and {name} must not be empty, got {tuple(input.shape)}, {tuple(grad.shape)}")
    if grad.numel() // grad.shape[1] >= 2**31 or input.numel() // input.shape[1] >= 2**31:
        raise ValueError(
            f"{op}: input and {name} must have fewer than 2³¹ pixels, got "
            f"{tuple(input.shape)}, {tuple(grad.shape)}; split the batch"
        )
    reached = [
        (size + 2 * pad - step * (taps - 1) - 1) // by + 1
        for size, pad, step, taps, by in zip(input.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    if (grad.shape[0], *grad.shape[2:]) != (input.shape[0], *reached):
        raise ValueError(
            f"{op}: {name} must have shape ({input.shape[0]}, K, {reached[0]}, {reached[1]}), what the convolution "
            f"of input {tuple(input.shape)} gives, got {tuple(grad.shape)}; do stride and padding belong to this one?"
        )


def _check_conv_wgrad(
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
) -> None:
    _checks.activation("conv_wgrad", "grad", grad, backend)
    _checks.same_kind("conv_wgrad", "input", input, "grad", grad)
    if (y is None) != (coefficients is None) or (gate is not None and y is None):
        got = ", ".join(
            name for name, it in (("gate", gate), ("y", y), ("coefficients", coefficients)) if it is not None
        )
        raise ValueError(f"conv_wgrad: y and coefficients must be given together, and gate only with them, got {got}")
    if y is not None and coefficients is not None:
        _checks.same("conv_wgrad", "y", y, "grad", grad)
        _checks.state("conv_wgrad", "coefficients", coefficients, grad)
    if gate is not None:
        _checks.dense("conv_wgrad", "gate", gate, _checks.mask_shape(grad), torch.uint8, grad)
    if input_state is not None:
        _checks.state("conv_wgrad", "input_state", input_state, input)
    check_geometry("conv_wgrad", "grad", grad, input, kernel, stride, padding, dilation)


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
    return grad.new_empty(shape, dtype=_checks.arithmetic_dtype(grad))


CONV_WGRAD = Op(
    "conv_wgrad(Tensor grad, Tensor? gate, Tensor? y, Tensor? coefficients, Tensor input, Tensor? input_state, "
    "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, str backend) -> Tensor",
    "conv_wgrad",
    _check_conv_wgrad,
    _fake_conv_wgrad,
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


def _check_conv_wgrad_finalize(partials: list[Tensor], weights: list[Tensor], backend: str) -> None:
    if not 1 <= len(weights) <= _MOST_WEIGHTS or len(partials) != len(weights):
        raise ValueError(
            f"conv_wgrad_finalize: partials and weights must be lists of one length, 1 to {_MOST_WEIGHTS}, "
            f"got {len(partials)} and {len(weights)}"
        )
    for i, (partial, weight) in enumerate(zip(partials, weights, strict=True)):
        if weight.dim() != 4 or weight.dtype not in _checks.FLOATING:
            raise TypeError(
                f"conv_wgrad_finalize: weights[{i}] must be a floating-point (K, C, R, S) tensor, got {weight.dtype} "
                f"{tuple(weight.shape)}"
            )
        k, c, r, s = weight.shape
        if partial.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"conv_wgrad_finalize: partials[{i}] must be float32 or float64, got {partial.dtype}")
        splits = partial.shape[0] if partial.dim() else 0
        shape = (max(splits, 1), k, r, s, c)
        _checks.dense("conv_wgrad_finalize", f"partials[{i}]", partial, shape, partial.dtype, weights[0])
        if weight.device != weights[0].device:
            raise RuntimeError(
                f"conv_wgrad_finalize: weights[{i}] must be on {weights[0].device} like weights[0], got "
                f"{weight.device}; move one of them"
            )


CONV_WGRAD_FINALIZE = Op(
    "conv_wgrad_finalize(Tensor[] partials, Tensor[] weights, str backend) -> Tensor[]",
    "conv_wgrad",
    _check_conv_wgrad_finalize,
    lambda partials, weights, backend: [torch.empty_like(weight) for weight in weights],
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
