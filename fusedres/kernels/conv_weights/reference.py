"""Convolution weights in the layout and dtype that the kernels read, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def conv_weights(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """See fusedres.ops.conv_weights."""
    converted = (torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last) for weight in weights)
    return [out.copy_(weight) for out, weight in zip(converted, weights, strict=True)]
