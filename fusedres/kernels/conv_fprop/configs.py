"""Tile sizes of the convolution kernels, best guess first. Nothing here was measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.kernels.triton_core.blocks import column_block
from fusedres.kernels.triton_core.launch import (
    INTERPRETED,
    Config,
    Gpu,
    ceil_div,
    choose,
    fitting,
    gpu,
    input_precision,
)

# (BLOCK_M, BLOCK_K, BLOCK_C, warps, stages) by kind of arithmetic: narrow for up to 64 columns, wide for more.
# With BatchNorm on load, the tile of x is in registers and has fewer channels.
_Tiles = tuple[tuple[int, int, int, int, int], ...]
_HOPPER: dict[str, _Tiles] = {
    "half wide": ((128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (128, 256, 64, 8, 3)),
    "half narrow": ((128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (128, 64, 64, 8, 4), (256, 64, 64, 8, 3)),
    "half wide normalised": ((128, 128, 32, 8, 4), (64, 128, 32, 4, 4), (64, 64, 32, 4, 4), (128, 256, 32, 8, 4)),
    "half narrow normalised": ((64, 64, 64, 4, 3), (128, 64, 32, 8, 4), (64, 64, 32, 4, 4), (128, 64, 64, 8, 3)),
    "tf32 wide": ((128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (128, 64, 32, 8, 3), (64, 64, 32, 4, 3)),
    "tf32 narrow": ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (64, 64, 16, 4, 4), (128, 64, 16, 8, 4)),
}
_AMPERE: dict[str, _Tiles] = {
    # What spills: 128x128x64 with Triton 3.6; 128x128x32 with Triton 3.9 if C is 64; 128x64x32 with Triton 3.6.
    "half wide": ((128, 128, 32, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 4)),
    "half wide shallow": ((128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 4)),
    "half narrow": ((128, 64, 64, 8, 3), (64, 64, 32, 4, 4), (64, 64, 64, 4, 3), (128, 64, 32, 8, 3)),
    "half wide normalised": ((128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (64, 64, 32, 4, 4), (128, 64, 32, 8, 3)),
    "half narrow normalised": ((64, 64, 32, 4, 4), (128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (32, 64, 32, 4, 4)),
    "tf32 wide": ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (64, 128, 16, 4, 3), (128, 128, 16, 8, 3)),
    "tf32 narrow": ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (64, 64, 16, 4, 4), (32, 64, 32, 4, 3)),
}
# Arithmetic that never uses wgmma, and the flattened reduction, which loads single elements.
_ANY: dict[str, _Tiles] = {
    "half flat": ((64, 64, 32, 4, 1), (128, 64, 32, 8, 1), (64, 64, 32, 8, 1), (64, 64, 16, 4, 1)),
    "tf32 flat": ((64, 64, 32, 4, 2), (128, 64, 32, 8, 2), (64, 64, 32, 8, 2), (32, 64, 32, 4, 2)),
    # Four warps: another kernel with a flat loop over taps computed wrong sums in eight (pytorch#173068).
    "ieee": ((64, 64, 16, 4, 3), (64, 32, 32, 4, 3), (32, 64, 16, 4, 3), (64, 64, 16, 4, 2)),
    "double": ((64, 64, 16, 8, 2), (32, 64, 16, 4, 3), (32, 32, 16, 4, 2), (64, 32, 16, 4, 2)),
}
# The kernel that loads by descriptors, on Hopper.
_DESCRIPTORS: dict[str, _Tiles] = {
    "half": ((128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3)),
    "tf32": ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (128, 128, 32, 8, 3), (64, 128, 32, 4, 3)),
}


@dataclass(frozen=True)
class DescriptorConfig(Config):
    """A config for the kernel that loads by tensor descriptors."""


class _Problem(NamedTuple):
    """The properties of a convolution that its configs depend on."""

    dtype: torch.dtype
    precision: str
    k: int
    c: int
    taps: int
    normalised: bool
    padded: bool
    shifted: bool  # every tap is a shift of x's rows, as the kernel with descriptors needs
    gpu: Gpu


def candidates(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    normalised: bool,
    aligned: bool = True,
) -> Sequence[Config]:
    """Return configs for y = conv(x, weight) of any batch size: first those with pointers, then with descriptors.

    FLAT: steps go over the whole (R, S, C) axis. TABLE: a table in memory tells what is padding. aligned: x and weight
    start at multiples of 16 bytes, as descriptors require.
    """
    k, c, r, s = (int(size) for size in weight.shape)  # a weight's sizes are never symbolic
    shifted = aligned and tuple(stride) == (1, 1) and y.shape[2:] == x.shape[2:]
    precision = input_precision(x.dtype)
    problem = _Problem(x.dtype, precision, k, c, r * s, normalised, any(padding), shifted, gpu(x.device))
    return _candidates(problem)


def chosen(
    configs: Sequence[Config], x: Tensor, weight: Tensor, y: Tensor, stride: Sequence[int], normalised: bool
) -> Config:
    """Return the config to launch conv_fprop with."""
    rows, taps = y.shape[0] * y.shape[2] * y.shape[3], f"{weight.shape[2]}x{weight.shape[3]}"
    load = "normalised" if normalised else "plain"
    return choose(configs, "conv_fprop", x.dtype, rows, weight.shape[1], weight.shape[0], taps, stride[0], load)


def by_pointers(configs: Sequence[Config]) -> Sequence[Config]:
    """Return the configs for kernels that load by pointers."""
    return tuple(config for config in configs if not isinstance(config, DescriptorConfig))


def row_tiles(
    x: Tensor, weight: Tensor, y: Tensor, stride: Sequence[int], padding: Sequence[int], normalised: bool
) -> int:
    """Return into how many tiles the statistics of y are split."""
    config = chosen(candidates(x, weight, y, stride, padding, normalised), x, weight, y, stride, normalised)
    return ceil_div(y.shape[0] * y.shape[2] * y.shape[3], config["BLOCK_M"])


@lru_cache(1024)  # more shapes than a run has
def _candidates(problem: _Problem) -> Sequence[Config]:
    masked = problem.normalised and problem.padded

    def shared_bytes(config: Config) -> int:
        m, k, c = (config[block] for block in ("BLOCK_M", "BLOCK_K", "BLOCK_C"))
        return config.num_stages * ((m + k) * c * problem.dtype.itemsize + 4 * m * masked)

    found = _pointers(problem)
    if problem.shifted and not INTERPRETED:
        found += _descriptors(problem)
    return fitting(found, shared_bytes, problem.gpu)


def _pointers(problem: _Problem) -> list[Config]:
    dtype, precision, k, c, taps, normalised, padded, _, gpu = problem
    hopper = 90 <= gpu.capability < 120  # 120 has less shared memory than 80 and no wgmma
    flat = c < 32 and taps > 1
    kind = _arithmetic(dtype, precision)
    if INTERPRETED:
        tiles: _Tiles = ((64, 64, 32, 4, 1),)
    elif kind in ("ieee", "double"):
        tiles = _ANY[kind]
    elif flat:
        tiles = _ANY[f"{kind} flat"]
    else:
        wide = ceil_div(k, 128) * 128 == ceil_div(k, 64) * 64
        name = f"{kind} {'wide' if wide else 'narrow'}{' normalised' if normalised and kind == 'half' else ''}"
        name += " shallow" if name == "half wide" and c <= 64 and not hopper else ""
        tiles = (_HOPPER if hopper else _AMPERE)[name]
    length = c * taps if flat else c
    found = []
    for block_m, block_k, longest, warps, stages in tiles:
        block_c = column_block(length, longest)
        blocks = {"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_C": block_c, "FLAT": flat}
        blocks["TABLE"] = normalised and padded and hopper and not flat
        found.append(Config(blocks, warps, stages))
    return found


def _descriptors(problem: _Problem) -> list[Config]:
    kind = _arithmetic(problem.dtype, problem.precision)
    tiles = _DESCRIPTORS.get(kind, ()) if 90 <= problem.gpu.capability < 120 else ()
    return [
        DescriptorConfig({"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_C": block_c}, warps, stages)
        for block_m, block_k, block_c, warps, stages in tiles
        if problem.c % block_c == 0
    ]


def _arithmetic(dtype: torch.dtype, precision: str) -> str:
    if dtype is torch.float64:
        return "double"
    return "half" if dtype.itemsize == 2 else precision
