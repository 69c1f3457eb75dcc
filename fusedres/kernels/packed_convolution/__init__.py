"""Convolutions of packed weights."""

from __future__ import annotations

from collections.abc import Sequence

from fusedres import _C
from fusedres.kernels.arguments import convolution_map, weight_map
from fusedres.values import Geometry


def packed_size(weight: Sequence[int], winograd: bool) -> int:
    """Return how many elements a weight of this shape (K, C, R, S) has when it is packed, on every backend."""
    size: int = _C.packed_size(weight_map(weight), winograd)
    return size


def takes_winograd(weight: Sequence[int], geometry: Geometry) -> bool:
    """Return whether Winograd's algorithm takes a weight of this shape (K, C, R, S)."""
    return bool(_C.takes_winograd(convolution_map((0, weight[1], 0, 0), weight, geometry)))


def winograd_is_faster(x: Sequence[int], weight: Sequence[int], geometry: Geometry, *, packed_before: bool) -> bool:
    """Return whether the cpu kernel was measured to be faster with Winograd's algorithm, for such shapes.

    Args:
        packed_before: the time to pack the weight does not count.
    """
    return bool(_C.winograd_is_faster(convolution_map(x, weight, geometry), packed_before))
