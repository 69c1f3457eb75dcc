"""Dtypes and sizes that ops derive from those of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return wide_dtype(tensor.dtype)


def mask_shape(x: Tensor) -> tuple[int, int, int, int]:
    """Shape of the packed bits of an (N, C, H, W) activation: (N, H, W, ceil(C / 8))."""
    n, c, h, w = x.shape
    return n, h, w, (c + 7) // 8


def subsampled(size: int, stride: int) -> int:
    """Pixels left when every stride-th is taken: ceil(size / stride)."""
    return (size + stride - 1) // stride


def empty_activation(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised activation of this shape, with the dtype and device of another tensor."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
