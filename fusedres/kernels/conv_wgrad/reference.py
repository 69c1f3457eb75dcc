"""The weight gradient of a convolution in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fusedres.kernels.reference_core import affine, masked, per_channel
from fusedres.values import Geometry, Gradient, Raw, arithmetic_dtype


def conv_wgrad(gradient: Gradient, input: Raw, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """See fusedres.ops.conv_wgrad; there is one split."""
    grad, gate, y, coefficients = gradient
    stride, padding, dilation = geometry
    wide = arithmetic_dtype(grad.dtype)
    dy, (h, input_state) = grad, input
    if y is not None and coefficients is not None:
        a, c1, mean, k = (per_channel(row) for row in coefficients)
        dy = (a * (masked(grad, gate).to(wide) - c1 - (y.to(wide) - mean) * k)).to(grad.dtype)
    if input_state is not None:
        h = torch.relu(affine(h, input_state)).to(h.dtype)
    shape = (grad.shape[1], h.shape[1], kernel[0], kernel[1])
    weight_grad = conv2d_weight(h.to(wide), shape, dy.to(wide), stride, padding, dilation)
    return weight_grad.permute(0, 2, 3, 1).contiguous().unsqueeze(0)


def conv_wgrad_finalize(partials: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """See fusedres.ops.conv_wgrad.conv_wgrad_finalize."""
    grads = [torch.empty_like(weight) for weight in weights]
    for partial, grad in zip(partials, grads, strict=True):
        grad.copy_(partial.sum(0).permute(0, 3, 1, 2))
    return grads
