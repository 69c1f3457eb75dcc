"""Room for a batch of activations, as the backend wants it."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops._arguments import Integer, activation
from fusedres.ops._library import op
from fusedres.ops._sizes import empty_activation


@op("empty_batch", {"like": activation("N C H W"), "batch": Integer(0)})
def empty_batch(like: Tensor, batch: int, *, backend: str) -> Tensor:
    """An uninitialised activation of `batch` images like those of another; on the CPU large ones get huge pages."""
    return empty_activation((batch, *like.shape[1:]), like)
