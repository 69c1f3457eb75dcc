"""One-pass statistics and gradients on the CPU: oneDNN's convolutions do the large products.

In float32 they took half the time of torch.mm for each of them at every ResNet-50 stage (two cores, batch 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.one_pass import reference
from fusedres.kernels.one_pass.reference import one_pass_statistics
from fusedres.kernels.shortcut_grad.cpu import shortcut_grad_

__all__ = ["one_pass_backward", "one_pass_statistics"]


def one_pass_backward(
    d: Tensor, sum_d: Tensor, z: Tensor, conv_weight: Tensor, state: Tensor, projected: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass."""
    if d.dtype is not torch.float32:
        return reference.one_pass_backward(d, sum_d, z, conv_weight, state, projected, total)
    channels, in_channels = conv_weight.shape[:2]
    weight = conv_weight.detach().to(state.dtype)
    scaled = weight * state[2].view(-1, 1, 1, 1)
    grad_z, cross, _ = torch.ops.aten.convolution_backward(
        d, z, scaled, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, False)
    )
    count = z.numel() // in_channels
    grad_conv, grad_weight, quadratic, constant = reference.small_products(
        cross.view(channels, in_channels), sum_d, weight.view(channels, in_channels), state, projected, total, count
    )
    correction = torch.conv2d(z, quadratic.neg().view(in_channels, in_channels, 1, 1), constant)
    grad_z = grad_z.contiguous(memory_format=torch.channels_last)
    shortcut_grad_(grad_z, correction.contiguous(memory_format=torch.channels_last), None, 1)
    return grad_z, grad_conv.view(conv_weight.shape).to(conv_weight.dtype), grad_weight
