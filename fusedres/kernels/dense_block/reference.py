"""The passes over the buffer of a dense block in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import affine, per_channel
from fusedres.values import BnBranch, arithmetic_dtype


def dense_append_(buffer: Tensor, x: Tensor, first: int, moments: Tensor | None) -> None:
    """See fusedres.ops.dense_block."""
    end = first + x.shape[1]
    buffer[:, first:end] = x
    if moments is not None and x.numel():
        wide = x.double()
        mean = wide.mean((0, 2, 3))
        moments[first:end, 0] = mean
        moments[first:end, 1] = (wide - per_channel(mean)).square().sum((0, 2, 3))


def dense_bn_relu(buffer: Tensor, state: Tensor) -> Tensor:
    """See fusedres.ops.dense_block."""
    z = affine(buffer[:, : state.shape[1]], state).relu_()
    return z.to(buffer.dtype).contiguous(memory_format=torch.channels_last)


def dense_bn_relu_backward_(grad: Tensor, buffer: BnBranch, grad_x: Tensor, corrections: Tensor) -> Tensor:
    """See fusedres.ops.dense_block."""
    x, state, batch_statistics = buffer
    channels = state.shape[1]
    x = x[:, :channels]
    d = grad.to(state.dtype).masked_fill(affine(x, state) <= 0, 0)
    grad_x[:, :channels] = (grad_x[:, :channels].to(state.dtype) + per_channel(state[2]) * d).to(grad_x.dtype)
    normalised = (x.to(state.dtype) - per_channel(state[0])) * per_channel(state[1])
    sums = torch.stack((d.sum((0, 2, 3)), (d * normalised).sum((0, 2, 3))))
    if batch_statistics and grad.numel():
        share = channels / grad.numel()
        scaled = sums.double() * state[2].double() * share
        corrections[:channels, 0] += scaled[0]
        corrections[:channels, 1] += scaled[1] * state[1].double()
    return sums


def dense_gradient(
    buffer: Tensor, grad_x: Tensor, moments: Tensor | None, corrections: Tensor | None, first: int, channels: int
) -> Tensor:
    """See fusedres.ops.dense_block."""
    end = first + channels
    grad = grad_x[:, first:end]
    if moments is None or corrections is None:
        return grad.contiguous(memory_format=torch.channels_last).clone(memory_format=torch.channels_last)
    dtype = arithmetic_dtype(grad.dtype)
    centred = buffer[:, first:end].to(dtype) - per_channel(moments[first:end, 0]).to(dtype)
    offset, slope = (per_channel(corrections[first:end, i]).to(dtype) for i in (0, 1))
    found = (grad.to(dtype) - offset - centred * slope).to(grad.dtype)
    return found.contiguous(memory_format=torch.channels_last)
