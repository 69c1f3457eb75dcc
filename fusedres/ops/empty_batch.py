"""Room for a batch of activations, as the backend wants it."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Integer, activation
from fusedres.ops._library import Op


def _fake(like: Tensor, batch: int, backend: str) -> Tensor:
    shape = (batch, *like.shape[1:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


EMPTY_BATCH = Op(
    "empty_batch(Tensor like, int batch, str backend) -> Tensor",
    "empty_batch",
    {"like": activation("N C H W"), "batch": Integer(0)},
    _fake,
)


def empty_batch(like: Tensor, batch: int, backend: str) -> Tensor:
    """An uninitialised channels_last tensor of `batch` images like those of another.

    Args:
        like: (N, C, H, W), channels_last.
        batch: images of the result.
        backend: "reference", "cpu" or "triton"; on the CPU large results get huge pages.

    Returns:
        (batch, C, H, W), channels_last, like's dtype and device.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    out: Tensor = EMPTY_BATCH(like, batch, backend)
    return out
