"""How a reduction over rows is split among programs, and how the splits are merged. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from fusedres.kernels.triton_core.launch import INTERPRETED, Config, ceil_div, multiprocessors


def rows_split(steps: int, tiles: int, resident: int, device: torch.device) -> int:
    """Return the steps of a split: the fewest for which all programs fit on the device at once.

    A multiprocessor holds `resident` programs.
    """
    if INTERPRETED:
        return ceil_div(steps, 2)
    return ceil_div(steps, max(1, resident * multiprocessors(device) // tiles))


def resident(elements: int, itemsize: int, num_warps: int) -> int:
    """Return how many programs a multiprocessor should hold, given the registers that a tile of sums takes."""
    registers = elements * itemsize // (4 * 32 * num_warps)
    return max(1, (16 if registers <= 32 else 8) // num_warps)


def merge(splits: int) -> Sequence[Config]:
    """Return candidates for a kernel that sums splits (S, elements) over S in fixed order."""
    return _merge(splits > 16)


@cache
def _merge(many: bool) -> Sequence[Config]:
    if INTERPRETED:
        return (Config({"BLOCK_S": 2, "BLOCK": 4096}),)
    shapes = ((64, 64), (32, 128), (16, 256), (128, 32)) if many else ((4, 256), (4, 128), (4, 512), (16, 128))
    return tuple(Config({"BLOCK_S": s, "BLOCK": block}) for s, block in shapes)
