"""New buffers for the cpu kernels, in huge pages if the buffer is large."""

from __future__ import annotations

import torch  # before the core: both then share torch's OpenMP runtime
from torch import Tensor

from fusedres import _C


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialised tensor of the same shape, dtype and layout."""
    return _advised(torch.empty_like(tensor))


def empty_channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised channels_last tensor of this shape, with the dtype and device of `like`."""
    return _advised(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last))


def _advised(tensor: Tensor) -> Tensor:
    if tensor.numel() * tensor.element_size() >= _C.LARGE_BYTES:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor
