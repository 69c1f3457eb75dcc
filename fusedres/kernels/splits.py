"""How a reduction over rows is split among programs, and how its splits are merged; nothing here has been measured."""

from __future__ import annotations

import torch

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div, multiprocessors


def rows_split(steps: int, tiles: int, resident: int, device: torch.device) -> int:
    """Steps of a split: the fewest that keep the programs to those a device holds, `resident` a multiprocessor.

    One of 1, 2, 3, 4, 6, 8, 12, 16, ..., as every number is compiled for itself.
    """
    if INTERPRETED:
        return ceil_div(steps, 2)
    wanted = max(1, resident * multiprocessors(device) // tiles)
    size = 1
    while ceil_div(steps, size) > wanted:
        size = size * 4 // 3 if size % 3 == 0 else (size * 3 // 2 if size > 1 else 2)
    return size


def merge(splits: int) -> list[Config]:
    """Candidates of a kernel that sums splits (S, elements) over S in fixed order."""
    if INTERPRETED:
        return [Config({"BLOCK_S": 2, "BLOCK": 4096, "STEPS": ceil_div(splits, 2)})]
    shapes = ((64, 64), (32, 128), (16, 256), (128, 32)) if splits > 16 else ((4, 256), (8, 128), (4, 512), (16, 128))
    return [Config({"BLOCK_S": s, "BLOCK": block, "STEPS": ceil_div(splits, s)}) for s, block in shapes]
