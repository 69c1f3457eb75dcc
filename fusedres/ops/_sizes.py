"""Dtypes and sizes that ops derive from those of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)


def empty_activation(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised activation of this shape, with the dtype and device of another tensor."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
