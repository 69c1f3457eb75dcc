"""How a reduction over rows is split among programs, and how its splits are merged; nothing here has been measured."""

from __future__ import annotations

import torch

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div, multiprocessors


def rows_split(steps: int, tiles: int, resident: int, device: torch.device) -> int:
    """Steps of a split: the fewest that keep the programs to those a device holds, `resident` a multiprocessor.

    Rounded up to one of sixteen numbers between two powers of two, as each is compiled for itself.
    """
    if INTERPRETED:
        return ceil_div(steps, 2)
    wanted = max(1, resident * multiprocessors(device) // tiles)
    size = ceil_div(steps, wanted)
    grain = 1 << max(0, size.bit_length() - 5)
    return ceil_div(size, grain) * grain


def merge(splits: int) -> list[Config]:
    """Candidates of a kernel that sums splits (S, elements) over S in fixed order."""
    if INTERPRETED:
        return [Config({"BLOCK_S": 2, "BLOCK": 4096, "STEPS": ceil_div(splits, 2)})]
    shapes = ((64, 64), (32, 128), (16, 256), (128, 32)) if splits > 16 else ((4, 256), (8, 128), (4, 512), (16, 128))
    return [Config({"BLOCK_S": s, "BLOCK": block, "STEPS": ceil_div(splits, s)}) for s, block in shapes]
