"""Tiles of conv_wgrad and conv_wgrad_finalize, and how many splits of the rows fill a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from fusedres.kernels.triton_core.launch import (
    INTERPRETED,
    Config,
    Gpu,
    ceil_div,
    choose,
    fitting,
    gpu,
    multiprocessors,
    shared_memory,
)
from fusedres.values import Gradient, Raw


@cache
def conv_wgrad(
    k: int, c: int, dtype: torch.dtype, h_computed: bool, dy_computed: bool, gated: bool, gpu: Gpu
) -> tuple[Config, ...]:
    """Return candidates, best guess first."""
    first, second = (c, k) if h_computed else (k, c)

    def config(block_first: int, block_second: int, block_m: int, num_warps: int, num_stages: int) -> Config:
        block_c, block_k = (block_first, block_second) if h_computed else (block_second, block_first)
        return Config({"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_C": block_c}, num_warps, num_stages)

    tiles: list[tuple[int, int, int, int, int]]
    if INTERPRETED:
        tiles = [(64, 64, 64, 4, 1)]
    elif dtype is torch.float64:
        tiles = [(64, 64, 16, 4, 2), (32, 32, 32, 4, 2), (64, 32, 16, 4, 2), (32, 32, 16, 4, 2)]
    elif dtype is torch.float32:
        tiles = [(64, 64, 32, 4, 3), (64, 64, 16, 4, 3), (64, 32, 32, 4, 3), (32, 64, 32, 4, 3)]
    elif dy_computed and (h_computed or gated):  # the loads of both are not pipelined and take registers
        if first <= 64:
            tiles = [(64, 64, 32, 4, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 4), (64, 64, 64, 4, 3)]
        else:
            tiles = [(128, 64, 32, 8, 3), (128, 64, 32, 8, 2), (128, 64, 16, 8, 3), (64, 64, 32, 4, 3)]
        if second > 64:
            tiles.insert(0, (min(128, 64 * ceil_div(first, 64)), 128, 32, 8, 3))
    elif first <= 64 and second <= 64:
        tiles = [(64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 32, 4, 4), (64, 64, 128, 4, 2)]
    elif first <= 64:
        tiles = [(64, 128, 64, 4, 3), (64, 128, 64, 4, 2), (64, 128, 32, 4, 4), (64, 64, 64, 4, 4)]
        if second >= 256:
            tiles.insert(0, (64, 256, 64, 4, 3))
    elif second <= 64:
        warps = 8 if h_computed or dy_computed or not gpu.has_wgmma else 4  # computed operands need registers
        tiles = [(128, 64, 64, warps, 3), (128, 64, 64, warps, 4), (64, 64, 64, 4, 4)]
        # Without wgmma, the 128x64 tile with BLOCK_M=32 spills with Triton 3.6.
        tiles.append((128, 64, 32, warps, 4) if gpu.has_wgmma else (64, 64, 32, 4, 4))
    elif gpu.has_wgmma and not (h_computed or dy_computed):
        # For other tiles, Triton 3.6's ptxas makes each wgmma wait for the one before: for 128x128 in eight warps
        # always, for the rest in a strided 1x1 with 512 channels or more.
        tiles = [(128, 128, 64, 4, 3), (128, 128, 64, 4, 2), (64, 128, 128, 4, 2)]
        # The 64x256 tile with BLOCK_M=64 spills with Triton 3.9.
        tiles.append((64, 256, 32, 4, 4) if second >= 256 else (64, 128, 64, 4, 3))
        if 256 <= second <= 512:
            tiles.insert(0, (128, 256, 64, 8, 3))
    else:
        tiles = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (64, 128, 64, 4, 3)]
        if second >= 256 and not dy_computed:  # with 128 sums per thread, dy's coefficients would spill
            tiles.insert(0, (128, 256, 64, 8, 3))

    def shared_bytes(config: Config) -> int:
        columns = config["BLOCK_C"] + config["BLOCK_K"] * (2 if dy_computed else 1)  # grad and y
        return config.num_stages * columns * config["BLOCK_M"] * dtype.itemsize

    return fitting((config(*tile) for tile in tiles), shared_bytes, gpu)


class Plan(NamedTuple):
    """How one launch divides its problem."""

    candidates: Sequence[Config]
    config: Config
    steps: int  # of BLOCK_M rows, per split
    splits: int


def plan(gradient: Gradient, input: Raw, kernel: Sequence[int]) -> Plan:
    """Return the chosen config and how it splits the rows.

    Fake tensors take the shape of the partial sums from this too, so sizes become integers.
    """
    grad, normalised, on_load = gradient.grad, input.state is not None, gradient.y is not None
    k, c, taps = int(grad.shape[1]), int(input.y.shape[1]), int(kernel[0] * kernel[1])
    candidates = conv_wgrad(k, c, grad.dtype, normalised, on_load, gradient.gate is not None, gpu(grad.device))
    rows = int(grad.numel()) // k
    loads = "normalised" if normalised else "plain", "on-load" if on_load else "stored"
    config = choose(candidates, "conv_wgrad", grad.dtype, rows, c, k, f"{kernel[0]}x{kernel[1]}", *loads)
    block_m, block_k, block_c = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"]
    tiles = taps * ceil_div(k, block_k) * ceil_div(c, block_c)
    threads = 32 * config.num_warps
    by_registers = 65_536 // (threads * (block_k * block_c // threads + 64))
    by_shared_memory = shared_memory(grad.device) // (config.num_stages * (block_k + block_c) * block_m * grad.itemsize)
    side_by_side = multiprocessors(grad.device) * max(1, min(by_registers, by_shared_memory))
    # A tile of sums is written and read: 8 bytes per sum, from memory at half the assumed speed of L2 (for the rows).
    sums = 16 * block_k * block_c / ((block_k + block_c) * block_m * grad.itemsize)
    return Plan(candidates, config, *_split(ceil_div(rows, block_m), tiles, side_by_side, sums))


@cache
def _split(total: int, tiles: int, side_by_side: int, sums: float) -> tuple[int, int]:
    """Return (steps, splits) with the least waves · (steps of a split + cost of its sums in steps)."""

    def cost(splits: int) -> float:
        return ceil_div(tiles * splits, side_by_side) * (ceil_div(total, splits) + sums)

    best = min(range(1, min(total, 2 + 3 * side_by_side // tiles) + 1), key=cost)
    steps = ceil_div(total, best)
    return steps, ceil_div(total, steps)


def conv_wgrad_finalize(splits: int) -> tuple[Config, ...]:
    """Return candidates, best guess first."""
    return _finalize(splits > 8)


@cache
def _finalize(many: bool) -> tuple[Config, ...]:
    if INTERPRETED:
        return (Config({"BLOCK": 4096, "SPLITS": 4}),)
    small = Config({"BLOCK": 512, "SPLITS": 4}), Config({"BLOCK": 256, "SPLITS": 4})
    large = Config({"BLOCK": 64, "SPLITS": 16}), Config({"BLOCK": 128, "SPLITS": 32})
    return large + small if many else small + large
