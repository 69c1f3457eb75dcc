"""Tiles of the Gram matrix. Nothing here was measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from fusedres.kernels.triton_core.blocks import largest_block
from fusedres.kernels.triton_core.launch import INTERPRETED, Config, Gpu, ceil_div, fitting
from fusedres.kernels.triton_core.splits import resident, rows_split

# BLOCK_M, BLOCK_A, BLOCK_B, warps, stages; best guess first.
_Shape = tuple[int, int, int, int, int]
_NARROW: tuple[_Shape, ...] = ((64, 64, 64, 4, 2), (128, 64, 64, 4, 2), (32, 64, 64, 4, 3), (64, 64, 64, 4, 3))
_MIDDLE: tuple[_Shape, ...] = ((64, 128, 128, 8, 2), (32, 128, 128, 8, 3), (64, 64, 128, 8, 2), (64, 64, 64, 4, 2))
_WIDE: tuple[_Shape, ...] = ((64, 128, 128, 8, 2), (32, 128, 128, 8, 3), (32, 128, 256, 8, 3), (64, 64, 128, 8, 2))
_AMPERE: tuple[_Shape, ...] = ((32, 128, 128, 8, 3), (64, 64, 128, 8, 2), (32, 64, 128, 8, 3), (32, 64, 64, 4, 3))
_FLOAT32: tuple[_Shape, ...] = ((16, 64, 64, 4, 3), (16, 64, 64, 4, 2), (16, 64, 128, 8, 2), (16, 64, 64, 8, 2))
_FLOAT64: tuple[_Shape, ...] = ((16, 32, 32, 4, 2), (16, 64, 64, 4, 2), (16, 64, 64, 8, 2), (16, 64, 32, 4, 2))


@cache
def tiles(channels: int, dtype: torch.dtype, gpu: Gpu) -> Sequence[Config]:
    """Return candidates for gram_tiles."""
    if INTERPRETED:
        shapes: tuple[_Shape, ...] = ((64, 64, 64, 4, 1),)
    elif dtype is torch.float64:
        shapes = _FLOAT64
    elif dtype is torch.float32:
        shapes = _FLOAT32
    elif channels <= 64:
        shapes = _NARROW
    elif not gpu.has_wgmma:  # larger ones spill
        shapes = _AMPERE
    else:
        shapes = _WIDE if channels > 128 else _MIDDLE
    most = largest_block(channels)
    found = (
        Config({"BLOCK_M": m, "BLOCK_A": min(a, most), "BLOCK_B": min(b, most)}, warps, stages)
        for m, a, b, warps, stages in shapes
    )

    def shared_bytes(config: Config) -> int:  # after the loop, the sums change their layout
        m, a, b = config["BLOCK_M"], config["BLOCK_A"], config["BLOCK_B"]
        return max(config.num_stages * (a + b) * m * dtype.itemsize, a * b * max(4, dtype.itemsize))

    return fitting(found, shared_bytes, gpu)


def steps(rows: int, channels: int, config: Config, dtype: torch.dtype, device: torch.device) -> int:
    """Return the number of tiles of BLOCK_M rows in a split; dtype is that of the sums."""
    a, b = config["BLOCK_A"], config["BLOCK_B"]
    at_once = resident(a * b, dtype.itemsize, config.num_warps)
    return rows_split(ceil_div(rows, config["BLOCK_M"]), _upper_tiles(channels, a, b), at_once, device)


@cache
def _upper_tiles(channels: int, a: int, b: int) -> int:
    """Return the number of tiles that are not completely below the diagonal."""
    ends = range(b, channels + b, b)
    return sum(first < end for first in range(0, channels, a) for end in ends)


@cache
def pivot(channels: int) -> Sequence[Config]:
    """Return candidates for gram_pivot."""
    most = largest_block(channels)
    return tuple(Config({"BLOCK_C": min(most, block)}, warps) for block, warps in ((64, 1), (128, 4)))
