"""The steps of BatchNorm's backward in CUDA (csrc/bn_backward)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.kernels.arguments import NO_GATE, Gate, Tiles, address, gate_of, matrix_of, tiles_of, vector_of
from fusedres.kernels.cuda_core import launch
from fusedres.values import BnGradient, Gated, Gradient, NormState, Raw

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


NO_TILES: Tiles = (1, 0, 0)


def launch_step(
    function: str,
    device: torch.device,
    grad: tuple[int, int, int, int],
    gate: Gate,
    branches: tuple[Branch, ...],
    tiles: Tiles = NO_TILES,
    sums: Tensor | None = None,
    options: tuple[bool, int] = (True, 0),  # whether the sums are needed, and how many launches there are
) -> None:
    """Call a launch with what it needs of BnBackwardParams; grad is a matrix."""
    at = tuple(
        (address(x), address(state), batch_statistics, address(coefficients), address(grad_x))
        for x, state, batch_statistics, coefficients, grad_x in branches
    )
    launch(function, device, grad, gate, at, tiles, sums, *options)


def bn_backward_reduce(gated: Gated, x: Raw, shortcut: Raw | None = None) -> Tensor:
    """See fusedres.ops.bn_backward."""
    branches = tuple(Branch(*raw) for raw in (x, shortcut) if raw is not None)
    tile_rows, tiles = row_tiles(x.y)
    assert x.state is not None  # checked by the op
    partials = x.state.new_empty((tiles, 1 + len(branches), x.y.shape[1]))
    gate, tiled = gate_of(gated.gate), tiles_of(tile_rows, partials)
    launch_step("bn_backward_reduce", x.y.device, matrix_of(gated.grad), gate, branches, tiled)
    return partials


def bn_backward_coefficients(
    partials: Tensor, count: int, norm_state: NormState, shortcut_state: NormState | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    state, batch_statistics = norm_state
    sums = partials.new_empty(partials.shape[1:])
    coefficients, shortcut = torch.empty_like(state), state.new_empty(0)
    branches: tuple[Branch, ...] = (Branch(None, state, batch_statistics, coefficients),)
    if shortcut_state is not None:
        shortcut = torch.empty_like(shortcut_state.state)
        branches += (Branch(None, *shortcut_state, shortcut),)
    grad = (0, vector_of(state)[1], count, state.shape[1])  # only its dtype and sizes are read
    tiled = tiles_of(1, partials)
    launch_step("bn_backward_coefficients", state.device, grad, NO_GATE, branches, tiled, sums)
    return sums, coefficients, shortcut


def bn_backward_apply(gradient: Gradient, shortcut: BnGradient | None = None) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    grad, gate, y, coefficients = gradient
    assert y is not None  # checked by the op
    grad_y, grad_shortcut = torch.empty_like(y), y.new_empty(0)
    branches: tuple[Branch, ...] = (Branch(y, coefficients=coefficients, grad_x=grad_y),)
    if shortcut is not None:
        grad_shortcut = torch.empty_like(shortcut.y)
        branches += (Branch(shortcut.y, coefficients=shortcut.coefficients, grad_x=grad_shortcut),)
    launch_step("bn_backward_apply", y.device, matrix_of(grad), gate_of(gate), branches)
    return grad_y, grad_shortcut
