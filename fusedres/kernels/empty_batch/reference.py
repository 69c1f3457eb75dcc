"""Memory for a batch, from torch's allocator."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_batch(like: Tensor, batch: int) -> Tensor:
    """See fusedres.ops.empty_batch."""
    shape = (batch, *like.shape[1:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
