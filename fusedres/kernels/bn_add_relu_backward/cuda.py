"""Backward of BatchNorm under a ReLU in CUDA (csrc/bn_add_relu_backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.arguments import NO_GATE, RECOMPUTED_GATE, Gate, gate_of, matrix_of, tiles_of
from fusedres.kernels.bn_backward.cuda import Branch, launch_step, row_tiles
from fusedres.values import BnBranch, Gated

# csrc/bn_add_relu_backward/config.h chooses, or one launch for each step, or one launch for all. Results are the same.
CHOSEN, SEPARATE, FUSED = range(3)
launches = CHOSEN


def bn_add_relu_backward(
    gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu_backward."""
    grad_x, grad_shortcut = torch.empty_like(x.x), x.x.new_empty(0)
    branches: tuple[Branch, ...] = (_branch(x, grad_x),)
    if shortcut is not None:
        grad_shortcut = torch.empty_like(shortcut.x)
        branches += (_branch(shortcut, grad_shortcut),)
    return grad_x, grad_shortcut, _launch(gated.grad, gate_of(gated.gate), branches, with_sums)


def bn_add_relu_backward_(gated: Gated, x: BnBranch, shortcut: BnBranch | None, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    branches = tuple(_branch(branch, branch.x) for branch in (x, shortcut) if branch is not None)
    return _launch(gated.grad, gate_of(gated.gate), branches, with_sums)


def bn_relu_backward_(grad: Tensor, x: BnBranch, relu: bool, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    return _launch(grad, RECOMPUTED_GATE if relu else NO_GATE, (_branch(x, grad),), with_sums)


def bn_relu_backward_add_(grad: Tensor, x: BnBranch, added: Tensor, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    sums = bn_relu_backward_(grad, x, True, with_sums)
    grad.add_(added)
    return sums


def _branch(branch: BnBranch, grad_x: Tensor) -> Branch:
    return Branch(*branch, torch.empty_like(branch.state), grad_x)


def _launch(grad: Tensor, gate: Gate, branches: tuple[Branch, ...], with_sums: bool) -> Tensor:
    channels = grad.shape[1]
    tile_rows, tiles = row_tiles(grad)
    state = branches[0].state
    assert state is not None
    sums = state.new_empty((3, channels))
    partials = state.new_empty((tiles, 1 + len(branches), channels))
    tiled = tiles_of(tile_rows, partials)
    launch_step(
        "bn_add_relu_backward", grad.device, matrix_of(grad), gate, branches, tiled, sums, (with_sums, launches)
    )
    return sums
