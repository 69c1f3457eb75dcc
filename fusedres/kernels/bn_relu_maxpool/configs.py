"""Tiles of bn_relu_maxpool and backward (BLOCK_P x BLOCK_Q windows of BLOCK_C channels), and of its weight gradient.

Nothing here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.kernels.triton_core.blocks import column_block, largest_block
from fusedres.kernels.triton_core.launch import INTERPRETED, Config, ceil_div, choose, input_precision
from fusedres.kernels.triton_core.splits import rows_split


@cache
def reduction(channels: int) -> Sequence[Config]:
    """Return candidates, best guess first; a program sums STEPS tiles."""
    steps = 2 if INTERPRETED else 8
    return tuple(Config({**tile.blocks, "STEPS": steps}, tile.num_warps) for tile in windows(channels))


def reduction_partials(x: Tensor) -> int:
    """Return how many rows of partial sums a reduction over x (N, C, H, W) writes.

    Sizes must be integers, also those of a fake tensor.
    """
    config = choose(reduction(int(x.shape[1])))
    return ceil_div(window_tiles(x, config), config["STEPS"])


def window_tiles(x: Tensor, config: Config) -> int:
    """Return the number of tiles of windows over x (N, C, H, W), for one block of channels."""
    n, _, h, w = (int(size) for size in x.shape)
    return n * ceil_div(ceil_div(h, 2), config["BLOCK_P"]) * ceil_div(ceil_div(w, 2), config["BLOCK_Q"])


@cache
def windows(channels: int) -> Sequence[Config]:
    """Return candidates for a kernel that writes its windows, best guess first."""
    if INTERPRETED:
        return (Config({"BLOCK_P": 4, "BLOCK_Q": 8, "BLOCK_C": 128}),)
    block_c = column_block(channels, 64)
    return tuple(
        Config({"BLOCK_P": p, "BLOCK_Q": q, "BLOCK_C": block_c}, warps)
        for p, q, warps in ((2, 8, 4), (4, 8, 8), (2, 4, 2), (4, 4, 4))
    )


# (BLOCK_P, BLOCK_Q, BLOCK_K, maximum of BLOCK_N, warps, stages). The values that a quad reads take registers: twice as
# many columns, or twice as many quads, spill in half precision.
_WGRAD: dict[str, tuple[tuple[int, int, int, int, int, int], ...]] = {
    "half": ((2, 8, 64, 64, 8, 2), (2, 8, 64, 64, 8, 3), (2, 8, 64, 32, 8, 2), (1, 16, 64, 64, 8, 2)),
    "tf32": ((2, 8, 64, 64, 8, 2), (2, 8, 64, 32, 8, 2), (2, 8, 32, 32, 4, 2), (2, 8, 64, 64, 8, 1)),
    "ieee": ((2, 8, 64, 64, 8, 1), (2, 8, 32, 64, 8, 1), (2, 8, 32, 32, 4, 1), (2, 8, 64, 32, 8, 1)),
    "double": ((2, 8, 32, 32, 8, 1), (2, 8, 32, 32, 4, 1), (2, 8, 32, 16, 4, 1), (2, 8, 32, 16, 8, 1)),
}


@cache
def wgrad(columns: int, dtype: torch.dtype, precision: str) -> Sequence[Config]:
    """Return candidates, best guess first, for a filter of `columns` elements per output channel."""
    kind = "double" if dtype is torch.float64 else "half" if dtype.itemsize == 2 else precision
    tiles = ((4, 8, 64, 256, 4, 1),) if INTERPRETED else _WGRAD[kind]
    found = []
    for block_p, block_q, block_k, most, warps, stages in tiles:
        block_n = min(most, largest_block(columns))
        blocks = {"BLOCK_P": block_p, "BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_N": block_n}
        found.append(Config(blocks, warps, stages))
    return tuple(found)


class WgradPlan(NamedTuple):
    """How one launch divides its problem."""

    candidates: Sequence[Config]
    config: Config
    tiles: int  # of quads
    steps: int  # tiles per split
    splits: int


def wgrad_plan(grad: Tensor, input: Tensor, kernel: Sequence[int]) -> WgradPlan:
    """Return the chosen config and how it splits the quads.

    Fake tensors take the shape of the partial sums from this too, so sizes become integers.
    """
    columns = int(kernel[0] * kernel[1] * input.shape[1])
    candidates = wgrad(columns, grad.dtype, input_precision(grad.dtype))
    n, k, p, q = (int(size) for size in grad.shape)
    config = choose(candidates, "bn_relu_maxpool_wgrad", grad.dtype, n * p * q, columns, k)
    tiles = n * ceil_div(p, config["BLOCK_P"]) * ceil_div(q, config["BLOCK_Q"])
    sums = ceil_div(k, config["BLOCK_K"]) * ceil_div(columns, config["BLOCK_N"])
    steps = rows_split(tiles, sums, max(1, 8 // config.num_warps), grad.device)
    return WgradPlan(candidates, config, tiles, steps, ceil_div(tiles, steps))
