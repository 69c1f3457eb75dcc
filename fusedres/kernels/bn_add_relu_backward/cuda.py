"""Backward of BatchNorm under a ReLU in CUDA (csrc/bn_add_relu_backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.arguments import NO_GATE, RECOMPUTED_GATE, Gate, gate_of, matrix_of
from fusedres.kernels.bn_backward.cuda import Branch, launch_step, row_tiles

# csrc/bn_add_relu_backward/config.h chooses, or one launch for each step, or one launch for all. Results are the same.
CHOSEN, SEPARATE, FUSED = range(3)
launches = CHOSEN


def bn_add_relu_backward(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    batch_statistics: bool,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu_backward."""
    grad_x, grad_shortcut = torch.empty_like(x), x.new_empty(0)
    branches: tuple[Branch, ...] = (_branch(x, state, batch_statistics, grad_x),)
    if shortcut_x is not None and shortcut_state is not None:
        grad_shortcut = torch.empty_like(shortcut_x)
        branches += (_branch(shortcut_x, shortcut_state, shortcut_batch_statistics, grad_shortcut),)
    return grad_x, grad_shortcut, _launch(grad, gate_of(gate), branches, with_sums)


def bn_add_relu_backward_(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    batch_statistics: bool,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
    with_sums: bool,
) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward."""
    branches: tuple[Branch, ...] = (_branch(x, state, batch_statistics, x),)
    if shortcut_x is not None and shortcut_state is not None:
        branches += (_branch(shortcut_x, shortcut_state, shortcut_batch_statistics, shortcut_x),)
    return _launch(grad, gate_of(gate), branches, with_sums)


def bn_relu_backward_(
    grad: Tensor, x: Tensor, state: Tensor, gated: bool, batch_statistics: bool, with_sums: bool
) -> Tensor:
    """See fusedres.ops.bn_add_relu_backward.bn_relu_backward_."""
    gate = RECOMPUTED_GATE if gated else NO_GATE
    return _launch(grad, gate, (_branch(x, state, batch_statistics, grad),), with_sums)


def _branch(x: Tensor, state: Tensor, batch_statistics: bool, grad_x: Tensor) -> Branch:
    return Branch(x, state, batch_statistics, torch.empty_like(state), grad_x)


def _launch(grad: Tensor, gate: Gate, branches: tuple[Branch, ...], with_sums: bool) -> Tensor:
    channels = grad.shape[1]
    tile_rows, tiles = row_tiles(grad)
    state = branches[0].state
    assert state is not None
    sums = state.new_empty((3, channels))
    launch_step(
        "bn_add_relu_backward",
        grad.device,
        matrix_of(grad),
        gate,
        branches,
        tile_rows=tile_rows,
        partials=state.new_empty((tiles, 1 + len(branches), channels)),
        sums=sums,
        with_sums=with_sums,
        launches=launches,
    )
    return sums
