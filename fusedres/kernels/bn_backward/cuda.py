"""The steps of BatchNorm's backward in CUDA (csrc/bn_backward)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.kernels.arguments import NO_GATE, Gate, address, gate_of, matrix_of, vector_of
from fusedres.kernels.cuda_core import launch

_BLOCKS = 2048  # a sum over rows is split over so many blocks, each of which reads 512 bytes of a row


def row_tile(rows: int, channels: int, itemsize: int) -> int:
    """Return the rows that one partial sums. Only sizes count, so that partials are the same on every device."""
    across = -(-channels * itemsize // 512)
    wanted = -(-rows * across // _BLOCKS)
    return max(32, 1 << (wanted - 1).bit_length())


def row_tiles(x: Tensor) -> tuple[int, int]:
    """Return the rows of a tile, and the number of tiles of an activation."""
    rows = x.numel() // x.shape[1]
    size = row_tile(rows, x.shape[1], x.element_size())
    return size, -(-rows // size)


class Branch(NamedTuple):
    """A raw convolution output before the ReLU; a launch ignores what it does not need."""

    x: Tensor | None = None
    state: Tensor | None = None
    batch_statistics: bool = False
    coefficients: Tensor | None = None
    grad_x: Tensor | None = None


def launch_step(
    function: str,
    device: torch.device,
    grad: tuple[int, int, int, int],
    gate: Gate,
    branches: tuple[Branch, ...],
    *,
    tile_rows: int = 1,
    partials: Tensor | None = None,
    sums: Tensor | None = None,
    with_sums: bool = True,
    launches: int = 0,
) -> None:
    """Call a launch with what it needs of BnBackwardParams; grad is a matrix."""
    tiled = (tile_rows, 0 if partials is None else partials.shape[0], address(partials))
    at = tuple(
        (address(x), address(state), batch_statistics, address(coefficients), address(grad_x))
        for x, state, batch_statistics, coefficients, grad_x in branches
    )
    launch(function, device, grad, gate, at, tiled, sums, with_sums, launches)


def bn_backward_reduce(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
) -> Tensor:
    """See fusedres.ops.bn_backward."""
    branches: tuple[Branch, ...] = (Branch(x, state),)
    if shortcut_x is not None:
        branches += (Branch(shortcut_x, shortcut_state),)
    tile_rows, tiles = row_tiles(x)
    partials = state.new_empty((tiles, 1 + len(branches), x.shape[1]))
    arguments = (x.device, matrix_of(grad), gate_of(gate), branches)
    launch_step("bn_backward_reduce", *arguments, tile_rows=tile_rows, partials=partials)
    return partials


def bn_backward_coefficients(
    partials: Tensor,
    count: int,
    state: Tensor,
    batch_statistics: bool,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    sums = partials.new_empty(partials.shape[1:])
    coefficients, shortcut = torch.empty_like(state), state.new_empty(0)
    branches: tuple[Branch, ...] = (Branch(None, state, batch_statistics, coefficients),)
    if shortcut_state is not None:
        shortcut = torch.empty_like(shortcut_state)
        branches += (Branch(None, shortcut_state, shortcut_batch_statistics, shortcut),)
    grad = (0, vector_of(state)[1], count, state.shape[1])  # only its dtype and sizes are read
    launch_step("bn_backward_coefficients", state.device, grad, NO_GATE, branches, partials=partials, sums=sums)
    return sums, coefficients, shortcut


def bn_backward_apply(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    shortcut_x: Tensor | None,
    shortcut_coefficients: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    grad_x, grad_shortcut = torch.empty_like(x), x.new_empty(0)
    branches: tuple[Branch, ...] = (Branch(x, coefficients=coefficients, grad_x=grad_x),)
    if shortcut_x is not None:
        grad_shortcut = torch.empty_like(shortcut_x)
        branches += (Branch(shortcut_x, coefficients=shortcut_coefficients, grad_x=grad_shortcut),)
    launch_step("bn_backward_apply", x.device, matrix_of(grad), gate_of(gate), branches)
    return grad_x, grad_shortcut
