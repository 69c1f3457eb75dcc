"""Tiles of the one-pass units' small products. Nothing here was measured on a GPU."""

from __future__ import annotations

from functools import cache

import torch

from fusedres.kernels.triton_core.blocks import largest_block
from fusedres.kernels.triton_core.launch import INTERPRETED, Config, ceil_div
from fusedres.kernels.triton_core.splits import rows_split

# Rows, columns and depth of a tile, warps, stages; best guess first.
_Shape = tuple[int, int, int, int, int]
_INTERPRETED: tuple[_Shape, ...] = ((64, 64, 64, 4, 1),)
_FLOAT32: tuple[_Shape, ...] = ((64, 64, 16, 4, 3), (64, 64, 32, 8, 2), (64, 128, 16, 8, 2), (32, 64, 32, 4, 2))
_FLOAT64: tuple[_Shape, ...] = ((32, 32, 32, 4, 2), (32, 32, 16, 4, 3), (16, 32, 32, 2, 2), (32, 64, 16, 4, 2))
_FLOAT32_NARROW: tuple[_Shape, ...] = ((32, 32, 32, 4, 2), (32, 32, 64, 4, 2), (16, 32, 32, 2, 2), (32, 64, 32, 4, 2))

# Most splits of quadratic's sum over K: one unrolled loop merges them all.
_MOST_SPLITS = 16


@cache
def project(channels: int, in_channels: int, dtype: torch.dtype) -> list[Config]:
    """Return candidates for one_pass_project with K and C; dtype is the type it multiplies in."""
    shapes = _INTERPRETED if INTERPRETED else _FLOAT64 if dtype is torch.float64 else _FLOAT32
    most_k, most_c = largest_block(channels), largest_block(in_channels)
    found = (
        Config({"BLOCK_K": min(k, most_k), "BLOCK_C": min(c, most_c), "BLOCK_D": min(d, most_c)}, warps, stages)
        for k, c, d, warps, stages in shapes
    )
    return list({str(config): config for config in found}.values())


@cache
def vectors(channels: int) -> list[Config]:
    """Return candidates for one_pass_state, which handles only a few vectors."""
    sizes = ((64, 1),) if INTERPRETED else ((32, 1), (64, 2), (128, 4), (256, 4))
    return [Config({"BLOCK_K": min(block, largest_block(channels))}, warps) for block, warps in sizes]


@cache
def rows(in_channels: int) -> list[Config]:
    """Return candidates for kernels that go along rows of (K, C), with 8 to 32 elements per thread."""
    sizes = ((64, 64, 4),) if INTERPRETED else ((2048, 512, 4), (1024, 512, 4), (4096, 512, 4), (4096, 512, 8))
    found = []
    for elements, columns, warps in sizes:
        columns = min(columns, largest_block(in_channels))
        block_k = 64 if INTERPRETED else min(32, elements // columns)
        found.append(Config({"BLOCK_K": block_k, "BLOCK_C": columns}, warps))
    return list({str(config): config for config in found}.values())


@cache
def quadratic(channels: int, in_channels: int, dtype: torch.dtype, device: torch.device) -> list[Config]:
    """Return candidates for one_pass_quadratic with K and C."""
    shapes = _INTERPRETED if INTERPRETED else _FLOAT64 if dtype is torch.float64 else _FLOAT32
    if not INTERPRETED and dtype is not torch.float64 and in_channels <= 128:
        shapes = _FLOAT32_NARROW
    most = largest_block(in_channels)
    found = []
    for a, b, d, warps, stages in shapes:
        a, b = min(a, most), min(b, most)
        tiles = sum(first < end for first in range(0, in_channels, a) for end in range(b, in_channels + b, b))
        blocks = ceil_div(channels, d)
        steps = max(rows_split(blocks, tiles, 2, device), ceil_div(blocks, _MOST_SPLITS))
        found.append(Config({"BLOCK_A": a, "BLOCK_B": b, "BLOCK_D": d, "STEPS": steps}, warps, stages))
    return list({str(config): config for config in found}.values())


@cache
def constant(in_channels: int) -> list[Config]:
    """Return candidates for one_pass_constant: rows and columns of Q. There are few programs, so blocks are large."""
    sizes = ((64, 64, 4),) if INTERPRETED else ((8, 256, 8), (4, 256, 4), (16, 128, 8), (8, 128, 4))
    return [Config({"BLOCK_A": a, "BLOCK_B": min(b, largest_block(in_channels))}, warps) for a, b, warps in sizes]
