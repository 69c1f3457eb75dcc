"""Tiles of the one-pass tail's kernels; nothing here has been measured on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div
from fusedres.kernels.splits import rows_split

# Rows, columns and depth of a tile, warps, stages; best guess first. For reduce the rows are K, the depth is M.
_Shape = tuple[int, int, int, int, int]
_INTERPRETED: tuple[_Shape, ...] = ((64, 64, 64, 4, 1),)
_FLOAT32: tuple[_Shape, ...] = ((64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (128, 64, 32, 8, 2), (64, 64, 32, 4, 3))
_FLOAT64: tuple[_Shape, ...] = ((64, 32, 16, 4, 2), (64, 64, 16, 8, 2), (64, 32, 32, 4, 2), (64, 32, 16, 8, 3))

_TAIL = {
    "narrow": ((64, 64, 64, 4, 1), (64, 128, 64, 4, 1), (128, 128, 64, 8, 1), (64, 256, 64, 4, 1)),
    "wide": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 256, 32, 4, 3)),
}
_REDUCE = {
    "narrow": ((64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (128, 64, 32, 4, 3), (128, 64, 64, 8, 3)),
    "wide": ((128, 256, 32, 8, 3), (128, 128, 64, 8, 2), (128, 128, 32, 8, 3), (64, 128, 64, 4, 2)),
}
_DGRAD = {
    "narrow": ((64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (64, 64, 32, 4, 3)),
    "wide": ((128, 128, 64, 8, 2), (128, 128, 32, 8, 3), (64, 128, 64, 4, 2), (64, 64, 64, 4, 3)),
}


def _shapes(table: Mapping[str, tuple[_Shape, ...]], channels: int, dtype: torch.dtype) -> Sequence[_Shape]:
    if INTERPRETED:
        return _INTERPRETED
    if dtype is torch.float64:
        return _FLOAT64
    if dtype is torch.float32:
        return _FLOAT32
    return table["narrow" if channels <= 64 else "wide"]


def _most(channels: int) -> int:
    """No block is larger than the channels need."""
    return max(16, int(triton.next_power_of_2(channels)))


def _distinct(configs: Sequence[Config]) -> list[Config]:
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def tail(channels: int, in_channels: int, dtype: torch.dtype) -> list[Config]:
    """Candidates of one_pass_tail, for K and C."""
    return _distinct(
        [
            Config(
                {"BLOCK_M": m, "BLOCK_K": min(k, _most(channels)), "BLOCK_C": min(c, _most(in_channels))}, warps, stages
            )
            for m, k, c, warps, stages in _shapes(_TAIL, in_channels, dtype)
        ]
    )


def reduce(
    rows: int, channels: int, columns: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> list[Config]:
    """Candidates of one_pass_reduce, for M, K and the columns of z and x."""
    configs = []
    for k, c, m, warps, stages in _shapes(_REDUCE, columns[0], dtype):
        k, c = min(k, _most(channels)), min(c, _most(max(columns)))
        tiles = ceil_div(channels, k) * sum(ceil_div(count, c) for count in columns)
        steps = rows_split(ceil_div(rows, m), tiles, 4 if warps == 4 else 1, device)
        configs.append(Config({"BLOCK_M": m, "BLOCK_K": k, "BLOCK_C": c, "STEPS": steps}, warps, stages))
    return _distinct(configs)


def dgrad(channels: int, in_channels: int, dtype: torch.dtype) -> list[Config]:
    """Candidates of one_pass_dgrad, for K and C."""
    return _distinct(
        [
            Config(
                {
                    "BLOCK_M": m,
                    "BLOCK_C": min(c, _most(in_channels)),
                    "BLOCK_K": min(k, _most(max(channels, in_channels))),
                },
                warps,
                stages,
            )
            for m, c, k, warps, stages in _shapes(_DGRAD, in_channels, dtype)
        ]
    )
