"""Tiles of the kernels over (M, C) activations and their partials. Nothing here was measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

from fusedres.kernels.triton_core.blocks import column_block, largest_block
from fusedres.kernels.triton_core.launch import INTERPRETED, Config, ceil_div

_PROGRAMS = 2048  # programs that a reduction aims for, at 128 channels each


def row_tile(rows: int, channels: int) -> int:
    """Return how many rows one partial sums.

    It depends on the sizes only, so the partials have the same shape and values on every device.
    """
    wanted = ceil_div(rows * ceil_div(channels, 128), _PROGRAMS)
    return next((size for size in (64, 128, 256, 512, 1024, 2048) if wanted <= size), 4096)


@lru_cache(1024)  # more shapes than a run has
def reduction(rows: int, channels: int, itemsize: int) -> Sequence[Config]:
    """Return candidates for a kernel that sums row tiles of (M, C)."""
    return reduction_of(row_tile(rows, channels), channels, itemsize)


@lru_cache(1024)
def reduction_of(size: int, channels: int, itemsize: int) -> Sequence[Config]:
    """Return candidates for a kernel that sums tiles of `size` rows, with 16 or 32 bytes per thread and operand."""
    if INTERPRETED:
        tiles = [Config({"BLOCK_M": size // 2, "BLOCK_C": _interpreted(channels)})]
    else:
        tiles = _tiles(channels, itemsize, ((4, 32, 64), (8, 32, 128), (8, 32, 64), (4, 32, 32), (4, 16, 64)), size)
    return tuple(tiles)


@cache
def elementwise(channels: int, itemsize: int, branches: int) -> Sequence[Config]:
    """Return candidates for an elementwise kernel over (M, C), with 64, 32 or 16 bytes per thread and operand."""
    if INTERPRETED:
        return (Config({"BLOCK_M": 256, "BLOCK_C": _interpreted(channels)}),)
    shapes = ((4, 32, 64), (8, 32, 128), (8, 32, 64), (4, 16, 64), (4, 32, 32))
    if branches == 1 and itemsize < 8:  # in float64 the first spills with Triton 3.6
        shapes = ((4, 64, 64), (4, 32, 64), (8, 64, 128), (8, 32, 128), (8, 64, 64))
    return tuple(_tiles(channels, itemsize, shapes, 1 << 20))


@cache
def merge(channels: int) -> Sequence[Config]:
    """Return candidates for a kernel that sums partials (T, rows, C) over T."""
    blocks: tuple[tuple[int, int, int], ...] = ((512, 8, 8), (1024, 4, 8), (256, 16, 8), (256, 8, 4), (128, 32, 8))
    if INTERPRETED:
        blocks = ((256, 256, 4),)
    elif channels >= 1024:
        blocks = ((256, 16, 8), (512, 8, 8), (128, 32, 8), (256, 8, 4))
    return tuple(Config({"BLOCK_T": block_t, "BLOCK_C": block_c}, warps) for block_t, block_c, warps in blocks)


def _interpreted(channels: int) -> int:
    return min(256, largest_block(channels))


def _tiles(channels: int, itemsize: int, shapes: tuple[tuple[int, int, int], ...], most_rows: int) -> list[Config]:
    """Return the distinct tiles of shapes (warps, bytes per thread, most channels)."""
    found: list[Config] = []
    for warps, size, wide in shapes:
        # fewer channels than threads: wider vectors of per-channel values would pass through shared memory
        block = column_block(channels, wide)
        config = Config({"BLOCK_M": min(most_rows, 32 * warps * size // (itemsize * block)), "BLOCK_C": block}, warps)
        if config not in found:
            found.append(config)
    return found
