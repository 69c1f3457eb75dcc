"""Tiles of the Gram matrix; nothing here has been measured on a GPU."""

from __future__ import annotations

import torch
import triton

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div
from fusedres.kernels.splits import rows_split

# BLOCK_M, BLOCK_A, BLOCK_B, warps, stages, and the programs a multiprocessor is meant to hold; best guess first.
_Shape = tuple[int, int, int, int, int, int]
_NARROW: tuple[_Shape, ...] = (
    (64, 64, 64, 4, 2, 4),
    (128, 64, 64, 4, 2, 2),
    (32, 64, 64, 4, 3, 4),
    (64, 64, 64, 4, 3, 4),
)
_MIDDLE: tuple[_Shape, ...] = (
    (64, 128, 128, 8, 2, 1),
    (32, 128, 128, 8, 3, 1),
    (64, 64, 128, 4, 2, 2),
    (64, 64, 64, 4, 2, 4),
)
_WIDE: tuple[_Shape, ...] = (
    (64, 128, 128, 8, 2, 1),
    (32, 128, 128, 8, 3, 1),
    (32, 128, 256, 8, 3, 1),
    (64, 64, 128, 4, 2, 2),
)
_FLOAT32: tuple[_Shape, ...] = (
    (32, 64, 64, 4, 2, 4),
    (16, 64, 64, 4, 3, 4),
    (32, 64, 128, 8, 2, 2),
    (16, 128, 128, 8, 2, 1),
)
_FLOAT64: tuple[_Shape, ...] = (
    (16, 32, 32, 4, 2, 4),
    (16, 64, 64, 4, 2, 2),
    (32, 32, 32, 4, 2, 4),
    (16, 64, 32, 4, 2, 2),
)


def tiles(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> list[Config]:
    """Candidates of gram_tiles."""
    if INTERPRETED:
        shapes: tuple[_Shape, ...] = ((64, 64, 64, 4, 1, 1),)
    elif dtype is torch.float64:
        shapes = _FLOAT64
    elif dtype is torch.float32:
        shapes = _FLOAT32
    else:
        shapes = _NARROW if channels <= 64 else _MIDDLE if channels <= 128 else _WIDE
    most = max(16, int(triton.next_power_of_2(channels)))
    found = []
    for block_m, block_a, block_b, warps, stages, resident in shapes:
        block_a, block_b = min(block_a, most), min(block_b, most)
        columns = range(block_b, channels + block_b, block_b)
        count = sum(a < end for a in range(0, channels, block_a) for end in columns)  # not below the diagonal
        steps = rows_split(ceil_div(rows, block_m), count, resident, device)
        blocks = {"BLOCK_M": block_m, "BLOCK_A": block_a, "BLOCK_B": block_b, "STEPS": steps}
        config = Config(blocks, warps, stages)
        if config not in found:
            found.append(config)
    return found


def pivot(channels: int) -> list[Config]:
    """Candidates of gram_pivot."""
    most = max(16, int(triton.next_power_of_2(channels)))
    return [Config({"BLOCK_C": min(most, block)}, warps) for block, warps in ((64, 1), (128, 4))]
