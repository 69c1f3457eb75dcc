"""Convolutions of packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from fusedres import _C
from fusedres.kernels.arguments import weight_map


def packed_size(weight: Sequence[int]) -> int:
    """Return how many elements a weight of this shape (K, C, R, S) has when it is packed, on every backend."""
    size: int = _C.packed_size(weight_map(weight))
    return size


@cache
def faster_than_onednn() -> bool:
    """Return whether this cpu kernel and conv_wgrad's were measured to be faster than oneDNN on such a processor."""
    return bool(_C.own_convolutions_are_faster())
