"""Tiles of the statistics: (BLOCK_M, BLOCK_C) of an activation, (BLOCK_T, BLOCK_C) of the partial statistics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from fusedres.kernels.triton_core.launch import INTERPRETED, Config, ceil_div
from fusedres.kernels.triton_core.rows import row_tiles


@cache
def bn_partials(channels: int, dtype: torch.dtype) -> Sequence[Config]:
    """Return candidates, best guess first: 16 elements per thread (8 of float64), half or twice as many.

    Each element has two accumulators.
    """
    if INTERPRETED:
        return (Config({"BLOCK_M": 64, "BLOCK_C": 64} if channels >= 64 else {"BLOCK_M": 512, "BLOCK_C": 16}),)
    v = min(4, dtype.itemsize)
    return row_tiles(channels, dtype, ((4, v), (8, v), (4, v * 2), (8, v // 2), (4, v // 2)))


@cache
def bn_finalize(channels: int, dtype: torch.dtype) -> Sequence[Config]:
    """Return candidates, best guess first.

    There are few programs, so each takes a large block: up to 4 vectors of 16 bytes per thread and operand. The block
    does not depend on the number of tiles, because that depends on the batch.
    """
    if INTERPRETED:
        return (Config({"BLOCK_T": 64, "BLOCK_C": 64}),)
    block_c = max(block for block in (8, 16, 32) if block == 8 or block * 64 <= channels)  # 64 programs if possible
    block_t = 32_768 // dtype.itemsize // block_c
    warps = min(16, max(4, block_t * block_c * dtype.itemsize // 2048))
    choices = (
        (block_t, warps),
        (block_t, max(4, warps // 2)),
        (block_t // 2, warps),
        (block_t // 4, 4),
    )
    return tuple(Config({"BLOCK_T": t, "BLOCK_C": block_c}, w) for t, w in dict.fromkeys(choices))


@cache
def bn_frozen() -> Sequence[Config]:
    """Return one candidate, as there are only a few vectors."""
    return (Config({"BLOCK_C": 64 if INTERPRETED else 128}),)


def partial_tiles(rows: int, channels: int, config: Config, multiprocessors: int) -> tuple[int, int]:
    """Return the number of row tiles, and the rows of each but the last.

    A tile is at least 2 whole blocks. The aim is 20 warps per multiprocessor.
    """
    most = max(1, multiprocessors * 20 // config.num_warps // ceil_div(channels, config["BLOCK_C"]))
    tile_rows = max(2, ceil_div(ceil_div(rows, config["BLOCK_M"]), most)) * config["BLOCK_M"]
    return ceil_div(rows, tile_rows), tile_rows
