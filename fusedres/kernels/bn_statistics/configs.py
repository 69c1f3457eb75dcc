"""Tiles of the statistics: (BLOCK_M, BLOCK_C) of an activation, (BLOCK_T, BLOCK_C) of the partial statistics."""

from __future__ import annotations

import torch

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div
from fusedres.kernels.tiles import row_tiles


def bn_partials(channels: int, dtype: torch.dtype) -> list[Config]:
    """Candidates, best guess first; two accumulators an element of the tile stay in registers."""
    if INTERPRETED:
        return [Config({"BLOCK_M": 64, "BLOCK_C": 64} if channels >= 64 else {"BLOCK_M": 512, "BLOCK_C": 16})]
    return row_tiles(channels, dtype)


def bn_finalize(tiles: int, channels: int) -> list[Config]:
    """Candidates, best guess first: few programs, so each is wide, up to 4 vectors of 16 bytes a thread and operand."""
    if INTERPRETED:
        return [Config({"BLOCK_T": 64, "BLOCK_C": 64})]
    block_c = min(32, max(8, 1 << (channels // 64).bit_length() - 1 if channels >= 64 else 8))  # 64 programs or more
    block_t = min(8192 // block_c, max(64, 1 << (tiles - 1).bit_length()))
    warps = min(16, max(4, block_t * block_c // 512))
    choices = (
        (block_t, warps),
        (block_t, max(4, warps // 2)),
        (max(64, block_t // 2), warps),
        (max(64, block_t // 4), 4),
    )
    return [Config({"BLOCK_T": t, "BLOCK_C": block_c}, w) for t, w in dict.fromkeys(choices)]


def bn_frozen(channels: int) -> list[Config]:
    """One candidate: a handful of vectors."""
    return [Config({"BLOCK_C": 64 if INTERPRETED else 128})]


def partial_tiles(rows: int, channels: int, config: Config, multiprocessors: int) -> tuple[int, int]:
    """Number of row tiles, and rows of each but the last: whole blocks, at least 2, for 32 warps a multiprocessor."""
    most = max(1, multiprocessors * 32 // config.num_warps // ceil_div(channels, config["BLOCK_C"]))
    tile_rows = max(2, ceil_div(ceil_div(rows, config["BLOCK_M"]), most)) * config["BLOCK_M"]
    return ceil_div(rows, tile_rows), tile_rows
