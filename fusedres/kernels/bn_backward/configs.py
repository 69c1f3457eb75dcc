"""Tiles of the kernels over (M, C) activations and their partials; nothing here has been measured on a GPU."""

from __future__ import annotations

import triton

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div

_PROGRAMS = 2048  # that a reduction is split over


def column_block(channels: int, most: int) -> int:
    """A power of two that divides the channels, or covers them, between 16 and `most`."""
    dividing = channels & -channels
    return max(16, min(most, dividing if dividing >= 32 else int(triton.next_power_of_2(channels))))


def row_tile(rows: int, channels: int) -> int:
    """Rows that one partial sums: it depends on sizes alone, so partials have one shape and one value anywhere."""
    wanted = ceil_div(rows * ceil_div(channels, 128), _PROGRAMS)
    for size in (64, 128, 256, 512, 1024, 2048):
        if wanted <= size:
            return size
    return 4096


def reduction(rows: int, channels: int, itemsize: int) -> list[Config]:
    """Candidates of a kernel that sums row tiles of an (M, C) activation."""
    tile = row_tile(rows, channels)
    if INTERPRETED:
        return [_steps(tile, tile // 2, column_block(channels, 256), 4)]
    found = []
    for warps, wide in ((4, 64), (4, 128), (8, 128), (8, 64), (4, 32)):
        block = column_block(channels, wide)
        config = _steps(tile, _rows(16 * 32 * warps * 2 // max(itemsize, 2), block, tile), block, warps)
        if config not in found:
            found.append(config)
    return found


def _rows(elements: int, block: int, most: int) -> int:
    return min(most, max(8, elements // block))


def _steps(tile: int, block_m: int, block_c: int, warps: int) -> Config:
    return Config({"BLOCK_M": block_m, "BLOCK_C": block_c, "STEPS": tile // block_m}, warps)


def merge(tiles: int, channels: int) -> list[Config]:
    """Candidates of a kernel that sums partials (T, rows, C) over T."""
    blocks = ((512, 8, 8), (1024, 4, 8), (256, 16, 8), (256, 8, 4), (128, 32, 8))
    if INTERPRETED:
        blocks = ((256, 256, 4),)
    elif channels >= 1024:
        blocks = ((256, 16, 8), (512, 8, 8), (128, 32, 8), (256, 8, 4))
    configs = []
    for block_t, block_c, warps in blocks:
        steps = int(triton.next_power_of_2(ceil_div(tiles, block_t))) if tiles else 0
        configs.append(Config({"BLOCK_T": block_t, "BLOCK_C": block_c, "STEPS": steps}, warps))
    return configs


def elementwise(channels: int, itemsize: int) -> list[Config]:
    """Candidates of a kernel over an (M, C) activation: 64, 32 or 128 bytes of a tensor in a thread."""
    if INTERPRETED:
        return [Config({"BLOCK_M": 256, "BLOCK_C": column_block(channels, 256)})]
    found = []
    for warps, size, wide in ((4, 64, 128), (4, 32, 128), (8, 64, 256), (4, 64, 64), (8, 32, 128)):
        block = column_block(channels, wide)
        rows = _rows(32 * warps * size // max(itemsize, 2), block, 4096)
        config = Config({"BLOCK_M": rows, "BLOCK_C": block}, warps)
        if config not in found:
            found.append(config)
    return found
