"""One-pass statistics and gradients on the CPU: small products in C++ (csrc/one_pass), large ones as convolutions.

In float32, oneDNN's convolutions took half the time of torch.mm for each large product at every ResNet-50 stage
(two cores, batch 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels import cpu_convolution
from fusedres.kernels.arguments import matrix_of, norm_of
from fusedres.kernels.cpu_convolution import Purpose
from fusedres.kernels.one_pass import reference
from fusedres.kernels.shortcut_grad.cpu import shortcut_grad_
from fusedres.values import DENSE, Gram, GramState, Norm, Raw, ShortcutGradient


def one_pass_statistics(conv_weight: Tensor, gram: Gram, count: int, norm: Norm) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.one_pass."""
    pivot, total, squares = gram
    channels, in_channels = conv_weight.shape[:2]
    matrix = _matrix(conv_weight, pivot.dtype)
    state = torch.empty((4, channels), dtype=pivot.dtype, device=pivot.device)
    projected = torch.empty((channels, in_channels), dtype=pivot.dtype, device=pivot.device)
    _C.one_pass_statistics(
        matrix_of(matrix),
        count,
        pivot.data_ptr(),
        total.data_ptr(),
        squares.data_ptr(),
        state.data_ptr(),
        projected.data_ptr(),
        norm_of(norm),
        torch.get_num_threads(),
    )
    return state, projected


def one_pass_backward(
    d: Tensor, sum_d: Tensor, z: Tensor, conv_weight: Tensor, gram_state: GramState, with_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass."""
    if d.dtype is not torch.float32:
        return reference.one_pass_backward(d, sum_d, z, conv_weight, gram_state, with_input)
    state, projected, total = gram_state
    channels, in_channels = conv_weight.shape[:2]
    threads = torch.get_num_threads()
    matrix = _matrix(conv_weight, state.dtype)
    weight = matrix_of(matrix)
    scaled = torch.empty((channels, in_channels, 1, 1), dtype=state.dtype, device=state.device)
    _C.one_pass_scale(weight, state.data_ptr(), scaled.data_ptr(), threads)
    narrow = in_channels <= _C.ONE_PASS_NARROW
    grad_z: Tensor | None = None
    cross: Tensor | None = None
    if with_input or not narrow:
        grad_z, cross = _products(d, z, scaled, with_input, not narrow)
    grad_conv, grad_weight = torch.empty_like(projected), torch.empty_like(sum_d)
    quadratic = torch.empty((in_channels, in_channels, 1, 1), dtype=state.dtype, device=state.device)
    constant = torch.empty(in_channels, dtype=state.dtype, device=state.device)
    correction_at = (quadratic.data_ptr(), constant.data_ptr()) if with_input else (0, 0)
    _C.one_pass_grads(
        matrix_of(d),
        z.data_ptr(),
        weight,
        0 if cross is None else cross.view(channels, in_channels).data_ptr(),
        sum_d.data_ptr(),
        (state.data_ptr(), projected.data_ptr(), total.data_ptr()),
        (grad_conv.data_ptr(), grad_weight.data_ptr(), *correction_at),
        threads,
    )
    grad_conv = grad_conv.view(conv_weight.shape).to(conv_weight.dtype)
    if grad_z is None:
        return z.new_empty(0), grad_conv, grad_weight
    if _prefers_own(z, quadratic, Purpose.FORWARD):
        correction = cpu_convolution.convolve(z, quadratic, DENSE, constant)
    else:
        # Not torch.conv2d: autocast would round its result, and the next call needs float32.
        correction = torch.convolution(z, quadratic, constant, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    grad_z = grad_z.contiguous(memory_format=torch.channels_last)
    shortcut_grad_(grad_z, ShortcutGradient(correction.contiguous(memory_format=torch.channels_last), None))
    return grad_z, grad_conv, grad_weight


def _products(
    d: Tensor, z: Tensor, weight: Tensor, with_input: bool, with_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a 1x1 convolution's input and weight, each None unless wanted."""
    own_input = with_input and _prefers_own(z, weight, Purpose.INPUT_GRADIENT)
    own_weight = with_weight and _prefers_own(z, weight, Purpose.WEIGHT_GRADIENT)
    grad_input = cpu_convolution.input_gradient(d, weight, DENSE) if own_input else None
    grad_weight = cpu_convolution.weight_gradient(d, Raw(z, None), weight, DENSE) if own_weight else None
    needs = (with_input and not own_input, with_weight and not own_weight, False)
    if any(needs):
        found = torch.ops.aten.convolution_backward(d, z, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, needs)
        return grad_input if own_input else found[0], grad_weight if own_weight else found[1]
    return grad_input, grad_weight


def _prefers_own(z: Tensor, weight: Tensor, purpose: Purpose) -> bool:
    return cpu_convolution.is_faster(z.shape, weight.shape, DENSE, weight.dtype, 1, purpose)


def _matrix(conv_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of a 1x1 convolution as a dense (K, C) matrix."""
    return conv_weight.detach().reshape(conv_weight.shape[:2]).to(dtype).contiguous()
