"""Tiles of the one-pass tail's kernels. Nothing here was measured on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch

from fusedres.kernels.triton_core.blocks import largest_block
from fusedres.kernels.triton_core.launch import INTERPRETED, Config, Gpu, ceil_div, fitting
from fusedres.kernels.triton_core.splits import resident, rows_split

# Rows, columns and depth of a tile, warps, stages; best guess first. For reduce, the rows are K and the depth is M.
_Shape = tuple[int, int, int, int, int]
_INTERPRETED: tuple[_Shape, ...] = ((64, 64, 64, 4, 1),)
_FLOAT32: tuple[_Shape, ...] = ((64, 64, 32, 4, 2), (64, 128, 16, 8, 2), (128, 64, 32, 8, 2), (64, 64, 32, 4, 3))
_FLOAT64: tuple[_Shape, ...] = ((64, 32, 16, 4, 2), (64, 64, 16, 8, 2), (64, 32, 32, 4, 2), (64, 32, 16, 8, 3))

_TAIL = {
    "narrow": (
        (64, 64, 64, 4, 1),
        (64, 128, 64, 4, 1),
        (128, 128, 64, 8, 1),
        (64, 256, 64, 4, 1),
        (128, 64, 64, 8, 1),
    ),
    "wide": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 256, 32, 4, 3)),
}
# Followed by the projection's product. In steps of more than two wgmmas, Triton 3.6's ptxas makes each wgmma wait for
# the one before.
_TAIL_JOINED = _TAIL | {"wide": ((128, 256, 32, 8, 3), (128, 128, 32, 8, 3), (64, 128, 32, 4, 4), (64, 256, 32, 4, 3))}
# Without wgmma, 128 columns or more spill in four warps.
_TAIL_AMPERE = _TAIL | {"narrow": ((64, 64, 64, 4, 1), (64, 128, 64, 8, 1), (128, 128, 64, 8, 1), (128, 64, 64, 8, 1))}
_REDUCE = {
    "narrow": ((64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (128, 64, 32, 4, 3), (128, 64, 64, 8, 3)),
    "wide": (
        (128, 256, 32, 8, 3),
        (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 3),
        (64, 128, 64, 4, 2),
        (128, 64, 64, 8, 3),
    ),
}
_DGRAD = {
    "narrow": ((64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (64, 64, 32, 4, 3)),
    "wide": ((128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (128, 128, 32, 8, 4), (64, 64, 32, 4, 4)),  # like _TAIL_JOINED
}
_DGRAD_AMPERE = _DGRAD | {"wide": ((128, 128, 64, 8, 2), (128, 128, 32, 8, 3), (64, 128, 64, 4, 2), (64, 64, 64, 4, 3))}


def _shapes(table: Mapping[str, tuple[_Shape, ...]], channels: int, dtype: torch.dtype) -> Sequence[_Shape]:
    if INTERPRETED:
        return _INTERPRETED
    if dtype is torch.float64:
        return _FLOAT64
    if dtype is torch.float32:
        return _FLOAT32
    return table["narrow" if channels <= 64 else "wide"]


@cache
def tail(channels: int, in_channels: int, joined: bool, dtype: torch.dtype, gpu: Gpu) -> Sequence[Config]:
    """Return candidates for one_pass_tail with K and C; joined: with the projection's product."""
    table = (_TAIL_JOINED if joined else _TAIL) if gpu.has_wgmma else _TAIL_AMPERE
    found = (
        Config(
            {"BLOCK_M": m, "BLOCK_K": min(k, largest_block(channels)), "BLOCK_C": min(c, largest_block(in_channels))},
            warps,
            stages,
        )
        for m, k, c, warps, stages in _shapes(table, in_channels, dtype)
    )
    return fitting(found, lambda c: _operands(c, dtype, "BLOCK_M", "BLOCK_K", "BLOCK_C"), gpu)


@cache
def reduce(channels: int, columns: tuple[int, int], dtype: torch.dtype, gpu: Gpu) -> Sequence[Config]:
    """Return candidates for one_pass_reduce with K and the columns of z and x."""
    found = (
        Config(
            {"BLOCK_M": m, "BLOCK_K": min(k, largest_block(channels)), "BLOCK_C": min(c, largest_block(max(columns)))},
            warps,
            stages,
        )
        for k, c, m, warps, stages in _shapes(_REDUCE, columns[0], dtype)
        if c <= 128 or (gpu.has_wgmma and not columns[1])  # 256 columns spill without wgmma, or with a projection
    )

    def shared_bytes(config: Config) -> int:  # after the loop, the sums change their layout
        sums = config["BLOCK_K"] * config["BLOCK_C"] * max(4, dtype.itemsize)
        return max(_operands(config, dtype, "BLOCK_K", "BLOCK_C", "BLOCK_M"), sums)

    return fitting(found, shared_bytes, gpu)


def steps(
    rows: int, channels: int, columns: tuple[int, int], config: Config, dtype: torch.dtype, device: torch.device
) -> int:
    """Return the number of tiles of BLOCK_M rows in a split of one_pass_reduce; dtype is that of the sums."""
    k, c = config["BLOCK_K"], config["BLOCK_C"]
    tiles = ceil_div(channels, k) * sum(ceil_div(count, c) for count in columns)
    at_once = resident(k * c, dtype.itemsize, config.num_warps)
    return rows_split(ceil_div(rows, config["BLOCK_M"]), tiles, at_once, device)


@cache
def dgrad(channels: int, in_channels: int, dtype: torch.dtype, gpu: Gpu) -> Sequence[Config]:
    """Return candidates for one_pass_dgrad with K and C."""
    deepest = largest_block(max(channels, in_channels))
    found = (
        Config({"BLOCK_M": m, "BLOCK_C": min(c, largest_block(in_channels)), "BLOCK_K": min(k, deepest)}, warps, stages)
        for m, c, k, warps, stages in _shapes(_DGRAD if gpu.has_wgmma else _DGRAD_AMPERE, in_channels, dtype)
    )
    return fitting(found, lambda c: _operands(c, dtype, "BLOCK_M", "BLOCK_C", "BLOCK_K"), gpu)


def _operands(config: Config, dtype: torch.dtype, rows: str, columns: str, depth: str) -> int:
    """Return the bytes of both operands of a product in all stages."""
    return config.num_stages * (config[rows] + config[columns]) * config[depth] * dtype.itemsize
