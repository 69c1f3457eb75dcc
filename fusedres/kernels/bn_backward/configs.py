"""Tiles of the kernels over (M, C) activations and their partials; nothing here has been measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import triton

from fusedres.kernels.triton_core.launch import INTERPRETED, Config, ceil_div

_PROGRAMS = 2048  # that a reduction is split over, at 128 channels each


def column_block(channels: int, most: int) -> int:
    """The widest block up to `most` of those that cover the channels with the fewest lanes idle."""
    return min((block for block in (256, 128, 64, 32, 16) if block <= most), key=lambda b: ceil_div(channels, b) * b)


def row_tile(rows: int, channels: int) -> int:
    """Rows that one partial sums: by sizes alone, so that partials have one shape and one value everywhere."""
    wanted = ceil_div(rows * ceil_div(channels, 128), _PROGRAMS)
    return next((size for size in (64, 128, 256, 512, 1024, 2048) if wanted <= size), 4096)


@lru_cache(1024)  # as many shapes come by
def reduction(rows: int, channels: int, itemsize: int) -> Sequence[Config]:
    """Candidates of a kernel that sums row tiles of an (M, C) activation: 16 or 32 bytes a thread and operand."""
    size = row_tile(rows, channels)
    if INTERPRETED:
        tiles = [Config({"BLOCK_M": size // 2, "BLOCK_C": _interpreted(channels)})]
    else:
        tiles = _tiles(channels, itemsize, ((4, 32, 64), (8, 32, 128), (8, 32, 64), (4, 32, 32), (4, 16, 64)), size)
    return tuple(tiles)


@cache
def elementwise(channels: int, itemsize: int, branches: int) -> Sequence[Config]:
    """Candidates of a kernel that maps an (M, C) activation: 64, 32 or 16 bytes a thread and operand."""
    if INTERPRETED:
        return (Config({"BLOCK_M": 256, "BLOCK_C": _interpreted(channels)}),)
    shapes = ((4, 32, 64), (8, 32, 128), (8, 32, 64), (4, 16, 64), (4, 32, 32))
    if branches == 1 and itemsize < 8:  # of float64 the first would spill with Triton 3.6
        shapes = ((4, 64, 64), (4, 32, 64), (8, 64, 128), (8, 32, 128), (8, 64, 64))
    return tuple(_tiles(channels, itemsize, shapes, 1 << 20))


@cache
def merge(channels: int) -> Sequence[Config]:
    """Candidates of a kernel that sums partials (T, rows, C) over T."""
    blocks: tuple[tuple[int, int, int], ...] = ((512, 8, 8), (1024, 4, 8), (256, 16, 8), (256, 8, 4), (128, 32, 8))
    if INTERPRETED:
        blocks = ((256, 256, 4),)
    elif channels >= 1024:
        blocks = ((256, 16, 8), (512, 8, 8), (128, 32, 8), (256, 8, 4))
    return tuple(Config({"BLOCK_T": block_t, "BLOCK_C": block_c}, warps) for block_t, block_c, warps in blocks)


def _interpreted(channels: int) -> int:
    return max(16, min(256, int(triton.next_power_of_2(channels))))


def _tiles(channels: int, itemsize: int, shapes: tuple[tuple[int, int, int], ...], most_rows: int) -> list[Config]:
    """Distinct tiles of (warps, bytes a thread, most channels)."""
    found: list[Config] = []
    for warps, size, wide in shapes:
        # fewer channels than threads: wider vectors of per-channel values change hands through shared memory
        block = column_block(channels, wide)
        config = Config({"BLOCK_M": min(most_rows, 32 * warps * size // (itemsize * block)), "BLOCK_C": block}, warps)
        if config not in found:
            found.append(config)
    return found
