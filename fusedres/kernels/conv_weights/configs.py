"""Tiles of conv_weights: (k, r, s) by channels. Nothing here was measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from fusedres.kernels.triton_core.blocks import column_block
from fusedres.kernels.triton_core.launch import INTERPRETED, Config


@cache
def conv_weights(channels: int) -> Sequence[Config]:
    """Return candidates for weights of at most this many input channels."""
    if INTERPRETED:
        return (Config({"BLOCK_M": 64, "BLOCK_C": 64}),)
    # 16 rows hold the 9 taps of a 3x3 filter; in a weight that is not channels_last they are contiguous
    return tuple(
        Config({"BLOCK_M": elements // block, "BLOCK_C": block}, warps)
        for elements, block, warps in (
            (2048, column_block(channels, 128), 4),
            (1024, column_block(channels, 64), 4),
            (4096, column_block(channels, 256), 8),
            (2048, column_block(channels, 64), 4),
        )
    )
