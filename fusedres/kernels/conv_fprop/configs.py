"""Tile sizes of the convolution kernels, best guess first: no GPU has measured them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div, choose


@dataclass(frozen=True)
class DescriptorConfig(Config):
    """A config of the kernel that loads by tensor descriptors."""


def capability(device: torch.device) -> int:
    """80, 90, ... of a GPU; 90 where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def candidates(x: Tensor, weight: Tensor, rows: int, normalised: bool, padded: bool) -> Sequence[Config]:
    """Configs of a convolution of x (N, C, H, W) with weight (K, C, R, S) into `rows` rows.

    FLAT: steps go over all of (R, S, C). TABLE: padding is masked from a table in memory.
    """
    _, c, r, s = weight.shape
    flat = c < 32 and r * s > 1
    table = normalised and padded and not flat and capability(x.device) >= 90

    def config(m: int, n: int, reduction: int, warps: int, stages: int) -> Config:
        blocks = {"BLOCK_M": m, "BLOCK_K": n, "BLOCK_C": reduction, "FLAT": flat, "TABLE": table}
        return Config(blocks, warps, stages)

    if INTERPRETED:
        return [config(64, 64, 32, 4, 1)]
    return [config(128, 128, 64, 8, 3), config(128, 64, 64, 4, 3), config(64, 256, 64, 4, 3), config(64, 64, 64, 4, 3)]


def row_tiles(x: Tensor, weight: Tensor, y: Tensor, normalised: bool, padded: bool) -> int:
    """Into how many tiles the statistics of y are split."""
    rows = y.shape[0] * y.shape[2] * y.shape[3]
    return ceil_div(rows, choose(candidates(x, weight, rows, normalised, padded))["BLOCK_M"])
