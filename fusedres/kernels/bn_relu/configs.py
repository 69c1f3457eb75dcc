"""Tiles of bn_relu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedres.kernels.launch import Config
from fusedres.kernels.tiles import row_tiles


def bn_relu(channels: int, dtype: torch.dtype) -> Sequence[Config]:
    """Candidates, best guess first."""
    return row_tiles(channels, dtype)
