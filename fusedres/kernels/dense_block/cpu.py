"""The passes over the buffer of a dense block in C++ (csrc/dense_block)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import address, matrix_of
from fusedres.kernels.cpu_core import empty_channels_last
from fusedres.values import BnBranch


def dense_append_(buffer: Tensor, x: Tensor, first: int, moments: Tensor | None) -> None:
    """See fusedres.ops.dense_block."""
    _C.dense_append(matrix_of(buffer), matrix_of(x), first, address(moments), torch.get_num_threads())


def dense_bn_relu(buffer: Tensor, state: Tensor) -> Tensor:
    """See fusedres.ops.dense_block."""
    n, _, h, w = buffer.shape
    channels = state.shape[1]
    out = empty_channels_last((n, channels, h, w), buffer)
    _C.dense_bn_relu(matrix_of(buffer), state.data_ptr(), channels, out.data_ptr(), torch.get_num_threads())
    return out


def dense_bn_relu_backward_(grad: Tensor, buffer: BnBranch, grad_x: Tensor, corrections: Tensor) -> Tensor:
    """See fusedres.ops.dense_block."""
    x, state, batch_statistics = buffer
    sums = (state.new_empty if grad.numel() else state.new_zeros)((2, state.shape[1]))
    _C.dense_bn_relu_backward(
        matrix_of(grad),
        matrix_of(x),
        state.data_ptr(),
        batch_statistics,
        grad_x.data_ptr(),
        corrections.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


def dense_gradient(
    buffer: Tensor, grad_x: Tensor, moments: Tensor | None, corrections: Tensor | None, first: int, channels: int
) -> Tensor:
    """See fusedres.ops.dense_block."""
    n, _, h, w = buffer.shape
    out = empty_channels_last((n, channels, h, w), buffer)
    _C.dense_gradient(
        grad_x.data_ptr(),
        matrix_of(buffer),
        address(moments),
        address(corrections),
        first,
        matrix_of(out),
        torch.get_num_threads(),
    )
    return out
