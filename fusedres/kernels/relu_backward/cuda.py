"""The gradient that passes a ReLU in CUDA (csrc/relu_backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.arguments import gate_of, matrix_of, tiles_of
from fusedres.kernels.bn_backward.cuda import row_tiles
from fusedres.kernels.cuda_core import launch
from fusedres.values import Gated, arithmetic_dtype


def relu_backward(gated: Gated) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.relu_backward."""
    grad, gate = gated
    channels = grad.shape[1]
    tile_rows, tiles = row_tiles(grad)
    d = torch.empty_like(grad)
    partials = torch.empty((tiles, channels), dtype=arithmetic_dtype(grad.dtype), device=grad.device)
    sums = partials.new_empty(channels)
    launch("relu_backward", grad.device, matrix_of(grad), gate_of(gate), d, tiles_of(tile_rows, partials), sums)
    return d, sums
