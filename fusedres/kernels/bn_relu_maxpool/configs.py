"""Tiles of bn_relu_maxpool and its backward: BLOCK_P x BLOCK_Q windows of BLOCK_C channels."""

from __future__ import annotations

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div


def forward(channels: int) -> list[Config]:
    """Candidates, best guess first."""
    return _tiles(channels, ((2, 8, 4), (4, 8, 8), (2, 4, 2), (4, 4, 4)))


def reduction(channels: int) -> list[Config]:
    """Candidates, best guess first: a program sums STEPS tiles."""
    tiles = _tiles(channels, ((2, 8, 4), (4, 8, 8), (2, 4, 2), (4, 4, 4)))
    return [Config({**tile.blocks, "STEPS": 2 if INTERPRETED else 8}, tile.num_warps) for tile in tiles]


def elementwise(channels: int) -> list[Config]:
    """Candidates, best guess first."""
    return _tiles(channels, ((2, 8, 4), (4, 8, 8), (2, 4, 2), (4, 4, 4)))


def _tiles(channels: int, shapes: tuple[tuple[int, int, int], ...]) -> list[Config]:
    if INTERPRETED:
        return [Config({"BLOCK_P": 4, "BLOCK_Q": 8, "BLOCK_C": 128})]
    # the widest of the blocks that cover the channels with the fewest lanes idle
    block_c = min((64, 32, 16), key=lambda block: ceil_div(channels, block) * block)
    return [Config({"BLOCK_P": p, "BLOCK_Q": q, "BLOCK_C": block_c}, warps) for p, q, warps in shapes]
