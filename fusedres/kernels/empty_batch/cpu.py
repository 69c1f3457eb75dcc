"""Memory for a batch, in huge pages if it is large."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.cpu_core import empty_channels_last


def empty_batch(like: Tensor, batch: int) -> Tensor:
    """See fusedres.ops.empty_batch."""
    return empty_channels_last((batch, *like.shape[1:]), like)
