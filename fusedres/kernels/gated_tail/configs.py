"""Tiles of the gated tail's kernels over (M, C) activations. Nothing here was measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedres.kernels.bn_backward import configs
from fusedres.kernels.triton_core.launch import Config, ceil_div


def row_tile(rows: int, groups: int, channels: int) -> int:
    """Return how many rows one partial sums; rows are those of all groups, and no partial reaches into two of them."""
    tile = configs.row_tile(rows, channels)
    group = rows // groups
    while tile > 64 and tile >= 2 * group:
        tile //= 2
    return tile


def tiles_of(rows: int, groups: int, x: Tensor) -> int:
    """Return the partials of each group of rows."""
    return ceil_div(rows // groups, row_tile(rows, groups, x.shape[1]))


def reduction(tile: int, channels: int, itemsize: int) -> Sequence[Config]:
    """Return candidates for the kernel that sums tiles of this many rows."""
    return configs.reduction_of(tile, channels, itemsize)


def elementwise(channels: int, itemsize: int) -> Sequence[Config]:
    """Return candidates for the kernels that touch each element once."""
    return configs.elementwise(channels, itemsize, 2)
